"""Gram Newton-Schulz: the steps run on ``X X^T``, and ``X`` is multiplied once at the end.

``run_steps`` is the published recurrence. ``run_ordered`` costs two half products more per step and
needs fewer restarts in half precision.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import Coefficients, slope
from flashns_dist.orthogonalize.kernels.interface import Kernels, Scalar
from flashns_dist.orthogonalize.restarts import restart_positions
from flashns_dist.orthogonalize.stages import Square, add_identity, entry_scale, step_factor


def gram(
    kernels: Kernels,
    x: Tensor,  # (8, 1024, 4096), or (8, 4096, 1024) with transpose
    coefficients: Coefficients,
    *,
    dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    """Orthogonalizes by the Gram iteration with restarts (gram-newton-schulz, Zhang et al. 2026).

    With ``R = X X^T`` and ``Q = I``, a step maps ``Q`` to ``Q h(R)`` and ``R`` to ``h(R) R h(R)``;
    in exact arithmetic ``Q X`` equals the standard iteration's ``X``. At a restart ``X`` becomes
    ``Q X`` and the Gram matrix is computed anew, because rounding errors in ``R`` grow.

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
    bounds = (0, *restart_positions(coefficients), coefficients.num_steps)
    for begin, end in pairwise(bounds):
        first, last = begin == 0, end == coefficients.num_steps
        # X and its Gram matrix are stored larger than they are at first, away from underflow.
        factor, shift = gram_steps(
            kernels,
            current,
            coefficients.rows[begin:end],
            alpha=n / size**2 if first else 1.0,
            scale=1.0 / n if first else 1.0,
        )
        weight = 1.0 / size if first else 1.0
        current = kernels.product(
            factor,
            current,
            alpha=weight,
            c=current if shift else None,
            beta=shift * weight,
            transpose=transpose and last,
            dtype=x.dtype if last else dtype,
        )
    return current


def gram_steps(
    kernels: Kernels,
    x: Tensor,  # (8, 64, 4096)
    rows: tuple[tuple[float, ...], ...],
    *,
    alpha: Scalar = 1.0,
    scale: Scalar = 1.0,
) -> tuple[Tensor, float]:
    """``run_steps`` for the Gram matrix ``alpha * x x^T``, in one kernel where a backend has it.

    The arguments and the result are those of ``run_steps``.
    """
    supported = getattr(kernels, "supports_gram_space", None)
    few_terms = all(len(row) in (2, 3, 5) for row in rows)
    if supported is not None and few_terms and supported(x.shape[-2], x.dtype):
        fused: tuple[Tensor, float] = getattr(kernels, "gram_space")(  # noqa: B009
            x, rows, alpha=alpha, scale=scale
        )
        return fused
    return run_steps(kernels, kernels.gram(x, alpha=alpha), rows, scale)


def run_steps(
    kernels: Kernels,
    matrix: Tensor,  # (8, 1024, 1024)
    rows: tuple[tuple[float, ...], ...],
    scale: Scalar = 1.0,
) -> tuple[Tensor, float]:
    """The factor ``F + shift * I`` by which some steps without a restart multiply ``X``.

    Args:
        kernels: The backend.
        matrix: ``(batch, n, n)``, the Gram matrix divided by ``scale``.
        rows: The steps' coefficients.
        scale: Folded into the first step's products.

    Returns:
        ``F`` of shape ``(batch, n, n)``, and ``shift``: the first ``a`` if there is one step, and 0
        otherwise.
    """
    product = kernels.symmetric
    total = factor = step_factor(kernels, matrix, rows[0], scale)
    if len(rows) == 1:
        return factor, slope(rows[0])
    for before, row in pairwise(rows):
        a = slope(before)
        half = product(matrix, factor, alpha=scale, c=matrix, beta=a * scale)
        matrix, scale = product(factor, half, c=half, beta=a), 1.0
        if total is factor:  # in the first step, whose factor nothing else reads from here on
            add_identity(total, a)
        factor = step_factor(kernels, matrix, row)
        total = product(total, factor, c=total, beta=slope(row))
    return total, 0.0


def run_ordered(
    kernels: Kernels,
    matrix: Tensor,  # (8, 1024, 1024)
    rows: tuple[tuple[float, ...], ...],
    scale: Scalar = 1.0,
    square: Square | None = None,
) -> tuple[Tensor, float]:
    """The factor ``F + shift * I`` by which some steps multiply ``X``, stable without a restart.

    Rounded matrices do not commute. A product that is forced to be symmetric mixes the directions
    that it should annihilate with those that it should not, and the following steps amplify that.
    Here the products with one small and one large factor are full ones, the small factor on the
    left, and the identity in ``F`` stays apart, since rounding its large multiple would drown the
    rest.

    Args:
        kernels: The backend.
        matrix: ``(batch, n, n)``, the Gram matrix divided by ``scale``; overwritten if there are
            several steps.
        rows: The steps' coefficients.
        scale: Folded into the first step's products.
        square: The square of ``matrix``, if known; overwritten.

    Returns:
        ``F`` of shape ``(batch, n, n)``, not exactly symmetric, and ``shift``.
    """
    total = factor = step_factor(kernels, matrix, rows[0], scale, square)
    shift = slope(rows[0])
    for before, row in pairwise(rows):
        a = slope(before)
        half = kernels.product(matrix, factor, alpha=scale, c=matrix, beta=a * scale)
        matrix, scale = kernels.symmetric(factor, half, c=half, beta=a, out=matrix), 1.0
        del half, factor  # their memory is for the next step's
        factor = step_factor(kernels, matrix, row)
        a = slope(row)
        total = kernels.product(factor, total, c=total, beta=a, shift=shift)
        shift *= a
    return total, shift
