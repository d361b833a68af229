"""The Triton backend: products at the machine's rate on NVIDIA GPUs, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Scalar
from flashns_dist.orthogonalize.kernels.strides import described
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels
from flashns_dist.orthogonalize.kernels.triton_configs import (
    TileConfig,
    default_product,
    default_symmetric,
    product_configs,
    symmetric_configs,
)
from flashns_dist.orthogonalize.kernels.triton_interpreter import interpreting, repair
from flashns_dist.orthogonalize.kernels.triton_launch import (
    TL_DTYPES,
    launch_product,
    launch_symmetric,
    precision,
)
from flashns_dist.orthogonalize.kernels.triton_normalize import (
    normalize_once_kernel,
    partial_norms_kernel,
    scale_kernel,
    scale_transpose_kernel,
)
from flashns_dist.orthogonalize.kernels.triton_product import scale_columns_kernel
from flashns_dist.orthogonalize.kernels.triton_small import gram_space_kernel
from flashns_dist.orthogonalize.kernels.tuning import (
    TuningCache,
    batch_bucket,
    fastest,
    tuning_requested,
)

if interpreting():
    repair()

# A matrix of at most this many (padded) entries is normalized by one program in one pass.
ONE_PASS_ENTRIES = 32768


@cache
def _device_facts(index: int) -> tuple[str, int, int]:
    """Name, compute capability's major number, and number of SMs of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.major, properties.multi_processor_count


