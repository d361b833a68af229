"""One Newton-Schulz step in Gram space: the polynomial that multiplies ``X``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from flashns_dist.orthogonalize.coefficients import slope
from flashns_dist.orthogonalize.kernels.combine import combine
from flashns_dist.orthogonalize.kernels.interface import (
    Kernels,
    Multiple,
    Scalar,
    column,
    is_number,
)


@dataclass(frozen=True)
class Square:
    """The square of ``R = scale * gram`` that a bound has computed already, over ``weight``.

    Attributes:
        matrix: ``(batch, n, n)``.
        weight: ``(batch,)`` fp32: ``R^2 = weight * matrix``.
    """

    matrix: Tensor
    weight: Tensor


def step_factor(
    kernels: Kernels,
    gram: Tensor,  # (8, 1024, 1024)
    row: tuple[float, ...],
    scale: Scalar = 1.0,
    square: Square | None = None,
) -> Tensor:
    """``Z = h(R) - a I`` for ``R = scale * gram``, where a step maps ``X`` to ``h(R) X``.

    ``a = h(0)`` is ``slope(row)``. It stays apart because ``Z`` is small in the directions of small
    singular values, and there ``a I + Z`` would lose what half precision could keep.

    Args:
        kernels: The backend.
        gram: ``(batch, n, n)``, symmetric.
        row: A row of ``Coefficients``: degree 3, 5, 9 or 17, at a cost of none, one, two or three
            symmetric products. Degree 9 completes the square, ``h(R) = e Y^2 + q R + const`` with
            ``Y = R^2 + p R + g I``.
        scale: Per-matrix factor, folded into the products.
        square: If given, the first product becomes one pass over ``gram`` and this, which is
            overwritten.

    Returns:
        ``(batch, n, n)``, symmetric, in the dtype of ``gram``.
    """

    def squared(
        matrix: Tensor, alpha: float, beta: float, gamma: float, *, out: Tensor | None = None
    ) -> Tensor:
        """``alpha T^2 + beta R + gamma I`` for ``T = R`` if ``matrix`` is ``gram``."""
        if matrix is not gram:
            return kernels.symmetric(
                matrix, matrix, alpha=alpha, c=gram, beta=beta * scale, gamma=gamma, out=out
            )
        if square is not None:
            return combine(
                kernels,
                square.matrix,
                gram,
                alpha=Multiple(square.weight, alpha),
                beta=beta * scale,
                gamma=gamma,
                out=square.matrix,
            )
        weight = alpha * scale * scale
        return kernels.symmetric(gram, gram, alpha=weight, c=gram, beta=beta * scale, gamma=gamma)

    if len(row) == 2:
        return scaled(gram, row[1] * scale)
    if len(row) == 3:
        return squared(gram, row[2], row[1], 0.0)
    if len(row) == 5:
        _, b, c, d, e = row
        p = d / (2 * e)
        g = (c / e - p * p) / 2
        y = squared(gram, 1.0, p, g)
        return squared(y, e, b - 2 * e * p * g, -e * g * g)
    first = squared(gram, *row[0:3])
    second = squared(first, *row[3:6])
    return squared(second, row[6], row[7], row[8] - slope(row), out=first)


def scaled(matrix: Tensor, factor: Scalar) -> Tensor:
    """``factor * matrix`` in the dtype of ``matrix``."""
    return matrix * factor if is_number(factor) else (matrix * column(factor)).to(matrix.dtype)


def add_identity(matrix: Tensor, value: float) -> Tensor:
    """Adds ``value * I`` to ``matrix``, in place, and returns it."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrix


def entry_scale(n: int, m: int) -> float:
    """What to multiply an ``n x m`` matrix of norm one with, so that its entries are about one.

    A matrix of Frobenius norm one has entries of ``1 / sqrt(n m)``, which float16 cannot hold
    exactly below 6e-5: ``n m`` above 2.7e8. Capped so that no entry exceeds float16's range.
    """
    return min(math.sqrt(n * m), 2.0**14)
