"""The quack backend: CuTe DSL products for Hopper and Blackwell, if quack-kernels is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import (
    Kernels,
    ProductOptions,
    Scalar,
    SymmetricOptions,
    is_number,
)
from flashns_dist.orthogonalize.kernels.strides import described
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HALF = (torch.float16, torch.bfloat16)
_NEEDED = ("gemm", "gemm_add", "gemm_symmetric")
# quack computes symmetric results in squares of this size, of which it mirrors all but those on the
# diagonal.
_DIAGONAL_BLOCK = 256


@cache
def unavailable(device_index: int | None = None) -> str | None:
    """Why quack cannot be used on a CUDA device, or None if it can."""
    if importlib.util.find_spec("quack") is None:
        return "quack-kernels is not installed (pip install 'flashns-dist[quack]')"
    if not torch.cuda.is_available():
        return "quack needs a CUDA device"
    major, _ = torch.cuda.get_device_capability(device_index)
    if major not in (9, 10, 11):
        return f"quack is used on compute capability 9, 10 and 11 only, and this is {major}"
    try:
        interface = importlib.import_module("quack.gemm_interface")
    except Exception as error:  # a DSL version that quack does not fit raises all sorts of things
        return f"quack.gemm_interface cannot be imported ({type(error).__name__}: {error})"
    missing = [name for name in _NEEDED if not hasattr(interface, name)]
    if missing:
        return f"this quack-kernels has no gemm_interface.{', '.join(missing)}: use 0.5 or later"
    return None


class QuackKernels:
    """``interface.Kernels`` on quack's GEMMs; see there for what each method computes.

    What quack does not offer goes to the Triton backend where that can be imported, and to torch
    otherwise: normalization, column scales, multiples of the identity, scalars that differ by
    matrix, fp32, and layouts that bulk copies cannot express.

    Raises:
        ImportError: If quack cannot be used here, with the reason.
    """

    name = "quack"

    def __init__(self) -> None:
        reason = unavailable()
        if reason is not None:
            raise ImportError(reason)
        self._quack: Any = importlib.import_module("quack.gemm_interface")
        self._other, self._mirror = _others()

    def normalize(
        self, x: Tensor, *, dtype: torch.dtype, transpose: bool, scale: Scalar = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See ``interface.Kernels.normalize``."""
        return self._other.normalize(x, dtype=dtype, transpose=transpose, scale=scale)

    def inverse_norms(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """See ``interface.Kernels.inverse_norms``."""
        return self._other.inverse_norms(x, scale=scale)

    def sketch(self, signs: Tensor, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """See ``interface.Kernels.sketch``."""
        return self._other.sketch(signs, x, scale=scale)

    def gram(self, x: Tensor, *, alpha: Scalar = 1.0, out: Tensor | None = None) -> Tensor:
        """See ``interface.Kernels.gram``."""
        if not is_number(alpha) or not _fits(x, out) or x.numel() == 0:
            return self._other.gram(x, alpha=alpha, out=out)
        # x x^T is symmetric as computed: an entry and its mirror image add the same products.
        result: Tensor = self._quack.gemm_symmetric(x, x.mT, out=out, alpha=float(alpha))
        return result

    def symmetric(self, a: Tensor, b: Tensor, **options: Unpack[SymmetricOptions]) -> Tensor:
        """See ``interface.Kernels.symmetric``."""
        alpha, beta, gamma = (
            options.get("alpha", 1.0),
            options.get("beta", 0.0),
            options.get("gamma"),
        )
        c, out = options.get("c"), options.get("out")
        plain = is_number(gamma) and not gamma and _fits(a, b, c, out) and a.numel() > 0
        if not (plain and is_number(alpha) and is_number(beta)):
            return self._other.symmetric(a, b, **options)
        result: Tensor = self._quack.gemm_symmetric(
            a, b, C=c, out=out, alpha=float(alpha), beta=float(beta)
        )
        if not _same(a, b):  # a symmetric matrix's square is symmetric as computed
            self._mirror(result, _DIAGONAL_BLOCK)
        return result

    def product(self, a: Tensor, x: Tensor, **options: Unpack[ProductOptions]) -> Tensor:
        """See ``interface.Kernels.product``."""
        alpha, beta = options.get("alpha", 1.0), options.get("beta", 0.0)
        c, out, dtype = options.get("c"), options.get("out"), options.get("dtype") or x.dtype
        scaled = options.get("column_scale") is not None or options.get("shift", 0.0) != 0.0
        plain = dtype in _HALF and not scaled and _fits(a, x, c, out) and x.numel() > 0
        if not (plain and is_number(alpha) and is_number(beta)):
            return self._other.product(a, x, **options)
        # (a x)^T = x^T a^T: a transposed result costs nothing.
        transpose = options.get("transpose", False)
        left, right = (x.mT, a.mT) if transpose else (a, x)
        given: dict[str, Any] = {
            "out": out,
            "alpha": float(alpha),
            "out_dtype": dtype,
            "tuned": False,
        }
        result: Tensor
        if c is None or beta == 0.0:
            result = self._quack.gemm(left, right, **given)
        else:
            third = c.mT if transpose else c
            result = self._quack.gemm_add(left, right, third, beta=float(beta), **given)
        return result


def mirror_diagonal_blocks(matrix: Tensor, block: int) -> None:
    """Copies the lower triangle of each square on the diagonal over its upper one, in place.

    Args:
        matrix: ``(batch, n, n)``, symmetric outside the squares of size ``block``.
        block: Their size; the last one may be smaller.
    """
    for begin in range(0, matrix.shape[-1], block):
        square = matrix[:, begin : begin + block, begin : begin + block]
        lower = square.tril()
        square.copy_(lower + lower.tril(-1).mT)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are the same memory, read the same way."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _fits(first: Tensor, *others: Tensor | None) -> bool:
    """Whether quack takes these operands: 16-bit, with 16-byte aligned rows or columns."""
    if first.dtype not in _HALF or first.device.type != "cuda":
        return False
    return all(
        t is None or (t.dtype == first.dtype and described(t) is not None) for t in (first, *others)
    )


def _others() -> tuple[Kernels, Callable[[Tensor, int], None]]:
    """What computes everything else, and what mirrors squares on the diagonal."""
    if importlib.util.find_spec("triton") is None:
        return TorchKernels(), mirror_diagonal_blocks
    prefix = "flashns_dist.orthogonalize.kernels"
    kernels: Kernels = importlib.import_module(f"{prefix}.triton_backend").TritonKernels()
    return kernels, importlib.import_module(f"{prefix}.triton_passes").launch_mirror