class TritonKernels:
    """``interface.Kernels`` on Triton kernels; see there for what each method computes.

    Results do not depend on the configuration: for one problem all tile shapes, warp counts and
    ways of loading add the same products in the same order, so that ranks which chose differently
    still agree bitwise. They do not depend on the batch that a matrix is in, either.

    ``symmetric`` reads the lower triangle of ``c`` only. float16 and bfloat16 run on tensor cores;
    float32 in three tf32 passes there, for correctness rather than speed. A NaN stays in its
    matrix. All launches go to the current stream and can be captured in a CUDA graph; under
    torch.compile each method is one custom operator.

    Args:
        tune: Measure the few candidate configurations of a problem (kernel, shape, power-of-two
            batch bucket, dtype, device) at its first call and keep the choice on disk. None asks
            ``$FLASHNS_DIST_TUNE``. Without it a choice found on disk is used, or a fixed default.
        cache: Where choices are kept; a new ``TuningCache`` if None.
        descriptors: Load through tensor descriptors (TMA). None means where the device has them
            and strides allow; True is for tests in the interpreter.
        config: Force one configuration on every product; for tests and benchmarks.
    """

    name = "triton"

    def __init__(
        self,
        *,
        tune: bool | None = None,
        cache: TuningCache | None = None,
        descriptors: bool | None = None,
        config: TileConfig | None = None,
    ) -> None:
        self._tune = tune
        self._cache = cache if cache is not None else TuningCache()
        self._descriptors = descriptors
        self._config = config

    def normalize(
        self, x: Tensor, *, dtype: torch.dtype, transpose: bool, scale: Scalar = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See ``interface.Kernels.normalize``.

        One pass where a matrix fits one SM's registers, otherwise two, the second in reverse order
        so that it finds in L2 what the first read last. Matrices that are not contiguous rows or
        columns are copied first.
        """
        _check_dtype("normalize", dtype)
        if x.dtype == torch.float64:
            result, norms = TorchKernels().normalize(
                x, dtype=dtype, transpose=transpose, scale=scale
            )
            return result, norms
        batch, rows, cols = x.shape
        if not _packed(x):
            if _packed(x.mT):
                x, transpose, rows, cols = x.mT, not transpose, cols, rows
            else:
                x = x.contiguous()
        shape = (batch, cols, rows) if transpose else (batch, rows, cols)
        out = torch.empty(shape, dtype=dtype, device=x.device)
        norms = torch.empty(batch, dtype=torch.float32, device=x.device)
        if x.numel() == 0:
            return out, norms.zero_()
        if torch.compiler.is_compiling():
            each = scale if isinstance(scale, Tensor) else None
            torch.ops.flashns_dist.normalize(
                x, 1.0 if isinstance(scale, Tensor) else scale, each, transpose, out, norms
            )
        else:
            _run_normalize(x, scale, transpose, out, norms)
        return out, norms

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
        """See ``interface.Kernels.symmetric``."""
        _check_dtype("symmetric", a.dtype)
        batch, n, _ = a.shape
        if out is None:
            out = torch.empty((batch, n, n), dtype=a.dtype, device=a.device)
        if out.numel() == 0:
            return out
        if c is not None and not isinstance(beta, Tensor) and beta == 0.0:
            c = None
        if torch.compiler.is_compiling():
            numbers, tensors = _split((alpha, beta, gamma))
            torch.ops.flashns_dist.symmetric(a, b, c, numbers, tensors, out)
        else:
            self._symmetric(a, b.mT, c, alpha, beta, gamma, out)
        return out

    def product(
        self,
        a: Tensor,
        x: Tensor,
        *,
        alpha: Scalar = 1.0,
        c: Tensor | None = None,
        beta: Scalar = 0.0,
        column_scale: Tensor | None = None,
        transpose: bool = False,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See ``interface.Kernels.product``.

        ``column_scale`` is applied in a pass of its own over ``a``, whose result is rounded to
        ``a.dtype``.
        """
        _check_dtype("product", a.dtype)
        batch, n, _ = a.shape
        m = x.shape[2]
        if out is None:
            shape = (batch, m, n) if transpose else (batch, n, m)
            out = torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
        if out.numel() == 0:
            return out
        if c is not None and not isinstance(beta, Tensor) and beta == 0.0:
            c = None
        if torch.compiler.is_compiling():
            numbers, tensors = _split((alpha, beta))
            torch.ops.flashns_dist.product(a, x, c, column_scale, numbers, tensors, transpose, out)
        else:
            self._product(a, x, c, column_scale, alpha, beta, transpose, out)
        return out

    def supports_gram_space(self, n: int, dtype: torch.dtype) -> bool:
        """Whether ``gram_space`` takes matrices with ``n`` rows."""
        return n <= (64 if dtype == torch.float32 else 128)

    def gram_space(
        self,
        x: Tensor,  # (300, 64, 1024)
        rows: Sequence[Sequence[float]],
        *,
        alpha: Scalar = 1.0,
        scale: Scalar = 1.0,
    ) -> tuple[Tensor, float]:
        """All Gram-space work between two products with ``x``, in one kernel per matrix.

        Computes what ``gram.run_steps(kernels, kernels.gram(x, alpha=alpha), rows, scale)``
        computes, with the same intermediate roundings, without leaving the SM. An optional extra of
        this backend: methods use it where ``supports_gram_space`` says so.

        Args:
            x: ``(batch, n, m)`` with any strides.
            rows: Coefficients of the steps, each of degree 3, 5 or 9.
            alpha: The Gram matrix is ``alpha * x x^T``.
            scale: By how much the Gram matrix is multiplied in the first step's polynomial.

        Returns:
            ``(F, shift)``: the steps multiply ``x`` by ``F + shift * I``.

        Raises:
            ValueError: If ``n`` is too large, or a row has another number of coefficients.
        """
        batch, n, _ = x.shape
        steps = tuple(tuple(float(value) for value in row) for row in rows)
        if not self.supports_gram_space(n, x.dtype):
            raise ValueError(f"gram_space: n={n} is too large for {x.dtype}. Use run_steps.")
        if not steps or any(len(row) not in (2, 3, 5) for row in steps):
            raise ValueError(f"gram_space: {rows=} has a step that is not of degree 3, 5 or 9.")
        out = torch.empty((batch, n, n), dtype=x.dtype, device=x.device)
        shift = steps[0][0] if len(steps) == 1 else 0.0
        if out.numel() == 0:
            return out, shift
        if torch.compiler.is_compiling():
            numbers, tensors = _split((alpha, scale))
            lengths = [len(row) for row in steps]
            flat = [value for row in steps for value in row]
            torch.ops.flashns_dist.gram_space(x, flat, lengths, numbers, tensors, out)
        else:
            _run_gram_space(x, steps, alpha, scale, out)
        return out, shift

    def _symmetric(
        self,
        a: Tensor,
        bt: Tensor,
        c: Tensor | None,
        alpha: Scalar,
        beta: Scalar,
        gamma: Scalar,
        out: Tensor,
    ) -> None:
        if c is not None and described(c) is True:
            c = c.contiguous()
        tma = self._descriptors_usable(a, bt, c, out)
        batch, n, k = a.shape
        configs = symmetric_configs(a.dtype, tma)
        accuracy = precision(a.dtype, _has_tensor_cores(a))

        def launch(config: TileConfig) -> None:
            launch_symmetric(
                a, bt, c, out, alpha, beta, gamma, config=config, tma=tma, input_precision=accuracy
            )

        def default() -> TileConfig:
            return default_symmetric(configs, batch, n, _num_sms(a))

        launch(self._choose("symmetric", configs, default, launch, a, (n, k), tma))

    def _product(
        self,
        a: Tensor,
        x: Tensor,
        c: Tensor | None,
        column_scale: Tensor | None,
        alpha: Scalar,
        beta: Scalar,
        transpose: bool,
        out: Tensor,
    ) -> None:
        if column_scale is not None:
            a = _scale_columns(a, column_scale)
        tma = self._descriptors_usable(a, x, c, out) and described(out) is False
        batch, n, _ = a.shape
        m = x.shape[2]
        configs = product_configs(a.dtype, tma)
        accuracy = precision(a.dtype, _has_tensor_cores(a))

        def launch(config: TileConfig) -> None:
            launch_product(
                a, x, c, out, alpha, beta, transpose,
                config=config, tma=tma, input_precision=accuracy,
            )  # fmt: skip

        def default() -> TileConfig:
            return default_product(configs, batch, n, m, _num_sms(a))

        kind = "product_t" if transpose else "product"
        launch(self._choose(kind, configs, default, launch, a, (n, m), tma))

    def _descriptors_usable(self, *tensors: Tensor | None) -> bool:
        first = tensors[0]
        assert first is not None
        if self._descriptors is None:
            if first.device.type != "cuda" or _device_facts(first.get_device())[1] < 9:
                return False
        elif not self._descriptors:
            return False
        if first.dtype == torch.float32:
            return False
        return all(t is None or described(t) is not None for t in tensors)

    def _choose(
        self,
        kernel: str,
        configs: tuple[TileConfig, ...],
        default: Callable[[], TileConfig],
        launch: Callable[[TileConfig], None],
        a: Tensor,
        size: tuple[int, int],
        tma: bool,
    ) -> TileConfig:
        """Forced, known, measured now, or default: in this order."""
        if self._config is not None:
            return self._config
        if len(configs) == 1 or a.device.type != "cuda":
            return default()
        device = _device_facts(a.get_device())[0]
        access = "tma" if tma else "pointer"
        problem = (
            f"triton-{triton.__version__}-{kernel}-{access}-{size[0]}x{size[1]}"
            f"-b{batch_bucket(a.shape[0])}-{str(a.dtype)[6:]}-{device}"
        )
        labels = {config.label(): config for config in configs}
        known = labels.get(str(self._cache.lookup(problem)))
        if known is not None:
            return known
        wanted = tuning_requested() if self._tune is None else self._tune
        if not wanted or torch.cuda.is_current_stream_capturing():
            return default()
        candidates = [(name, _bind(launch, config)) for name, config in labels.items()]
        best, seconds = fastest(candidates)
        self._cache.store(problem, configs[best].label(), seconds)
        return configs[best]


def _bind(launch: Callable[[TileConfig], None], config: TileConfig) -> Callable[[], None]:
    return lambda: launch(config)


def _check_dtype(operation: str, dtype: torch.dtype) -> None:
    if dtype not in TL_DTYPES:
        raise ValueError(
            f"{operation} in {dtype} is not offered by backend='triton'. Use float16, bfloat16 or "
            "float32, or backend='torch'."
        )


def _packed(x: Tensor) -> bool:
    """Whether every matrix of the batch is contiguous in memory, row by row."""
    return x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)


