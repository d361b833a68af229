"""One Newton-Schulz step in Gram space: the polynomial that multiplies ``X``."""

from __future__ import annotations

import math

from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Kernels, Scalar


def step_factor(
    kernels: Kernels,
    gram: Tensor,  # (8, 1024, 1024)
    row: tuple[float, ...],
    scale: Scalar = 1.0,
) -> Tensor:
    """``Z = h(R) - a I`` for ``R = scale * gram``, where a step maps ``X`` to ``h(R) X``.

    ``a`` is ``row[0]``. It stays apart because ``Z`` is small in the directions of small singular
    values, and there ``a I + Z`` would lose what half precision could keep.

    Args:
        kernels: The backend.
        gram: ``(batch, n, n)``, symmetric.
        row: ``(a, b)``, ``(a, b, c)`` or ``(a, b, c, d, e)``: degree 3, 5 or 9. Costs none, one or
            two symmetric products; degree 9 completes the square,
            ``h(R) = e Y^2 + q R + const`` with ``Y = R^2 + p R + g I``.
        scale: Per-matrix factor, folded into the products.

    Returns:
        ``(batch, n, n)``, symmetric, in the dtype of ``gram``.
    """
    if len(row) == 2:
        return scaled(gram, row[1] * scale)
    if len(row) == 3:
        _, b, c = row
        return kernels.symmetric(gram, gram, alpha=c * scale * scale, c=gram, beta=b * scale)
    _, b, c, d, e = row
    p = d / (2 * e)
    g = (c / e - p * p) / 2
    q = b - 2 * e * p * g
    y = kernels.symmetric(gram, gram, alpha=scale * scale, c=gram, beta=p * scale, gamma=g)
    return kernels.symmetric(y, y, alpha=e, c=gram, beta=q * scale, gamma=-e * g * g)


def scaled(matrix: Tensor, factor: Scalar) -> Tensor:
    """``factor * matrix`` in the dtype of ``matrix``; ``factor`` may be ``(batch,)``."""
    if isinstance(factor, Tensor):
        return (matrix * factor[:, None, None]).to(matrix.dtype)
    return matrix * factor


def add_identity(matrix: Tensor, value: float) -> Tensor:
    """``matrix + value * I``, as a new tensor."""
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(value)
    return result


def entry_scale(n: int, m: int) -> float:
    """What to multiply an ``n x m`` matrix of norm one with, so that its entries are about one.

    A matrix of Frobenius norm one has entries of ``1 / sqrt(n m)``, which float16 cannot hold
    exactly below 6e-5: ``n m`` above 2.7e8. Capped so that no entry exceeds float16's range.
    """
    return min(math.sqrt(n * m), 2.0**14)
