"""Which configuration of each Triton kernel is fastest, and how far it is from torch.bmm and quack.

    python -m launch.bench.kernels --out kernels.jsonl [--minutes 7] [--parts check,symmetric,...]

Checks every candidate first (against float64, and bitwise against each other), then times them in
CUDA graphs, one after the other; with ``--sustained`` in turn, the GPU kept busy all the while.
Parts stop when the time is up, so the most telling shapes come first. Every line of the output is
one measurement; a table per part goes to the terminal.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import POLAR_EXPRESS
from flashns_dist.orthogonalize.deflation import NUM_DIRECTIONS, shrink_factors
from flashns_dist.orthogonalize.gram import gram, run_steps
from flashns_dist.orthogonalize.kernels.gluon_launch import fits_product, fits_symmetric
from flashns_dist.orthogonalize.kernels.interface import Kernels, Multiple
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels
from flashns_dist.orthogonalize.kernels.triton_backend import TritonKernels
from flashns_dist.orthogonalize.kernels.triton_configs import (
    PRODUCT_FLAT,
    PRODUCT_HOPPER,
    PRODUCT_NARROW,
    PRODUCT_SHALLOW,
    PRODUCT_SHALLOW_HOPPER,
    PRODUCT_TMA,
    SYMMETRIC_HOPPER,
    SYMMETRIC_TMA,
    TileConfig,
)
from launch.bench.correctness import check
from launch.bench.timing import Record, Timing, eager, graphed, host, sustained

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Beside the candidates: what may replace one of them.
MORE_SYMMETRIC = (
    TileConfig(128, 128, 64, 8, 3),
    TileConfig(128, 128, 64, 4, 3, group=16),
)
MORE_PRODUCT = (
    TileConfig(256, 128, 64, 8, 3),
    TileConfig(256, 128, 64, 8, 4),
    TileConfig(128, 256, 64, 8, 4, group=16),
)
MORE_SHALLOW = (TileConfig(128, 128, 64, 8, 1),)
SQUARES = (
    (16, 2048),
    (24, 1024),
    (4, 4096),
    (64, 768),
    (2, 8192),
    (48, 768),
    (1, 7168),
    (128, 512),
    (4, 1024),
    (1, 2048),
    (256, 256),
)
WIDE = (
    (16, 2048, 8192),
    (64, 768, 2048),
    (24, 1024, 4096),
    (4, 4096, 14336),
    (2, 1024, 4096),
    (1, 7168, 18432),
    (1, 1536, 24576),
)
DEFLATED = (
    (16, 2048, 2048),
    (16, 2048, 7168),
    (4, 2048, 4096),
    (24, 1024, 4096),
    (64, 768, 2048),
    (48, 768, 768),
    (2, 4096, 14336),
    (1, 7168, 18432),
)


class Bench:
    """The state of one run: random inputs, the clock, and where results go."""

    def __init__(self, record: Record, minutes: float, smoke: bool, busy: bool) -> None:
        self.record = record
        self.busy = busy
        self.smoke = smoke
        self.deadline = time.monotonic() + 60 * minutes
        self.generator = torch.Generator(device=DEVICE).manual_seed(0)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def random(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        values = torch.randn(*shape, device=DEVICE, generator=self.generator)
        return (values / shape[-1] ** 0.5).to(dtype)

    def smaller(self, *shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes, or with ``--smoke`` miniatures of two of them."""
        if not self.smoke:
            return list(shapes)
        return [tuple(max(1, min(size // 16, 96)) for size in shape) for shape in shapes[:2]]

    def compare(
        self, part: str, shape: Sequence[int], flops: float, calls: dict[str, Callable[[], object]]
    ) -> None:
        """Times each call in a graph and prints executed TFLOP/s beside that of ``bmm``."""
        rates: dict[str, float] = {}
        together = sustained(calls) if self.busy else {}
        for name, call in calls.items():
            if self.out_of_time():
                print(f"  {part} {tuple(shape)}: out of time before {name}")
                break
            if self.busy and name not in together:
                continue
            counted = flops
            if name.startswith("bmm"):  # computes the whole square
                counted = flops if part == "product" else 2 * flops
            try:
                timing = together[name] if self.busy else graphed(call, target=4e-3, repeats=7)
            except Exception as error:
                print(f"  {name} failed: {type(error).__name__}: {str(error)[:200]}")
                self.record.write(part, shape=list(shape), candidate=name, error=str(error)[:500])
                continue
            rates[name] = counted / timing.median / 1e12
            facts = {"candidate": name, "tflops": round(rates[name], 1), "sustained": self.busy}
            self.record.write(part, timing, shape=list(shape), **facts)
        base = rates.get("bmm", float("nan"))
        print(f"{part} {tuple(shape)}  bmm {base:.0f} TFLOP/s; executed TFLOP/s (of bmm):")
        for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
            print(f"    {name:28s} {rate:6.0f}  {rate / base:5.2f}")

    def move(
        self, part: str, shape: Sequence[int], size: int, calls: dict[str, Callable[[], object]]
    ) -> None:
        """Times calls in graphs and prints microseconds, and terabytes per second of ``size``."""
        row = []
        for name, call in calls.items():
            timing = graphed(call, target=4e-3, repeats=7)
            rate = size / timing.median / 1e12
            row.append(f"{name} {timing.median * 1e6:.1f} ({rate:.2f})")
            facts = {"candidate": name, "terabytes_per_second": round(rate, 3)}
            self.record.write(part, timing, shape=list(shape), **facts)
        print(f"{part} {tuple(shape)}, us (TB/s): " + ", ".join(row), flush=True)


def quack_functions() -> Any:
    """quack's GEMM interface, or None."""
    try:
        from quack import gemm_interface
    except Exception as error:
        print(f"quack is not measured: {type(error).__name__}: {error}")
        return None
    return gemm_interface


def _symmetric_candidates(a: Tensor, b: Tensor, out: Tensor) -> list[TileConfig]:
    """Every configuration that takes ``a b^T``, and some more."""
    fits = fits_symmetric(a, b, None, out, capability=_capability())
    return [*(SYMMETRIC_HOPPER if fits else SYMMETRIC_TMA), *MORE_SYMMETRIC]


def _capability() -> int:
    return torch.cuda.get_device_capability()[0] if DEVICE == "cuda" else 0


def _name(config: TileConfig) -> str:
    return config.label() + ("" if config.group == 8 else f"g{config.group}")


def symmetric(bench: Bench) -> None:
    """``alpha a b + beta c`` in Gram space."""
    quack = quack_functions()
    for batch, n in bench.smaller(*SQUARES):
        if bench.out_of_time():
            return
        a, b, c = (bench.random(batch, n, n) for _ in range(3))
        a, b, c = a + a.mT, b + b.mT, c + c.mT
        out = torch.empty_like(a)
        calls: dict[str, Callable[[], object]] = {
            "bmm": lambda a=a, b=b, out=out: torch.bmm(a, b, out=out),
            "bmm + c": lambda a=a, b=b, c=c: torch.baddbmm(c, a, b, beta=0.5, alpha=0.3),
        }
        if quack is not None:
            calls["quack"] = lambda a=a, b=b, c=c: quack.gemm_symmetric(
                a, b, C=c, alpha=0.3, beta=0.5
            )
        for config in _symmetric_candidates(a, b, out):
            kernels = TritonKernels(config=config)
            calls[_name(config)] = lambda kernels=kernels, a=a, b=b, c=c, out=out: (
                kernels.symmetric(a, b, alpha=0.3, c=c, beta=0.5, out=out)
            )
        bench.compare("symmetric", (batch, n), float(batch) * n**3, calls)


def gram_part(bench: Bench) -> None:
    """``x x^T``."""
    quack = quack_functions()
    for batch, n, m in bench.smaller(*WIDE):
        if bench.out_of_time():
            return
        x = bench.random(batch, n, m)
        out = torch.empty(batch, n, n, dtype=x.dtype, device=DEVICE)
        calls: dict[str, Callable[[], object]] = {
            "bmm": lambda x=x, out=out: torch.bmm(x, x.mT, out=out)
        }
        if quack is not None:
            calls["quack"] = lambda x=x: quack.gemm_symmetric(x, x.mT)
        for config in _symmetric_candidates(x, x, out):
            kernels = TritonKernels(config=config)
            calls[_name(config)] = lambda kernels=kernels, x=x, out=out: kernels.gram(x, out=out)
        bench.compare("gram", (batch, n, m), float(batch) * n * n * m, calls)


def product(bench: Bench) -> None:
    """``a x``, plain, transposed and with an addend."""
    quack = quack_functions()
    for batch, n, m in bench.smaller(*((b, n, n) for b, n in SQUARES[:5]), *WIDE):
        if bench.out_of_time():
            return
        a, x = bench.random(batch, n, n), bench.random(batch, n, m)
        out = torch.empty_like(x)
        turned = torch.empty(batch, m, n, dtype=x.dtype, device=DEVICE)
        calls: dict[str, Callable[[], object]] = {
            "bmm": lambda a=a, x=x, out=out: torch.bmm(a, x, out=out),
            "bmm + c": lambda a=a, x=x: torch.baddbmm(x, a, x, beta=0.5),
        }
        if quack is not None:
            calls["quack"] = lambda a=a, x=x: quack.gemm(a, x, tuned=False)
        fits = fits_product(a, x, x, out, transpose=False, shifted=False, capability=_capability())
        configs = PRODUCT_HOPPER if fits else PRODUCT_TMA
        for config in (*configs, *MORE_PRODUCT):
            kernels = TritonKernels(config=config)
            calls[_name(config)] = lambda kernels=kernels, a=a, x=x, out=out: kernels.product(
                a, x, out=out
            )
        for config in configs[:3]:
            kernels = TritonKernels(config=config)
            calls[config.label() + " transposed"] = lambda kernels=kernels, a=a, x=x, out=turned: (
                kernels.product(a, x, transpose=True, out=out)
            )
            calls[config.label() + " + c"] = lambda kernels=kernels, a=a, x=x, out=out: (
                kernels.product(a, x, c=x, beta=0.5, out=out)
            )
        bench.compare("product", (batch, n, m), 2.0 * batch * n * n * m, calls)


def deflation(bench: Bench) -> None:
    """What shrinks dominant singular values: products that only move memory, norms and factors."""
    for shape in bench.smaller(*DEFLATED):
        if bench.out_of_time():
            return
        _deflation(bench, *shape)


def _deflation(bench: Bench, batch: int, n: int, m: int) -> None:
    kernels = TritonKernels()
    x = bench.random(batch, n, m, dtype=torch.bfloat16)
    each, size = Multiple(torch.ones(batch, device=DEVICE)), float(n) ** 0.5
    signs = bench.random(1, min(NUM_DIRECTIONS, n), n, dtype=x.dtype)
    flat = kernels.product(signs.expand(batch, -1, -1), x)
    image = kernels.product(x, flat.mT, alpha=1 / size, transpose=True)
    half, weights = flat.half(), image.half()

    def rows(kernels: Kernels) -> Tensor:
        return kernels.product(signs.expand(batch, -1, -1), x, alpha=each)

    def columns(kernels: Kernels) -> Tensor:
        return kernels.product(x, flat.mT, alpha=each, transpose=True)

    def terms(kernels: Kernels) -> Tensor:
        return kernels.product(weights.mT, half, alpha=-1.0, c=x, beta=each, dtype=torch.float16)

    fits = fits_product(
        weights.mT, half, x, x, transpose=False, shifted=False, capability=_capability()
    )
    shallow = PRODUCT_SHALLOW_HOPPER if fits else PRODUCT_SHALLOW
    for name, call, configs, passes in (
        ("64 rows", rows, PRODUCT_FLAT, 1),
        ("64 columns", columns, PRODUCT_NARROW, 1),
        ("64 terms", terms, shallow, 2),
    ):
        calls = {
            config.label(): partial(call, TritonKernels(config=config))
            for config in dict.fromkeys((*configs, *PRODUCT_TMA[:2], *MORE_SHALLOW))
        }
        bench.move(name, (batch, n, m), x.nbytes * passes, calls)

    def two_passes() -> Tensor:
        inverse = kernels.inverse_norms(x, scale=size)
        return kernels.product(signs.expand(batch, -1, -1), x, alpha=inverse)

    sketches = {"one pass": partial(kernels.sketch, signs, x, scale=size), "two passes": two_passes}
    bench.move("sketch and norm", (batch, n, m), x.nbytes, sketches)
    factors = {"default": partial(shrink_factors, kernels, image, signs, size)}
    bench.move("factors of deflation", (batch, n, m), image.nbytes * 3, factors)


def normalize(bench: Bench) -> None:
    """Bytes per second, counting one read and one write."""
    kernels, reference = TritonKernels(), TorchKernels()
    shapes = ((16, 2048, 2048), (64, 768, 2048), (4, 4096, 14336), (300, 128, 128))
    for batch, n, m in bench.smaller(*shapes):
        for dtype in (torch.bfloat16, torch.float32):
            x = bench.random(batch, n, m, dtype=dtype)
            moved = x.numel() * (x.element_size() + 2)
            row = []
            for transpose in (False, True):
                timing = graphed(
                    lambda x=x, t=transpose: kernels.normalize(x, dtype=torch.float16, transpose=t)
                )
                row.append(moved / timing.median / 1e12)
                bench.record.write(
                    "normalize", timing, shape=[batch, n, m], dtype=str(dtype), transpose=transpose
                )
            timing = graphed(
                lambda x=x: reference.normalize(x, dtype=torch.float16, transpose=False)
            )
            copy = graphed(lambda x=x: x.to(torch.float16).add_(0))
            print(
                f"normalize {(batch, n, m)} {dtype}: {row[0]:.2f} TB/s, transposed {row[1]:.2f}, "
                f"torch {moved / timing.median / 1e12:.2f}, cast + add {copy.median * 1e6:.0f} us"
            )


def small(bench: Bench) -> None:
    """Two steps of the Gram iteration: one kernel against separate products."""
    rows = POLAR_EXPRESS.rows[:2]
    reference, kernels = TorchKernels(), TritonKernels()
    for batch, n, m in bench.smaller(
        (300, 64, 1024), (1024, 128, 512), (256, 128, 4096), (300, 32, 256)
    ):
        x = bench.random(batch, n, m)
        one = graphed(lambda x=x: kernels.gram_space(x, rows, alpha=0.1))
        many = graphed(lambda x=x: run_steps(kernels, kernels.gram(x, alpha=0.1), rows))
        plain = graphed(lambda x=x: run_steps(reference, torch.bmm(x, x.mT), rows))
        print(
            f"gram_space {(batch, n, m)}: one kernel {one.median * 1e6:.0f} us, separate Triton "
            f"products {many.median * 1e6:.0f} us, torch {plain.median * 1e6:.0f} us"
        )
        for name, timing in (("one", one), ("separate", many), ("torch", plain)):
            bench.record.write("gram_space", timing, shape=[batch, n, m], candidate=name)


def host_part(bench: Bench) -> None:
    """Microseconds that one launch costs the CPU."""
    kernels, pointers = TritonKernels(), TritonKernels(descriptors=False)
    x = bench.random(1, 64, 64)
    calls: dict[str, Callable[[], object]] = {
        "bmm": lambda: torch.bmm(x, x),
        "symmetric": lambda: kernels.symmetric(x, x, alpha=0.5, c=x, beta=0.5),
        "symmetric, pointers": lambda: pointers.symmetric(x, x),
        "product": lambda: kernels.product(x, x),
        "normalize": lambda: kernels.normalize(x, dtype=torch.float16, transpose=False),
    }
    for name, call in calls.items():
        seconds = host(call)
        print(f"host time of {name}: {seconds * 1e6:.1f} us")
        bench.record.write("host", candidate=name, microseconds=seconds * 1e6)


class Mixed(TritonKernels):
    """Triton's symmetric products and cuBLAS's general ones."""

    def product(self, a: Tensor, x: Tensor, **options: Any) -> Tensor:
        plain = options.get("column_scale") is None and not options.get("transpose")
        if plain and options.get("dtype") in (None, x.dtype) and options.get("c") is None:
            return torch.bmm(a, x)
        return super().product(a, x, **options)


def whole(bench: Bench) -> None:
    """The five-step Gram iteration with one restart against gram-newton-schulz."""
    peer: Any = None
    try:
        from gram_newton_schulz import GramNewtonSchulz

        peer = GramNewtonSchulz(compile_kwargs=None)
    except Exception as error:
        print(f"gram-newton-schulz is not measured: {type(error).__name__}: {error}")
    for batch, n, m in bench.smaller(*((b, n, n) for b, n in SQUARES[:5]), *WIDE):
        if bench.out_of_time():
            return
        x = bench.random(batch, n, m, dtype=torch.bfloat16)
        row: dict[str, Timing] = {}
        tuned = TritonKernels(tune=True)
        for name, kernels in (("triton", tuned), ("triton + cuBLAS", Mixed(tune=True))):
            call = _iteration(kernels, x)
            for kind, measure in (("eager", eager), ("graph", graphed)):
                row[f"{name}, {kind}"] = measure(call, target=1e-2, repeats=5)
        if peer is not None:
            for kind, measure in (("eager", eager), ("graph", graphed)):
                try:
                    row[f"peer, {kind}"] = measure(lambda x=x: peer(x), target=1e-2, repeats=5)
                except Exception as error:
                    print(f"  peer, {kind}: {type(error).__name__}: {str(error)[:200]}")
        for name, timing in row.items():
            bench.record.write("gram iteration", timing, shape=[batch, n, m], candidate=name)
        text = ", ".join(f"{name} {timing.median * 1e3:.2f}" for name, timing in row.items())
        print(f"gram iteration {(batch, n, m)}, ms: {text}", flush=True)


def _iteration(kernels: Any, x: Tensor) -> Callable[[], Tensor]:
    return lambda: gram(kernels, x, POLAR_EXPRESS, dtype=torch.float16, transpose=False)


PARTS = {
    "check": check,
    "symmetric": symmetric,
    "gram": gram_part,
    "product": product,
    "whole": whole,
    "deflation": deflation,
    "normalize": normalize,
    "small": small,
    "host": host_part,
}


def main() -> None:
    """Runs the parts asked for; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernels.jsonl"))
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the script out")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sustained", action="store_true", help="keep the GPU busy, see above")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    bench = Bench(Record(options.out), options.minutes, options.smoke, options.sustained)
    for name in options.parts.split(","):
        begin = time.monotonic()
        try:
            PARTS[name](bench)
        except Exception:
            print(f"{name} failed:")
            traceback.print_exc()
        print(f"[{name}: {time.monotonic() - begin:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
