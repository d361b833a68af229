"""The reference backend: plain torch operations, on any device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Scalar, column, is_number

_HALF = (torch.float16, torch.bfloat16)
_INEXACT = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
_CUBLAS_WIDENS = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None


_lock = threading.Lock()
_switched_off: list[str] = []
_num_inside = 0


@contextmanager
def exact_sums() -> Iterator[None]:
    """cuBLAS adds half products in fp32; by default it may add parts of a sum in fp16.

    The switches are the process's: the first thread that enters turns them off, and the last one
    that leaves turns on again what was on.
    """
    global _num_inside
    matmul = torch.backends.cuda.matmul
    with _lock:
        if _num_inside == 0:
            _switched_off[:] = [name for name in _INEXACT if getattr(matmul, name, False)]
            for name in _switched_off:
                setattr(matmul, name, False)
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0:
                for name in _switched_off:
                    setattr(matmul, name, True)


class TorchKernels:
    """``interface.Kernels`` on torch operations.

    Half products are rounded once, as tensor cores do: on the CPU they are computed in fp32, which
    is faster there than torch's half kernels, and on CUDA by cuBLAS.
    """

    name = "torch"

    def normalize(
        self, x: Tensor, *, dtype: torch.dtype, transpose: bool, scale: Scalar = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See ``interface.Kernels.normalize``; in float64 throughout if ``dtype`` is float64."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        largest = x.abs().amax(dim=(-2, -1), keepdim=True)
        # Divided in x's own dtype where that has the wider range, then squared without overflow.
        wide = torch.promote_types(x.dtype, work)
        largest = largest.to(wide)
        safe = torch.where(largest > 0, largest, 1)
        unit = (x.to(wide) / safe).to(work).contiguous()
        norm = torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True)
        factor = torch.where(norm > 0, column(scale) / norm, 0).to(work)
        result = (unit * factor).to(dtype)
        norms = (norm.to(wide) * safe).float().flatten()
        return (result.mT.contiguous() if transpose else result), norms

    def inverse_norms(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """See ``interface.Kernels.inverse_norms``."""
        norms = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64)
        return torch.where(norms == 0, 0, scale / norms).float()

    def sketch(self, signs: Tensor, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """See ``interface.Kernels.sketch``."""
        inverse = self.inverse_norms(x, scale=scale)
        return self.product(signs.expand(len(x), -1, -1), x, alpha=inverse), inverse

    def gram(self, x: Tensor, *, alpha: Scalar = 1.0, out: Tensor | None = None) -> Tensor:
        """See ``interface.Kernels.gram``."""
        return self.symmetric(x, x.mT, alpha=alpha, out=out)

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
        """See ``interface.Kernels.symmetric``; the lower triangle is computed and mirrored."""
        result = _combine(a, b, alpha, c, beta, a.dtype)
        if not is_number(gamma) or gamma != 0.0:
            result.diagonal(dim1=-2, dim2=-1)[:, None].add_(column(gamma))
        lower = result.tril()
        return _deliver(lower + lower.tril(-1).mT, a.dtype, out)

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
        """See ``interface.Kernels.product``."""
        if column_scale is not None:
            a = (a * column_scale[:, None, :]).to(a.dtype)
        final = out.dtype if out is not None else dtype or x.dtype
        result = _combine(a, x, alpha, c, beta, final if shift == 0.0 else torch.float32)
        if shift != 0.0:
            result = result + a.to(result.dtype) * column(alpha * shift)
        if transpose:
            result = result.mT.contiguous()
        return _deliver(result, dtype or x.dtype, out)


@exact_sums()
def _combine(
    a: Tensor, b: Tensor, alpha: Scalar, c: Tensor | None, beta: Scalar, dtype: torch.dtype
) -> Tensor:
    """``alpha * a b + beta * c``: of half operands in fp32, unless cuBLAS rounds ``a b`` itself.

    Rounding a product before it is added to would be felt where most of a sum cancels; on an H200,
    torch.baddbmm did that.
    """
    if a.dtype in _HALF:
        alone = a.dtype == b.dtype == dtype and c is None and is_number(alpha) and alpha == 1.0
        if not (a.is_cuda and alone):
            result = _wide_product(a, b)
            if not is_number(alpha) or alpha != 1.0:
                result *= column(alpha)
            return result if c is None else result + c.float() * column(beta)
    if c is not None and is_number(alpha) and is_number(beta):
        return torch.baddbmm(c.to(a.dtype), a, b, beta=beta, alpha=alpha)
    result = torch.bmm(a, b)
    if not is_number(alpha) or alpha != 1.0:
        result = result.to(torch.promote_types(result.dtype, torch.float32)) * column(alpha)
    return result if c is None else result + c * column(beta)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of half operands in fp32."""
    if a.is_cuda and a.dtype == b.dtype and _CUBLAS_WIDENS:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _deliver(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """``result`` rounded to ``dtype``, in ``out`` where that is given."""
    return result.to(dtype) if out is None else out.copy_(result)
