"""The products that an orthogonalization consists of, as one small interface.

Every backend (torch, Triton, quack) provides the same four operations. ``torch`` is the reference
that the others are checked against. All tensors are batched: ``x`` is ``(batch, n, m)`` with
``n <= m``, Gram-space matrices are ``(batch, n, n)`` and symmetric. Scalars may be Python floats,
fp32 tensors of shape ``(batch,)`` (one per matrix), or a ``Multiple`` of such a tensor. Products
accumulate in fp32 and round once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypedDict, TypeGuard

import torch
from torch import Tensor


@dataclass(frozen=True)
class Multiple:
    """A number times one number per matrix, multiplied where kernels read it: no launch of its own.

    Attributes:
        each: ``(batch,)`` fp32, or fp64.
        factor: The number.
    """

    each: Tensor
    factor: float = 1.0

    def __mul__(self, other: Scalar) -> Multiple:
        if isinstance(other, Multiple):
            return Multiple(self.each * other.each, self.factor * other.factor)
        if isinstance(other, Tensor):
            return Multiple(self.each * other, self.factor)
        return Multiple(self.each, self.factor * other)

    __rmul__ = __mul__

    def __truediv__(self, other: float) -> Multiple:
        return Multiple(self.each, self.factor / other)

    def tensor(self) -> Tensor:
        """The values, ``(batch,)``."""
        return self.each * self.factor if self.factor != 1.0 else self.each


Scalar: TypeAlias = float | Tensor | Multiple


def is_number(scalar: Scalar | None) -> TypeGuard[float]:
    """Whether a scalar is the same for all matrices, and known on the host."""
    return not isinstance(scalar, Tensor | Multiple)


def column(scalar: Scalar) -> float | Tensor:
    """A scalar shaped to broadcast over ``(batch, n, m)``."""
    values = scalar.tensor() if isinstance(scalar, Multiple) else scalar
    return values[:, None, None] if isinstance(values, Tensor) else values


class SymmetricOptions(TypedDict, total=False):
    """The keywords of ``Kernels.symmetric``, for who hands them on."""

    alpha: Scalar
    c: Tensor | None
    beta: Scalar
    gamma: Scalar
    out: Tensor | None


class ProductOptions(TypedDict, total=False):
    """The keywords of ``Kernels.product``, for who hands them on."""

    alpha: Scalar
    c: Tensor | None
    beta: Scalar
    shift: float
    column_scale: Tensor | None
    transpose: bool
    dtype: torch.dtype | None
    out: Tensor | None


class Kernels(Protocol):
    """One backend. Methods allocate their result unless ``out`` is given; inputs never change."""

    name: str

    def normalize(
        self, x: Tensor, *, dtype: torch.dtype, transpose: bool, scale: Scalar = 1.0
    ) -> tuple[Tensor, Tensor]:
        """``x * scale / ||x||_F`` in ``dtype``, transposed if asked, and the norms ``(batch,)``.

        The norms are fp32, taken without overflow or underflow for any finite input; a zero matrix
        stays zero. Reads ``x`` from memory once where it can.
        """
        ...

    def inverse_norms(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """``scale / ||x||_F`` of each matrix, ``(batch,)`` fp32; zero for a zero matrix.

        For norms between 1e-35 and 1e35: beyond, it is what fp32 holds of it.
        """
        ...

    def sketch(self, signs: Tensor, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """``signs x`` times ``scale / ||x||_F`` of each matrix, in the dtype of ``x``, and these.

        ``signs`` is ``(1, k, n)``, of the same dtype. For what norms, see ``inverse_norms``. Reads
        ``x`` once where it can.
        """
        ...

    def gram(self, x: Tensor, *, alpha: Scalar = 1.0, out: Tensor | None = None) -> Tensor:
        """``alpha * x x^T`` (exactly symmetric)."""
        ...

    def symmetric(
        self,
        a: Tensor,
        b: Tensor,
        *,
        alpha: Scalar = 1.0,
        c: Tensor | None = None,
        beta: Scalar = 0.0,
        gamma: Scalar = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """``alpha * a b + beta * c + gamma * I``, exactly symmetric.

        ``a`` and ``b`` commute in exact arithmetic (polynomials of one Gram matrix), so that the
        product is symmetric and only half of its tiles need computing. A tensor that is given as
        both is symmetric itself.
        """
        ...

    def product(
        self,
        a: Tensor,
        x: Tensor,
        *,
        alpha: Scalar = 1.0,
        c: Tensor | None = None,
        beta: Scalar = 0.0,
        shift: float = 0.0,
        column_scale: Tensor | None = None,
        transpose: bool = False,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``alpha * (a diag(column_scale)) (x + shift I) + beta * c``, written transposed if asked.

        A ``shift`` is for square ``x``; what it adds is neither rounded nor computed apart.

        ``column_scale`` is ``(batch, n)`` fp32, the row scale of an AOL preconditioner folded into
        the last product. ``dtype`` is the output's (default: ``x.dtype``).
        """
        ...
