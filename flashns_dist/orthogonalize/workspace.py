"""How much memory an orthogonalization takes: the iteration itself, on tensors without data."""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import Coefficients, resolve_coefficients
from flashns_dist.orthogonalize.cost import choose_method
from flashns_dist.orthogonalize.kernels.interface import ProductOptions, Scalar, SymmetricOptions
from flashns_dist.orthogonalize.methods import check_coefficients, find_method

if TYPE_CHECKING:
    from typing_extensions import Unpack


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

    def sketch(self, signs: Tensor, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        size = (len(x), signs.shape[1], x.shape[2])
        is_bfloat16 = x.dtype == torch.bfloat16
        raw = self._new(*size, dtype=x.dtype if is_bfloat16 else torch.float32)
        result = self._new(*size, dtype=x.dtype)
        del raw
        return result, self.inverse_norms(x)

    def gram(self, x: Tensor, *, alpha: Scalar = 1.0, out: Tensor | None = None) -> Tensor:
        return self._result(out, len(x), x.shape[1], x.shape[1], dtype=x.dtype)

    def symmetric(self, a: Tensor, b: Tensor, **options: Unpack[SymmetricOptions]) -> Tensor:
        return self._result(options.get("out"), len(a), a.shape[1], a.shape[1], dtype=a.dtype)

    def product(self, a: Tensor, x: Tensor, **options: Unpack[ProductOptions]) -> Tensor:
        scaled = None
        if options.get("column_scale") is not None:
            scaled = self._new(*a.shape, dtype=a.dtype)
        size = (a.shape[1], x.shape[2])
        size = size[::-1] if options.get("transpose") else size
        dtype = options.get("dtype") or x.dtype
        result = self._result(options.get("out"), len(a), *size, dtype=dtype)
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
