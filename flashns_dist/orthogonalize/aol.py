"""Gram Newton-Schulz after AOL preconditioning: fewer steps, but of a different polar factor.

AOL (almost-orthogonal layers, Prach and Lampert 2022; used in Turbo-Muon, arXiv:2512.04632, and in
flash-newton-schulz) scales row ``i`` of ``X`` by ``s_i = (sum_j |X X^T|_ij)^(-1/2)``. That bounds
the singular values of ``diag(s) X`` by one, usually more tightly than the Frobenius norm does, and
lifts small rows. The price: the result approximates the polar factor of ``diag(s) X``, which is
not that of ``X`` unless the row sums are equal. This is a bias, which more steps do not cure.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import Coefficients
from flashns_dist.orthogonalize.gram import run_ordered
from flashns_dist.orthogonalize.kernels.interface import Kernels
from flashns_dist.orthogonalize.restarts import ordered_restarts
from flashns_dist.orthogonalize.stages import add_identity, entry_scale

GUARD = 2.0
"""Largest ratio between two row scales in the guarded variant. On momentum of a small language
model a ratio of two halves the bias and still bounds the singular values by one."""

UNGUARDED = 1e3
"""The same for ``"aol_unguarded"``: only keeps ``Q diag(s)`` inside float16 if rows are zero."""


def row_scales(matrix: Tensor, guard: float) -> Tensor:
    """AOL's ``s``, at most ``guard`` times its smallest entry, so that zero rows are harmless.

    Args:
        matrix: Gram matrices ``(batch, n, n)``.
        guard: Largest ratio of two scales of a matrix. Scaling less than AOL asks for keeps the
            bound on the singular values.

    Returns:
        ``(batch, n)`` fp32 (fp64 for fp64); zeros for a zero matrix.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    sums = torch.linalg.vector_norm(matrix, ord=1, dim=-1, dtype=dtype)
    largest = sums.amax(dim=-1, keepdim=True)
    scales = torch.maximum(sums, largest / guard**2).rsqrt()
    return torch.where(largest == 0, 0, scales)


def aol(
    kernels: Kernels,
    x: Tensor,  # (8, 1024, 4096), or (8, 4096, 1024) with transpose
    coefficients: Coefficients,
    *,
    dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    """Orthogonalizes ``diag(s) X`` by a Gram iteration, ``s`` folded into the product with ``X``.

    Args:
        kernels: The backend.
        x: ``(batch, rows, columns)``, any float dtype; not changed.
        coefficients: Normalized by ``"aol"`` (guarded) or ``"aol_unguarded"`` (as published).
        dtype: Of the iteration.
        transpose: Whether ``x`` is tall, so that the iteration runs on its transpose.

    Returns:
        The shape and dtype of ``x``. Biased: see the module's docstring.
    """
    n, m = sorted(x.shape[-2:])
    size = entry_scale(n, m)
    current, _ = kernels.normalize(x, dtype=dtype, transpose=transpose, scale=size)
    matrix = kernels.gram(current, alpha=n / size**2)
    guard = UNGUARDED if coefficients.normalization == "aol_unguarded" else GUARD
    scales = row_scales(matrix, guard)
    matrix = (matrix * scales[:, :, None] * scales[:, None, :]).to(dtype)
    restarts = ordered_restarts(coefficients, n, m, dtype)
    for begin, end in pairwise((0, *restarts, coefficients.num_steps)):
        first, last = begin == 0, end == coefficients.num_steps
        if not first:
            matrix = kernels.gram(current)
        factor, shift = run_ordered(kernels, matrix, coefficients.rows[begin:end])
        current = kernels.product(
            add_identity(factor, shift) if first else factor,
            current,
            alpha=math.sqrt(n) / size if first else 1.0,
            c=None if first else current,
            beta=0.0 if first else shift,
            column_scale=scales if first else None,
            transpose=transpose and last,
            dtype=x.dtype if last else dtype,
        )
    return current