def _has_tensor_cores(t: Tensor) -> bool:
    return t.device.type == "cuda" and _device_facts(t.get_device())[1] >= 8


def _num_sms(t: Tensor) -> int:
    return _device_facts(t.get_device())[2] if t.device.type == "cuda" else 1


def _run_normalize(x: Tensor, scale: Scalar, transpose: bool, out: Tensor, norms: Tensor) -> None:
    batch, rows, cols = x.shape
    each = isinstance(scale, Tensor)
    factor: Any = scale.float().contiguous() if isinstance(scale, Tensor) else float(scale)
    padded_rows, padded_cols = triton.next_power_of_2(rows), triton.next_power_of_2(cols)
    if padded_rows * padded_cols <= ONE_PASS_ENTRIES:
        normalize_once_kernel[(batch,)](
            x, out, norms, factor, rows, cols, x.stride(0),
            SCALE_EACH=each, TRANSPOSE=transpose, ROWS=padded_rows, COLS=padded_cols,
            num_warps=4 if padded_rows * padded_cols <= 8192 else 16,
        )  # fmt: skip
        return
    size = rows * cols
    # Chunks depend on the matrix alone, so that its norm does not depend on the batch.
    block, steps = 4096, 4 if size <= 1 << 22 else 16
    while -(-size // (block * steps)) > 1024:
        steps *= 2
    chunks = -(-size // (block * steps))
    sums = torch.empty((batch, chunks), dtype=torch.float32, device=x.device)
    levels = torch.empty((batch, chunks), dtype=torch.int32, device=x.device)
    partial_norms_kernel[(chunks, batch)](
        x, sums, levels, size, x.stride(0), BLOCK=block, STEPS=steps, num_warps=8
    )
    padded_chunks = triton.next_power_of_2(chunks)
    if transpose:
        tile, tile_steps = 64, 4
        grid = (-(-cols // tile), -(-rows // (tile * tile_steps)), batch)
        scale_transpose_kernel[grid](
            x, sums, levels, out, norms, factor, rows, cols, chunks, batch, x.stride(0),
            SCALE_EACH=each, BLOCK=tile, STEPS=tile_steps, CHUNKS=padded_chunks, num_warps=4,
        )  # fmt: skip
    else:
        scale_kernel[(chunks, batch)](
            x, sums, levels, out, norms, factor, size, chunks, batch, x.stride(0),
            SCALE_EACH=each, BLOCK=block, STEPS=steps, CHUNKS=padded_chunks, num_warps=8,
        )  # fmt: skip


def _run_gram_space(
    x: Tensor, steps: tuple[tuple[float, ...], ...], alpha: Scalar, scale: Scalar, out: Tensor
) -> None:
    batch, n, m = x.shape
    block = max(16, triton.next_power_of_2(n))
    arguments: list[Any] = [
        s.float().contiguous() if isinstance(s, Tensor) else float(s) for s in (alpha, scale)
    ]
    gram_space_kernel[(batch,)](
        x, out, *arguments, n, m, *x.stride(),
        ROWS=steps,
        ALPHA_EACH=isinstance(alpha, Tensor),
        SCALE_EACH=isinstance(scale, Tensor),
        BLOCK=block,
        BLOCK_M=32 if x.dtype == torch.float32 else 64,
        DTYPE=TL_DTYPES[x.dtype],
        PRECISION=precision(x.dtype, _has_tensor_cores(x)),
        num_warps=8 if block == 128 else 4,
        num_stages=3,
    )  # fmt: skip


def _scale_columns(a: Tensor, scale: Tensor) -> Tensor:
    """``a diag(scale)`` in the dtype of ``a``."""
    batch, n, _ = a.shape
    out = torch.empty((batch, n, n), dtype=a.dtype, device=a.device)
    grid = (-(-n // 128), -(-n // 32), batch)
    scale_columns_kernel[grid](
        a, scale.float().contiguous(), out, n, *a.stride(), BLOCK_N=32, BLOCK_M=128, num_warps=4
    )
    return out


def _split(scalars: tuple[Scalar, ...]) -> tuple[list[float], list[Tensor | None]]:
    """Scalars as a custom operator takes them: numbers, and tensors where they are tensors."""
    numbers = [1.0 if isinstance(s, Tensor) else float(s) for s in scalars]
    return numbers, [s if isinstance(s, Tensor) else None for s in scalars]


def _join(numbers: Sequence[float], tensors: Sequence[Tensor | None]) -> list[Scalar]:
    return [n if t is None else t for n, t in zip(numbers, tensors, strict=True)]


# The operators that torch.compile sees. Outside of it the methods launch directly, which saves the
# dispatcher's time.
@cache
def _compiled_backend() -> TritonKernels:
    return TritonKernels()


@torch.library.custom_op("flashns_dist::symmetric", mutates_args=("out",))
def _symmetric_op(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    alpha, beta, gamma = _join(numbers, tensors)
    _compiled_backend()._symmetric(a, b.mT, c, alpha, beta, gamma, out)


@torch.library.custom_op("flashns_dist::product", mutates_args=("out",))
def _product_op(
    a: Tensor,
    x: Tensor,
    c: Tensor | None,
    column_scale: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    transpose: bool,
    out: Tensor,
) -> None:
    alpha, beta = _join(numbers, tensors)
    _compiled_backend()._product(a, x, c, column_scale, alpha, beta, transpose, out)


@torch.library.custom_op("flashns_dist::normalize", mutates_args=("out", "norms"))
def _normalize_op(
    x: Tensor, scale: float, scale_each: Tensor | None, transpose: bool, out: Tensor, norms: Tensor
) -> None:
    _run_normalize(x, scale if scale_each is None else scale_each, transpose, out, norms)


@torch.library.custom_op("flashns_dist::gram_space", mutates_args=("out",))
def _gram_space_op(
    x: Tensor,
    coefficients: Sequence[float],
    lengths: Sequence[int],
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    values = iter(coefficients)
    steps = tuple(tuple(next(values) for _ in range(length)) for length in lengths)
    alpha, scale = _join(numbers, tensors)
    _run_gram_space(x, steps, alpha, scale, out)


def _fake(*_: object) -> None:
    """Nothing to describe: every operator writes into tensors that exist."""


for _operator in (_symmetric_op, _product_op, _normalize_op, _gram_space_op):
    _operator.register_fake(_fake)
