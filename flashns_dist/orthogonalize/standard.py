"""Standard Newton-Schulz: every step updates ``X`` itself."""

from __future__ import annotations

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import Coefficients, slope
from flashns_dist.orthogonalize.kernels.interface import Kernels
from flashns_dist.orthogonalize.stages import entry_scale, step_factor


def standard(
    kernels: Kernels,
    x: Tensor,  # (8, 1024, 4096), or (8, 4096, 1024) with transpose
    coefficients: Coefficients,
    *,
    dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    """Orthogonalizes by ``X <- h_k(X X^T) X`` for each step ``k`` (Jordan et al. 2024).

    Args:
        kernels: The backend.
        x: ``(batch, rows, columns)``, any float dtype; not changed.
        coefficients: Normalized by the Frobenius norm.
        dtype: Of the iteration.
        transpose: Whether ``x`` is tall, so that the iteration runs on its transpose.

    Returns:
        The shape and dtype of ``x``.
    """
    n, m = sorted(x.shape[-2:])
    size = entry_scale(n, m)
    current, _ = kernels.normalize(x, dtype=dtype, transpose=transpose, scale=size)
    for step, row in enumerate(coefficients.rows):
        first, last = step == 0, step == coefficients.num_steps - 1
        # In the first step X is size times too large, to keep its entries away from underflow;
        # the Gram matrix is stored n times too large for the same reason.
        gram = kernels.gram(current, alpha=n / size**2 if first else 1.0)
        factor = step_factor(kernels, gram, row, 1.0 / n if first else 1.0)
        weight = 1.0 / size if first else 1.0
        current = kernels.product(
            factor,
            current,
            alpha=weight,
            c=current,
            beta=slope(row) * weight,
            transpose=transpose and last,
            dtype=x.dtype if last else dtype,
        )
    return current
