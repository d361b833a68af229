"""The Triton backend: products at the machine's rate on NVIDIA GPUs, or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels import gluon_launch
from flashns_dist.orthogonalize.kernels.interface import Scalar, is_number
from flashns_dist.orthogonalize.kernels.strides import described
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels
from flashns_dist.orthogonalize.kernels.triton_choice import chosen_launch
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
    precision,
    product_launch,
    symmetric_launch,
)
from flashns_dist.orthogonalize.kernels.triton_operators import on_device_of, split_scalars
from flashns_dist.orthogonalize.kernels.triton_passes import (
    SKETCH_ROWS,
    device_facts,
    has_tensor_cores,
    launch_combine,
    launch_gram_space,
    launch_inverse_norms,
    launch_normalize,
    launch_sketch,
    scale_columns,
)
from flashns_dist.orthogonalize.kernels.triton_prepared import (
    Launch,
    LaunchTable,
    argument,
    arguments,
    key_and_values,
)
from flashns_dist.orthogonalize.kernels.tuning import TuningCache

if interpreting():
    repair()


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
            ``$FLASHNS_DIST_TUNE``, at that call. Without it a choice found on disk is used, or a
            fixed default.
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
        self._launches = LaunchTable()

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
            (number,), (each,) = split_scalars((scale,))
            torch.ops.flashns_dist.normalize(x, number, each, transpose, out, norms)
        else:
            with on_device_of(x):
                launch_normalize(x, scale, transpose, out, norms)
        return out, norms

    def inverse_norms(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """See ``interface.Kernels.inverse_norms``; reads ``x`` once."""
        if x.dtype == torch.float64:
            return TorchKernels().inverse_norms(x, scale=scale)
        if not _packed(x):
            x = x.mT if _packed(x.mT) else x.contiguous()
        out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        if x.numel() == 0:
            return out.zero_()
        if torch.compiler.is_compiling():
            torch.ops.flashns_dist.inverse_norms(x, scale, out)
        else:
            with on_device_of(x):
                launch_inverse_norms(x, scale, out)
        return out

    def sketch(self, signs: Tensor, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """See ``interface.Kernels.sketch``; one pass for 64 signs in half precision."""
        batch, _, m = x.shape
        rows = signs.shape[1]
        if rows != SKETCH_ROWS or x.dtype not in (torch.float16, torch.bfloat16):
            inverse = self.inverse_norms(x, scale=scale)
            return self.product(signs.expand(batch, -1, -1), x, alpha=inverse), inverse
        signs = signs[:1].contiguous()  # an operation, so that a recording knows what it reads
        out = torch.empty((batch, rows, m), dtype=x.dtype, device=x.device)
        inverse = torch.empty(batch, dtype=torch.float32, device=x.device)
        if x.numel() == 0:
            return out.zero_(), inverse.zero_()
        if torch.compiler.is_compiling():
            torch.ops.flashns_dist.sketch(signs, x, scale, out, inverse)
        else:
            with on_device_of(x):
                self._sketch(signs, x, scale, out, inverse)
        return out, inverse

    def gram(self, x: Tensor, *, alpha: Scalar = 1.0, out: Tensor | None = None) -> Tensor:
        """See ``interface.Kernels.gram``."""
        return self._symmetric_out(x, x, False, alpha, None, 0.0, 0.0, out)

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
        return self._symmetric_out(a, b, True, alpha, c, beta, gamma, out)

    def _symmetric_out(
        self,
        a: Tensor,
        b: Tensor,
        turned: bool,  # whether b is the second factor, not its transpose
        alpha: Scalar,
        c: Tensor | None,
        beta: Scalar,
        gamma: Scalar,
        out: Tensor | None,
    ) -> Tensor:
        _check_dtype("symmetric", a.dtype)
        batch, n, _ = a.shape
        if out is None:
            out = torch.empty((batch, n, n), dtype=a.dtype, device=a.device)
        if out.numel() == 0:
            return out
        if c is not None and is_number(beta) and beta == 0.0:
            c = None
        if torch.compiler.is_compiling():
            numbers, tensors = split_scalars((alpha, beta, gamma))
            torch.ops.flashns_dist.symmetric(a, b, turned, c, numbers, tensors, out)
        else:
            with on_device_of(a):
                self._symmetric(a, b, turned, c, (alpha, beta, gamma), out)
        return out

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
        """See ``interface.Kernels.product``.

        ``column_scale`` is applied in a pass of its own over ``a``, whose result is rounded to
        ``a.dtype``. A float64 result is computed in fp32.
        """
        _check_dtype("product", a.dtype)
        if (dtype or x.dtype if out is None else out.dtype) == torch.float64:
            result = self.product(
                a,
                x,
                alpha=alpha,
                c=c,
                beta=beta,
                shift=shift,
                column_scale=column_scale,
                transpose=transpose,
                dtype=torch.float32,
            )
            return result.double() if out is None else out.copy_(result)
        batch, n, _ = a.shape
        m = x.shape[2]
        if out is None:
            shape = (batch, m, n) if transpose else (batch, n, m)
            out = torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
        if out.numel() == 0:
            return out
        if c is not None and is_number(beta) and beta == 0.0:
            c = None
        if torch.compiler.is_compiling():
            numbers, tensors = split_scalars((alpha, beta, shift))
            torch.ops.flashns_dist.product(a, x, c, column_scale, numbers, tensors, transpose, out)
        else:
            with on_device_of(a):
                self._product(a, x, c, column_scale, (alpha, beta, shift), transpose, out)
        return out

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
        """``alpha * a + beta * b + gamma * I`` for symmetric ``(batch, n, n)``, in one pass.

        Of ``a`` and ``b`` the lower triangle is read. In fp32 and rounded once to the dtype of
        ``a``; ``out`` may be ``a``, and is contiguous. An optional extra of this backend.
        """
        _check_dtype("combine", a.dtype)
        a, b = a.contiguous(), b.contiguous()
        if out is None:
            out = torch.empty_like(a)
        if out.numel() == 0:
            return out
        if torch.compiler.is_compiling():
            numbers, tensors = split_scalars((alpha, beta, gamma))
            torch.ops.flashns_dist.combine(a, b, numbers, tensors, out)
        else:
            with on_device_of(a):
                launch_combine(a, b, arguments(alpha, beta, gamma), out)
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
            numbers, tensors = split_scalars((alpha, scale))
            lengths = [len(row) for row in steps]
            flat = [value for row in steps for value in row]
            torch.ops.flashns_dist.gram_space(x, flat, lengths, numbers, tensors, out)
        else:
            with on_device_of(x):
                launch_gram_space(x, steps, alpha, scale, out)
        return out, shift

    def _sketch(self, signs: Tensor, x: Tensor, scale: float, out: Tensor, inverse: Tensor) -> None:
        # Whether descriptors are usable depends on addresses, which compilers do not know.
        launch_sketch(signs, x, scale, self._descriptors_usable(signs, x), out, inverse)

    def _symmetric(
        self,
        a: Tensor,
        b: Tensor,
        turned: bool,
        c: Tensor | None,
        scalars: tuple[Scalar, ...],
        out: Tensor,
    ) -> None:
        if c is not None and c.stride(2) != 1 and described(c) is True:
            c = c.contiguous()
        third = out if c is None else c
        packed = arguments(*scalars)
        facts, values = key_and_values((a, b, third, out), packed)
        shared = values[0] == values[1]  # decides, with the strides, whether b^T is a

        def make() -> Launch:
            same = shared and a.shape == b.shape and a.stride() == b.stride()
            bt = b.mT if turned and not same else b
            tma = self._descriptors_usable(a, bt, c, out) and described(out) is False
            batch, n, k = a.shape
            specialized = tma and gluon_launch.fits_symmetric(
                a, bt, c, out, capability=_capability(a)
            )
            configs = symmetric_configs(a.dtype, tma, specialized)
            accuracy = precision(a.dtype, has_tensor_cores(a))

            def launch(config: TileConfig) -> Launch:
                if _takes(config, specialized):
                    return gluon_launch.symmetric_launch(
                        a, bt, c, out, packed, config=config, num_sms=_num_sms(a)
                    )
                return symmetric_launch(
                    a, bt, c, out, packed, config=config, tma=tma, input_precision=accuracy,
                    num_sms=_num_sms(a),
                )  # fmt: skip

            def default() -> TileConfig:
                return default_symmetric(configs, batch, n, k, _num_sms(a))

            kind = "symmetric_gluon" if specialized else "symmetric"
            return self._choose(kind, configs, default, launch, a, (n, k), tma)

        device = a.get_device()
        key = ("symmetric", turned, shared, c is None, a.shape, facts, device)
        self._launches.launch(key, device, values, make)

    def _product(
        self,
        a: Tensor,
        x: Tensor,
        c: Tensor | None,
        column_scale: Tensor | None,
        scalars: tuple[Scalar, ...],
        transpose: bool,
        out: Tensor,
    ) -> None:
        if column_scale is not None:
            a = scale_columns(a, column_scale)
        third = out if c is None else c
        *scaling, shift = scalars
        shifted = bool(shift != 0.0)
        fourth = a if shifted else out
        packed = (*arguments(*scaling), argument(shift))
        facts, values = key_and_values((a, x, third, fourth, out), packed)

        def make() -> Launch:
            tma = self._descriptors_usable(a, x, c, out) and described(out) is False
            batch, n, k = a.shape
            m = x.shape[2]
            specialized = tma and gluon_launch.fits_product(
                a, x, c, out, transpose=transpose, shifted=shifted, capability=_capability(a)
            )
            configs = product_configs(a.dtype, tma, n, m, k, specialized)
            accuracy = precision(a.dtype, has_tensor_cores(a))

            def launch(config: TileConfig) -> Launch:
                if _takes(config, specialized):
                    return gluon_launch.product_launch(
                        a, x, c, out, packed, transpose, config=config, num_sms=_num_sms(a)
                    )
                return product_launch(
                    a, x, c, out, packed, transpose,
                    config=config, tma=tma, input_precision=accuracy,
                )  # fmt: skip

            def default() -> TileConfig:
                return default_product(configs, batch, n, m, _num_sms(a))

            gluon = "_gluon" if specialized else ""
            kind = f"product{'_t' if transpose else ''}{'_s' if shifted else ''}{gluon}"
            return self._choose(kind, configs, default, launch, a, (n, k, m), tma)

        device = a.get_device()
        key = ("product", transpose, c is None, shifted, a.shape, x.shape, facts, device)
        self._launches.launch(key, device, values, make)

    def _descriptors_usable(self, *tensors: Tensor | None) -> bool:
        first = tensors[0]
        assert first is not None
        if self._descriptors is None:
            if first.device.type != "cuda" or device_facts(first.get_device())[1] < 9:
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
        launch: Callable[[TileConfig], Launch],
        a: Tensor,
        size: tuple[int, ...],
        tma: bool,
    ) -> Launch:
        if self._config is not None:
            return launch(self._config)
        if len(configs) == 1 or a.device.type != "cuda":
            return launch(default())
        access = "tma" if tma else "pointer"
        problem = f"{kernel}-{access}-{'x'.join(map(str, size))}"
        return chosen_launch(self._cache, self._tune, problem, configs, default, launch, a)


def _takes(config: TileConfig, specialized: bool) -> bool:
    """Whether a Gluon kernel is to run; ValueError if it does not take the operands."""
    if config.specialized and not specialized:
        raise ValueError(f"{config.label()} does not take this product.")
    return config.specialized


def _check_dtype(operation: str, dtype: torch.dtype) -> None:
    if dtype not in TL_DTYPES:
        raise ValueError(
            f"{operation} in {dtype} is not offered by backend='triton'. Use float16, bfloat16 or "
            "float32, or backend='torch'."
        )


def _packed(x: Tensor) -> bool:
    """Whether every matrix of the batch is contiguous in memory, row by row."""
    return x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)


def _capability(t: Tensor) -> int:
    return device_facts(t.get_device())[1] if t.device.type == "cuda" else 0


def _num_sms(t: Tensor) -> int:
    return device_facts(t.get_device())[2] if t.device.type == "cuda" else 1
