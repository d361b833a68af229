"""Iterations that are normalized by a tight bound on the largest singular value.

``unbiased`` needs fewer and cheaper steps than the same accuracy takes after Frobenius
normalization; ``fast`` first shrinks the dominant singular values (see ``deflation.py``), and then
needs two steps only.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from flashns_dist.orthogonalize.bound import spectral_bound
from flashns_dist.orthogonalize.coefficients import Coefficients
from flashns_dist.orthogonalize.deflation import deflate
from flashns_dist.orthogonalize.gram import run_ordered
from flashns_dist.orthogonalize.kernels.interface import Kernels, Multiple, Scalar
from flashns_dist.orthogonalize.restarts import ordered_restarts
from flashns_dist.orthogonalize.stages import entry_scale


def unbiased(
    kernels: Kernels,
    x: Tensor,  # (8, 1024, 4096), or (8, 4096, 1024) with transpose
    coefficients: Coefficients,
    *,
    dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    """Orthogonalizes by a Gram iteration that is normalized by ``bound.spectral_bound``.

    Args:
        kernels: The backend.
        x: ``(batch, rows, columns)``, any float dtype; not changed.
        coefficients: Normalized by ``"ws8"``.
        dtype: Of the iteration.
        transpose: Whether ``x`` is tall, so that the iteration runs on its transpose.

    Returns:
        The shape and dtype of ``x``.
    """
    n, m = sorted(x.shape[-2:])
    size = entry_scale(n, m)
    current, _ = kernels.normalize(x, dtype=dtype, transpose=transpose, scale=size)
    return _iterate(kernels, current, coefficients, size, None, x.dtype, transpose)


def fast(
    kernels: Kernels,
    x: Tensor,  # (8, 1024, 4096), or (8, 4096, 1024) with transpose
    coefficients: Coefficients,
    *,
    dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    """As ``unbiased``, with the dominant singular values shrunk by ``deflation.deflate`` first.

    See there for the arguments; the polar factor is changed by less than the steps' own error.
    """
    n, m = sorted(x.shape[-2:])
    size = entry_scale(n, m)
    if {x.dtype, dtype} <= {torch.float16, torch.bfloat16}:
        # Deflation reads the input as it is: no pass that only scales and casts.
        # A batch of one matrix expanded is read otherwise than the matrix, in another order.
        packed = x if x.stride(0) and 1 in x.stride()[-2:] else x.contiguous()
        current = deflate(kernels, packed, size, normalized=False, dtype=dtype)
    else:
        current, _ = kernels.normalize(x, dtype=dtype, transpose=transpose, scale=size)
        current = deflate(kernels, current, size, normalized=True)
    # Deflation leaves no eigenvalue of the Gram matrix above 0.03 n: this times its square is at
    # most 943. (float16 would hold it up to n / 4.)
    weight = 2.0**20 / n**2
    return _iterate(kernels, current, coefficients, size, weight, x.dtype, transpose)


def _iterate(
    kernels: Kernels,
    current: Tensor,  # (8, 1024, 4096)
    coefficients: Coefficients,
    size: float,
    square_weight: float | None,  # of spectral_bound
    dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    """The steps, after which ``current`` is returned in ``dtype``, transposed if asked."""
    n, m = current.shape[-2:]
    restarts = ordered_restarts(coefficients, n, m, current.dtype)
    weight: Scalar = 1.0
    for begin, end in pairwise((0, *restarts, coefficients.num_steps)):
        last = end == coefficients.num_steps
        rows = coefficients.rows[begin:end]
        if begin == 0:
            factor, shift, weight = _first_run(kernels, current, rows, size, square_weight)
        else:
            factor, shift = run_ordered(kernels, kernels.gram(current), rows)
            weight = 1.0
        current = kernels.product(
            factor,
            current,
            alpha=weight,
            c=current,
            beta=shift * weight,
            transpose=transpose and last,
            dtype=dtype if last else current.dtype,
        )
        del factor  # its memory is for the next run's
    return current


def _first_run(
    kernels: Kernels,
    current: Tensor,
    rows: tuple[tuple[float, ...], ...],
    size: float,
    square_weight: float | None,
) -> tuple[Tensor, float, Scalar]:
    """As ``run_ordered``, and by how much ``current`` is to be multiplied too.

    Entries of X are about one at first and eigenvalues of its Gram matrix too, away from underflow;
    dividing by the bound is folded into the products.
    """
    n = current.shape[-2]
    matrix = kernels.gram(current, alpha=n / size**2)
    bound = spectral_bound(kernels, matrix, square_weight)
    factor, shift = run_ordered(kernels, matrix, rows, Multiple(bound.scale), bound.square)
    return factor, shift, Multiple(bound.root, math.sqrt(n) / size)
