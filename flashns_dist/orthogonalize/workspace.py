"""How much memory an orthogonalization takes: the iteration itself, on tensors without data."""

from __future__ import annotations

import weakref
from functools import lru_cache

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import Coefficients, resolve_coefficients
from flashns_dist.orthogonalize.cost import choose_method
from flashns_dist.orthogonalize.kernels.interface import Scalar
from flashns_dist.orthogonalize.methods import check_coefficients, find_method


@lru_cache(maxsize=4096)
@torch.no_grad()
def workspace_bytes(
    method: str,
    n: int,
    m: int,
    coefficients: Coefficients | str | None = None,
    dtype: torch.dtype = torch.float16,
    input_dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that are allocated at the peak, per matrix of a batch, its result included.

    That of Triton's kernels, which allocate nothing but results; cuBLAS and torch may take more.
    What has one number per matrix, or fewer than 64 rows, is not counted.

    Args:
        method: As in ``orthogonalize``.
        n: Rows.
        m: Columns.
        coefficients: As in ``orthogonalize``.
        dtype: Of the iteration.
        input_dtype: Of the matrix, and of the result.

    Raises:
        ValueError: If the method or the coefficients are unknown, or do not fit each other.
    """
    name = method
    if method == "auto":
        name = choose_method(n, m, coefficients, dtype)
    algorithm = find_method(name)
    chosen = algorithm.default_for(dtype)
    if coefficients is not None:
        chosen = resolve_coefficients(coefficients, find_method(name).default)
    check_coefficients(name, chosen)
    kernels = _Sizes()
    x = torch.empty(1, n, m, dtype=input_dtype, device="meta")
    algorithm.iteration(kernels, x, chosen, dtype=dtype, transpose=n > m)
    return kernels.peak


class _Sizes:
    """``kernels.interface.Kernels`` whose results have a shape only, and are counted.

    Attributes:
        live: Bytes of the results that are still referred to.
        peak: The most that they have been.
    """

    name = "sizes"

    def __init__(self) -> None:
        self.live = self.peak = 0

    def normalize(
        self, x: Tensor, *, dtype: torch.dtype, transpose: bool, scale: Scalar = 1.0
    ) -> tuple[Tensor, Tensor]:
        shape = x.mT.shape if transpose else x.shape
        return self._new(*shape, dtype=dtype), torch.empty(len(x), device="meta")

    def inverse_norms(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return torch.empty(len(x), device="meta")

    def gram(self, x: Tensor, *, alpha: Scalar = 1.0, out: Tensor | None = None) -> Tensor:
        return self._result(out, len(x), x.shape[1], x.shape[1], dtype=x.dtype)

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
        return self._result(out, len(a), a.shape[1], a.shape[1], dtype=a.dtype)

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
        scaled = None if column_scale is None else self._new(*a.shape, dtype=a.dtype)
        size = (x.shape[2], a.shape[1]) if transpose else (a.shape[1], x.shape[2])
        result = self._result(out, len(a), *size, dtype=dtype or x.dtype)
        del scaled
        return result

    def combine(
        self,
        a: Tensor,
        b: Tensor,
        *,
        alpha: Scalar = 1.0,
        beta: Scalar = 1.0,
        gamma: Scalar = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        return self._result(out, *a.shape, dtype=a.dtype)

    def _result(self, out: Tensor | None, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._new(*shape, dtype=dtype) if out is None else out

    def _new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        result = torch.empty(shape, dtype=dtype, device="meta")
        self.live += result.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(result, self._free, result.nbytes)
        return result

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


__all__ = ["workspace_bytes"]
