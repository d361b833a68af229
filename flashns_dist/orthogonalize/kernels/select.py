"""Choosing a backend: a fixed rule, or for each product what was measured to be fastest."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Hashable
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
from flashns_dist.orthogonalize.kernels.recording import active_recorder
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels, exact_sums
from flashns_dist.orthogonalize.kernels.tuning import (
    TuningCache,
    batch_bucket,
    fastest,
    tuning_requested,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HALF = (torch.float16, torch.bfloat16)
_RECORDED = ("triton", "torch")
# What another member has to gain over the first: it may only have handed the product on.
ADVANTAGE = 0.02
# How long a member runs to be measured, where a product takes the first one so long that it brings
# the device to its power limit: an H200 ranks the same kernels otherwise in short bursts, by 2 to
# 5 %, than kept busy.
SUSTAINED_SECONDS = 0.1
LONG_SECONDS = 1e-4


def choose(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> str | SelectedKernels:
    """What ``backend="auto"`` means on a device.

    Triton for float16 and bfloat16 on compute capability 8.0 and later, torch otherwise. On Hopper
    and Blackwell single products go to cuBLAS or quack where a measurement that is on disk says
    that these are faster (see ``SelectedKernels``).

    Args:
        device: Where the matrices are.
        shape: ``(batch, n, m)`` with ``n <= m``.
        dtype: Of the iteration.

    Returns:
        The name of a backend, or one that combines several.
    """
    del shape
    if device.type != "cuda" or dtype not in _HALF:
        return "torch"
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _for_device(index)


@cache
def _for_device(index: int) -> str | SelectedKernels:
    major, _ = torch.cuda.get_device_capability(index)
    if major < 8 or importlib.util.find_spec("triton") is None:
        if major >= 8:
            warnings.warn(
                "Triton is not installed: orthogonalize falls back to torch, which computes "
                "symmetric products in full. Install flashns-dist[triton].",
                stacklevel=2,
            )
        return "torch"
    from flashns_dist.orthogonalize.kernels import load_backend
    from flashns_dist.orthogonalize.kernels.quack_backend import unavailable

    members: dict[str, Kernels] = {"triton": load_backend("triton"), "torch": CublasKernels()}
    if unavailable(index) is None:
        members["quack"] = load_backend("quack")
    return SelectedKernels(members)


class CublasKernels(TorchKernels):
    """``TorchKernels``, with ``alpha`` and ``out`` handed to cuBLAS where it takes them."""

    def product(self, a: Tensor, x: Tensor, **options: Unpack[ProductOptions]) -> Tensor:
        """See ``interface.Kernels.product``."""
        alpha, out = options.get("alpha", 1.0), options.get("out")
        if not is_number(alpha) or not _alone(options) or _result_dtype(x, options) != a.dtype:
            return super().product(a, x, **options)
        if out is None:
            out = x.new_empty((a.shape[0], a.shape[1], x.shape[2]))
        with exact_sums():  # With beta = 0 the first operand is not read.
            return torch.baddbmm(out, a, x, beta=0, alpha=alpha, out=out)


class SelectedKernels:
    """Each product from the member that was measured to be fastest for its problem.

    A problem is a product, what is added to it, its shape, the batch rounded up to a power of two,
    the dtype and the device. A choice is read from the disk cache; a problem that is not there is
    measured if ``$FLASHNS_DIST_TUNE`` asks for it. Otherwise it goes to the first member, or to
    ``"torch"`` if it is ``a x`` alone, neither added to nor transposed nor converted: with those on
    cuBLAS the Gram iteration was 1.01 to 1.33 times as fast at eleven shapes on an H200 ("gram
    iteration" in docs/benchmarks/kernels-h200.jsonl, from CUDA graphs). Members differ in the last
    bits (cuBLAS and quack add in an order of their own), so that ranks that must agree bitwise must
    share one cache, or measure nothing.

    Args:
        members: Backends by name; the first is the default, and carries everything that is not
            chosen: normalization, and products whose scalars differ by matrix.
        tune: Whether to measure; None asks the environment.
        cache: Where choices are kept.
    """

    name = "auto"

    def __init__(
        self,
        members: dict[str, Kernels],
        *,
        tune: bool | None = None,
        cache: TuningCache | None = None,
    ) -> None:
        self._members = members
        self._default = next(iter(members.values()))
        self._tune = tune
        self._cache = cache if cache is not None else TuningCache()
        self._settled: dict[Hashable, Kernels] = {}

    def normalize(
        self, x: Tensor, *, dtype: torch.dtype, transpose: bool, scale: Scalar = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See ``interface.Kernels.normalize``."""
        return self._default.normalize(x, dtype=dtype, transpose=transpose, scale=scale)

    def inverse_norms(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """See ``interface.Kernels.inverse_norms``."""
        return self._default.inverse_norms(x, scale=scale)

    def sketch(self, signs: Tensor, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """See ``interface.Kernels.sketch``."""
        return self._default.sketch(signs, x, scale=scale)

    def gram(self, x: Tensor, *, alpha: Scalar = 1.0, out: Tensor | None = None) -> Tensor:
        """See ``interface.Kernels.gram``."""

        def call(kernels: Kernels) -> Tensor:
            return kernels.gram(x, alpha=alpha, out=out)

        return self._run("gram", x, x.shape[2], (alpha,), call)

    def symmetric(self, a: Tensor, b: Tensor, **options: Unpack[SymmetricOptions]) -> Tensor:
        """See ``interface.Kernels.symmetric``."""

        def call(kernels: Kernels) -> Tensor:
            return kernels.symmetric(a, b, **options)

        gamma = options.get("gamma", 0.0)
        scalars = (options.get("alpha"), options.get("beta"), gamma)
        added = "" if options.get("c") is None else "_c"
        shifted = "_i" if is_number(gamma) and gamma != 0.0 else ""
        kind = f"symmetric{added}{shifted}"
        return self._run(kind, a, a.shape[2], scalars, call)

    def product(self, a: Tensor, x: Tensor, **options: Unpack[ProductOptions]) -> Tensor:
        """See ``interface.Kernels.product``."""

        def call(kernels: Kernels) -> Tensor:
            return kernels.product(a, x, **options)

        scalars = (options.get("alpha"), options.get("beta"), options.get("column_scale"))
        turned = "t" if options.get("transpose") else "n"
        added = "" if options.get("c") is None else "c"
        shifted = "s" if options.get("shift") else ""
        kind = f"product_{turned}{added}{shifted}_{str(_result_dtype(x, options))[6:]}"
        return self._run(kind, a, x.shape[2], scalars, call)

    def __getattr__(self, name: str) -> Any:
        # Optional extras, such as gram_space, are the default member's.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._default, name)

    def _run(
        self,
        kind: str,
        a: Tensor,
        m: int,
        scalars: tuple[Scalar | None, ...],
        call: Callable[[Kernels], Tensor],
    ) -> Tensor:
        if torch.compiler.is_compiling() or not all(map(is_number, scalars)):
            return call(self._default)
        if a.numel() == 0 or a.dtype not in _HALF:
            return call(self._default)
        key = (kind, a.shape, m, a.dtype, a.get_device())
        settled = self._settled.get(key)
        if settled is None:
            settled, final = self._choose(kind, a, m, call)
            if final:
                self._settled[key] = settled
        recorder = active_recorder()
        if recorder is not None and settled.name not in _RECORDED:
            recorder.is_foreign = True  # nobody hears of its launches
        return call(settled)

    def _choose(
        self, kind: str, a: Tensor, m: int, call: Callable[[Kernels], Tensor]
    ) -> tuple[Kernels, bool]:
        """The member for a problem, and whether that holds for the next call too."""
        batch, n, k = a.shape
        problem = (
            f"select-{'+'.join(self._members)}-{kind}-{n}x{k}x{m}-b{batch_bucket(batch)}"
            f"-{str(a.dtype)[6:]}-{_device_name(a)}"
        )
        choice = self._cache.lookup(problem)
        if choice is None:
            wanted = tuning_requested() if self._tune is None else self._tune
            if wanted and a.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._default, False
            if wanted:
                choice = self._measure(problem, kind, call)
        if choice is None and a.is_cuda and kind == f"product_n_{str(a.dtype)[6:]}":
            choice = "torch"
        return self._members.get(str(choice), self._default), True

    def _measure(self, problem: str, kind: str, call: Callable[[Kernels], Tensor]) -> str:
        # torch has no symmetric product to offer: it computes and writes the whole square.
        skipped = () if kind.startswith("product") else ("torch",)
        calls = {
            name: _bind(call, member)
            for name, member in self._members.items()
            if name not in skipped
        }
        # Launches of the others are not repeated by a recording: on the host each of them takes
        # longer than a short product takes the device.
        names = [name for name in calls if name in _RECORDED]
        best, seconds = fastest([(name, calls[name]) for name in names], advantage=ADVANTAGE)
        if min(seconds.values()) >= LONG_SECONDS and len(calls) > 1:
            names = list(calls)
            best, seconds = fastest(
                list(calls.items()), rounds=2, advantage=ADVANTAGE, seconds=SUSTAINED_SECONDS
            )
        self._cache.store(problem, names[best], seconds)
        return names[best]


def _alone(options: ProductOptions) -> bool:
    """Whether a product is neither added to, nor shifted, scaled by columns or transposed."""
    added = options.get("c") is not None or options.get("shift", 0.0) != 0.0
    return not (added or options.get("column_scale") is not None or options.get("transpose"))


def _result_dtype(x: Tensor, options: ProductOptions) -> torch.dtype:
    out = options.get("out")
    return out.dtype if out is not None else options.get("dtype") or x.dtype


def _bind(call: Callable[[Kernels], Tensor], kernels: Kernels) -> Callable[[], Tensor]:
    return lambda: call(kernels)


def _device_name(a: Tensor) -> str:
    return _cuda_name(a.get_device()) if a.is_cuda else a.device.type


@cache
def _cuda_name(index: int) -> str:
    return torch.cuda.get_device_name(index)
