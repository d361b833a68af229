"""How fast and how accurate each method, backend and installed peer is.

    python -m launch.bench.orthogonalize --out DIR [--minutes 7] [--shapes baseline,gpt2,...]
        [--accuracy-only | --no-accuracy] [--compiled] [--tune]

Writes ``DIR/orthogonalize.jsonl``, one measurement per line, and ``DIR/orthogonalize.png`` where
matplotlib is installed. Times are of bfloat16 input, eager and replayed from a CUDA graph (which
shows what launching costs). Errors are the worst over the spectra suite, and the largest singular
value of the output over the adversarial one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashns_dist.orthogonalize import METHODS, flop_count, orthogonalize
from flashns_dist.orthogonalize.kernels import get_kernels
from flashns_dist.testing.spectra import (
    adversarial,
    largest_singular_value,
    orthogonality_error,
    polar_factor,
    spectra,
)
from launch.bench.peers import Orthogonalize, peers
from launch.bench.timing import Record, eager, graphed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEER = "gram-newton-schulz"
# (batch, rows, columns). "baseline" is that of BASELINES.md; the others are the matrices of one or
# a few layers of published models.
SHAPES = {
    "baseline": (
        (64, 768, 2048),
        (24, 1024, 1024),
        (24, 1024, 4096),
        (16, 2048, 2048),
        (16, 2048, 8192),
        (4, 4096, 4096),
        (4, 4096, 14336),
        (2, 8192, 8192),
    ),
    "gpt2": ((48, 768, 768), (24, 768, 3072)),
    "llama3-8b": ((8, 4096, 4096), (8, 1024, 4096), (2, 4096, 14336)),
    "qwen3-30b-a3b": ((128, 768, 2048), (4, 2048, 4096), (8, 512, 2048)),
    "deepseek-v3": (
        (16, 2048, 7168),
        (1, 7168, 18432),
        (2, 1536, 24576),
        (2, 1536, 7168),
        (2, 512, 32768),
        (1, 7168, 16384),
    ),
    "small": ((256, 128, 128), (512, 64, 1024)),
}


def ours(backends: tuple[str, ...]) -> dict[str, Orthogonalize]:
    """Every method with the automatic backend, and ``gram`` with each backend."""
    found: dict[str, Orthogonalize] = {}
    for method in (*METHODS, "auto"):
        found[f"{method}"] = _bound(method, "auto")
    for backend in backends:
        found[f"gram, {backend}"] = _bound("gram", backend)
    return found


def _bound(method: str, backend: str) -> Orthogonalize:
    # The precision of the iteration is that of an accelerator, on the CPU as well.
    return lambda x: orthogonalize(x, method=method, backend=backend, dtype=torch.float16)


def usable_backends() -> tuple[str, ...]:
    """Named backends that can be loaded here; says why others cannot."""
    found = []
    for name in ("torch", "triton", "quack"):
        try:
            get_kernels(name, device=torch.device(DEVICE), shape=(1, 256, 256), dtype=torch.float16)
        except ImportError as error:
            print(f"backend {name} is not measured: {error}")
            continue
        found.append(name)
    return tuple(found)


def accuracy(record: Record, candidates: dict[str, Orthogonalize], sizes: tuple[int, ...]) -> None:
    """Worst orthogonality error and largest singular value of every candidate."""
    for n in sizes:
        for aspect in (1.0, 4.0):
            suite = {name: (x, polar_factor(x)) for name, x in spectra(n=n, aspect=aspect).items()}
            hard = adversarial(n=n, aspect=aspect)
            print(f"accuracy, {n} x {int(n * aspect)}: worst error, on; largest sigma, on")
            for name, call in candidates.items():
                errors = {
                    key: orthogonality_error(_result(call, x), exact)
                    for key, (x, exact) in suite.items()
                }
                sigmas = {
                    key: largest_singular_value(_result(call, x))
                    for key, x in (hard | {k: v[0] for k, v in suite.items()}).items()
                }
                worst = max(errors, key=lambda key: errors[key])
                largest = max(sigmas, key=lambda key: sigmas[key])
                mean = sum(errors.values()) / len(errors)
                print(
                    f"    {name:32s} {errors[worst]:.3f} {worst:20s} mean {mean:.3f}   "
                    f"{sigmas[largest]:.3f} {largest}"
                )
                record.write(
                    "accuracy", candidate=name, shape=[n, int(n * aspect)], errors=errors,
                    sigmas=sigmas,
                )  # fmt: skip


def _result(call: Orthogonalize, x: Tensor) -> Tensor:
    return call(x.float().to(DEVICE)[None])[0].cpu()


def speed(
    record: Record,
    candidates: dict[str, Orthogonalize],
    groups: list[str],
    deadline: float,
    smoke: bool,
) -> list[dict[str, Any]]:
    """Times every candidate on every shape; returns one row per shape for the picture."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for shape in SHAPES[group][: 1 if smoke else None]:
            if time.monotonic() > deadline:
                print(f"out of time before {group} {shape}")
                return rows
            batch, n, m = (max(1, size // 32) for size in shape) if smoke else shape
            x = torch.randn(batch, n, m, device=DEVICE).to(torch.bfloat16)
            rate = _bmm_rate(record, batch, n, m)
            row: dict[str, Any] = {"group": group, "shape": (batch, n, m)}
            print(f"{group} {(batch, n, m)}, bmm {rate / 1e12:.0f} TFLOP/s: ms eager, graph")
            for name, call in candidates.items():
                times = _times(record, group, name, call, x, rate)
                if times:
                    row[name] = times
            rows.append(row)
            _say_ratio(row)
    return rows


def _bmm_rate(record: Record, batch: int, n: int, m: int) -> float:
    """FLOP/s of torch.bmm for the last product of this shape."""
    a = torch.randn(batch, n, n, device=DEVICE).half()
    b = torch.randn(batch, n, m, device=DEVICE).half()
    timing = graphed(lambda: torch.bmm(a, b))
    record.write("bmm", timing, shape=[batch, n, m])
    return 2.0 * batch * n * n * m / timing.median


def _times(
    record: Record, group: str, name: str, call: Orthogonalize, x: Tensor, rate: float
) -> dict[str, float]:
    batch, n, m = x.shape
    times: dict[str, float] = {}
    method = name.split(",")[0]
    flops = batch * flop_count(method, n, m) if method in (*METHODS, "auto") else math.nan
    kinds: dict[str, Callable[..., Any]] = {"eager": eager, "graph": graphed}
    if "compiled" in name:
        kinds.pop("graph")  # captures its own graph
    for kind, measure in kinds.items():
        try:
            timing = measure(lambda: call(x), target=1e-2, repeats=7)
        except Exception as error:
            print(f"    {name}, {kind}: {type(error).__name__}: {str(error)[:150]}")
            record.write(
                "speed", group=group, candidate=name, shape=[batch, n, m], kind=kind,
                error=str(error)[:500],
            )  # fmt: skip
            continue
        times[kind] = timing.median
        facts = {} if math.isnan(flops) else {
            "executed_tflops": flops / timing.median / 1e12,
            "of_bmm": flops / timing.median / rate,
        }  # fmt: skip
        record.write(
            "speed", timing, group=group, candidate=name, shape=[batch, n, m], kind=kind, **facts
        )
    if times:
        text = ", ".join(f"{seconds * 1e3:8.3f}" for seconds in times.values())
        best = min(times.values())
        share = "" if math.isnan(flops) else f"  {flops / best / rate:.2f} of bmm's rate"
        print(f"    {name:32s} {text}{share}", flush=True)
    return times


def _say_ratio(row: dict[str, Any]) -> None:
    """Best peer time over the best time of the automatic method."""
    others = [min(times.values()) for name, times in row.items() if name.startswith(PEER)]
    if others and "auto" in row:
        mine = min(row["auto"].values())
        row["ratio"] = min(others) / mine
        print(f"    auto is {row['ratio']:.2f} times as fast as {PEER}'s best")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the best time of each candidate by shape, relative to the peer's best."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    names = [n for n in dict.fromkeys(k for row in rows for k in row) if _is_candidate(rows, n)]
    figure, axes = pyplot.subplots(figsize=(max(8, len(rows)), 5), constrained_layout=True)
    width = 0.85 / max(1, len(names))
    for index, name in enumerate(names):
        heights = []
        for row in rows:
            base = min((min(row[n].values()) for n in names if n.startswith(PEER) and n in row),
                       default=math.nan)  # fmt: skip
            heights.append(base / min(row[name].values()) if name in row else 0.0)
        places = [place + index * width for place in range(len(rows))]
        axes.bar(places, heights, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([place + 0.4 for place in range(len(rows))])
    axes.set_xticklabels(["x".join(map(str, row["shape"])) for row in rows], rotation=40)
    axes.set_ylabel(f"speed relative to {PEER} (its best)")
    axes.legend(fontsize=7, ncols=3)
    figure.savefig(path, dpi=130)


def _is_candidate(rows: list[dict[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), dict) for row in rows)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument(
        "--candidates", help="names to keep, separated by semicolons (default: all)"
    )
    parser.add_argument("--sizes", default="256", help="rows of the accuracy suite's matrices")
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--accuracy-only", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="also peers that compile")
    parser.add_argument("--tune", action="store_true", help="measure configurations first")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the script out")
    options = parser.parse_args()
    if options.tune:
        os.environ["FLASHNS_DIST_TUNE"] = "1"
    deadline = time.monotonic() + 60 * options.minutes
    record = Record(options.out / "orthogonalize.jsonl")
    found, missing = peers(options.compiled)
    for line in missing:
        print(f"not measured, {line}")
    candidates = ours(usable_backends()) | found
    if options.candidates:
        keep = options.candidates.split(";")
        candidates = {name: call for name, call in candidates.items() if name in keep}
    rows: list[dict[str, Any]] = []
    if not options.accuracy_only:
        rows = speed(record, candidates, options.shapes.split(","), deadline, options.smoke)
        ratios = [row["ratio"] for row in rows if "ratio" in row]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            summary = {"geometric_mean": mean, "lowest": min(ratios), "shapes": len(ratios)}
            record.write("summary", **summary)
            print("auto against the peer's best:", json.dumps(summary))
        if rows:
            draw(rows, options.out / "orthogonalize.png")
    if not options.no_accuracy:
        sizes = (32,) if options.smoke else tuple(map(int, options.sizes.split(",")))
        slow = ("torch.optim.Muon", f"{PEER} compiled")
        accuracy(record, {k: v for k, v in candidates.items() if k not in slow}, sizes)


if __name__ == "__main__":
    main()
