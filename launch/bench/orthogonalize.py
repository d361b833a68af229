"""How fast and how accurate each method, backend and installed peer is.

    python -m launch.bench.orthogonalize --out DIR [--minutes 5] [--shapes baseline,gpt2,...]
        [--accuracy-only | --no-accuracy] [--backends] [--compiled] [--tune]

Kernels are compiled by several processes first. Then come all methods, the fast peers and the
table; then accuracy; then the peers that tune or compile for long, on as many shapes as time is
left for. Nothing new is begun after ``--minutes``.

Writes ``DIR/orthogonalize.jsonl``, one measurement per line, ``DIR/orthogonalize.txt``, the table,
and ``DIR/orthogonalize.png`` where matplotlib is installed. Times are of bfloat16 input, eager and
replayed from a CUDA graph (which shows what launching costs). Errors are the worst over the spectra
suite, and the largest singular value of the output over the adversarial one.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
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
from launch.bench.peers import COMPILED, SLOW, Orthogonalize, peers
from launch.bench.timing import Record, eager, graphed, sustained

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
    """Every method with the automatic backend, and ``gram`` with each of ``backends``."""
    found: dict[str, Orthogonalize] = {}
    for method in ("auto", *METHODS):
        found[method] = _bound(method, "auto")
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


def precompile(shapes: list[tuple[int, int, int]], names: list[str], deadline: float) -> None:
    """Runs ``names`` on every shape in several processes, which share the caches on the disk."""
    if DEVICE == "cpu":
        return
    begin = time.monotonic()
    # Neighbouring tasks differ in method and shape, so that processes compile different kernels.
    tasks = [(name, shape) for shape in shapes for name in names]
    tasks = [task for start in range(7) for task in tasks[start::7]]
    processes = max(1, min(12, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = [pool.apply_async(_compile_one, task) for task in tasks]
        for result, task in zip(results, tasks, strict=True):
            try:
                result.get(max(0.1, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                print("compiling first: out of time")
                break
            except Exception as error:
                print(f"compiling {task}: {type(error).__name__}: {str(error)[:150]}")
        pool.terminate()
    print(f"[compiled in {time.monotonic() - begin:.0f} s]", flush=True)


def _compile_one(name: str, shape: tuple[int, int, int]) -> None:
    os.environ["FLASHNS_DIST_TUNE"] = "0"  # not while others use the device
    x = torch.randn(shape, device=DEVICE).to(torch.bfloat16)
    call = peers(compiled=True)[0][COMPILED] if name == COMPILED else _bound(name, "auto")
    call(x)
    torch.cuda.synchronize()
    del x
    torch.cuda.empty_cache()


def accuracy(
    record: Record,
    candidates: dict[str, Orthogonalize],
    sizes: tuple[int, ...],
    deadline: float,
) -> None:
    """Worst orthogonality error and largest singular value of every candidate."""
    for n in sizes:
        for aspect in (1.0, 4.0):
            suite = {name: (x, polar_factor(x)) for name, x in spectra(n=n, aspect=aspect).items()}
            hard = adversarial(n=n, aspect=aspect)
            print(f"accuracy, {n} x {int(n * aspect)}: worst error, on; largest sigma, on")
            for name, call in candidates.items():
                if time.monotonic() > deadline:
                    print(f"    out of time before {name}")
                    return
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
    """Times every candidate on every shape; returns one row per shape for table and picture."""
    rows: list[dict[str, Any]] = []
    for group, shape in _shapes(groups, smoke):
        if time.monotonic() > deadline:
            print(f"out of time before {group} {shape}")
            break
        x = torch.randn(shape, device=DEVICE).to(torch.bfloat16)
        rate = _bmm_rate(record, *shape)
        row: dict[str, Any] = {"group": group, "shape": shape, "rate": rate}
        print(f"{group} {shape}, bmm {rate / 1e12:.0f} TFLOP/s: ms eager, graph")
        for name, call in candidates.items():
            times = _times(record, group, name, call, x, rate)
            if times:
                row[name] = times
        if "auto" in candidates:
            _sustained_rate(record, candidates["auto"], x)
        rows.append(row)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return rows


def slow_peers(
    record: Record,
    candidates: dict[str, Orthogonalize],
    rows: list[dict[str, Any]],
    deadline: float,
    reserve: float,
) -> None:
    """Adds to the rows the peers that take ``reserve`` seconds at a new shape, as time permits."""
    for name, call in candidates.items():
        for row in rows:
            if time.monotonic() + reserve > deadline:
                print(f"no time for {name} on {row['shape']} and after")
                break
            x = torch.randn(row["shape"], device=DEVICE).to(torch.bfloat16)
            times = _times(record, row["group"], name, call, x, row["rate"])
            if times:
                row[name] = times


def _shapes(groups: list[str], smoke: bool) -> list[tuple[str, tuple[int, int, int]]]:
    if not smoke:
        return [(group, shape) for group in groups for shape in SHAPES[group]]
    return [
        (group, (max(1, b // 32), max(1, n // 32), max(1, m // 32)))
        for group in groups
        for b, n, m in SHAPES[group][:1]
    ]


def summarize(record: Record, rows: list[dict[str, Any]]) -> str:
    """The table: speedups over the peer's best by shape and method, and their geometric means."""
    names = [n for n in dict.fromkeys(k for row in rows for k in row) if _is_candidate(rows, n)]
    names = [name for name in names if not name.startswith(PEER)]
    lines = [f"{'speed relative to ' + PEER:28s} " + "".join(f"{n[:12]:>13s}" for n in names)]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for row in rows:
        others = [min(times.values()) for name, times in row.items() if name.startswith(PEER)]
        if not others:
            continue
        cells = []
        for name in names:
            if name in row:
                ratios[name].append(min(others) / min(row[name].values()))
            cells.append(f"{ratios[name][-1]:13.2f}" if name in row else f"{'-':>13s}")
        label = f"{row['group']} {'x'.join(map(str, row['shape']))}"
        lines.append(f"{label:28s} " + "".join(cells))
    for title, reduce in (("geometric mean", _geometric_mean), ("lowest", min)):
        cells = [f"{reduce(ratios[n]):13.2f}" if ratios[n] else f"{'-':>13s}" for n in names]
        lines.append(f"{title:28s} " + "".join(cells))
    for name in names:
        if ratios[name]:
            record.write(
                "summary", candidate=name, geometric_mean=_geometric_mean(ratios[name]),
                lowest=min(ratios[name]), shapes=len(ratios[name]), over=PEER,
            )  # fmt: skip
    return "\n".join(lines)


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _bmm_rate(record: Record, batch: int, n: int, m: int) -> float:
    """FLOP/s of torch.bmm for the last product of this shape."""
    a = torch.randn(batch, n, n, device=DEVICE).half()
    b = torch.randn(batch, n, m, device=DEVICE).half()
    timing = graphed(lambda: torch.bmm(a, b))
    record.write("bmm", timing, shape=[batch, n, m])
    return 2.0 * batch * n * n * m / timing.median


def _sustained_rate(record: Record, call: Orthogonalize, x: Tensor) -> None:
    """The rate of ``auto``'s executed FLOPs and that of torch.bmm, measured in turn.

    With the GPU kept busy, so that its power limits the clock of both: bmm alone, after a pause,
    has run at 640 and at 740 TFLOP/s.
    """
    batch, n, m = x.shape
    a = torch.randn(batch, n, n, device=DEVICE).half()
    b = torch.randn(batch, n, m, device=DEVICE).half()
    # Long enough for the clock to leave what the other call made of it.
    calls = {"auto": lambda: call(x), "bmm": lambda: torch.bmm(a, b)}
    timings = sustained(calls, seconds=0.15)
    if len(timings) < 2:
        return
    flops = {"auto": batch * flop_count("auto", n, m), "bmm": 2.0 * batch * n * n * m}
    rates = {name: flops[name] / timing.median for name, timing in timings.items()}
    share = rates["auto"] / rates["bmm"]
    print(
        f"    in turn with bmm: {rates['auto'] / 1e12:.0f} of {rates['bmm'] / 1e12:.0f} TFLOP/s, "
        f"{share:.2f}",
        flush=True,
    )
    record.write(
        "sustained rate", timings["auto"], shape=[batch, n, m], candidate="auto", of_bmm=share,
        executed_tflops=rates["auto"] / 1e12, bmm_tflops=rates["bmm"] / 1e12,
    )  # fmt: skip


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
    parser.add_argument("--minutes", type=float, default=5.0, help="in all")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument(
        "--candidates", help="names to keep, separated by semicolons (default: all)"
    )
    parser.add_argument("--sizes", default="256", help="rows of the accuracy suite's matrices")
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--accuracy-only", action="store_true")
    parser.add_argument("--backends", action="store_true", help="also gram with each backend")
    parser.add_argument("--compiled", action="store_true", help="also peers that compile")
    parser.add_argument("--tune", action="store_true", help="measure configurations first")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the script out")
    parser.add_argument(
        "--reserve", type=float, default=60.0, help="seconds that a peer that compiles may need"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    groups = options.shapes.split(",")
    record = Record(options.out / "orthogonalize.jsonl")
    found, missing = peers(options.compiled)
    for line in missing:
        print(f"not measured, {line}")
    candidates = ours(usable_backends() if options.backends else ()) | found
    if options.candidates:
        keep = options.candidates.split(";")
        candidates = {name: call for name, call in candidates.items() if name in keep}
    if not options.accuracy_only:
        names = [name for name in candidates if name in METHODS or name == COMPILED]
        if "auto" in candidates:
            names = [*METHODS, *(name for name in names if name == COMPILED)]
        precompile([shape for _, shape in _shapes(groups, options.smoke)], names, deadline)
    if options.tune:
        os.environ["FLASHNS_DIST_TUNE"] = "1"
    slow = {name: call for name, call in candidates.items() if name in SLOW}
    quick = {name: call for name, call in candidates.items() if name not in SLOW}
    rows: list[dict[str, Any]] = []
    if not options.accuracy_only:
        rows = speed(record, quick, groups, deadline, options.smoke)
        _publish(record, rows, options.out)
    if not options.no_accuracy:
        sizes = (32,) if options.smoke else tuple(map(int, options.sizes.split(",")))
        accuracy(record, quick, sizes, deadline)
    if rows and slow:
        slow_peers(record, slow, rows, deadline, 0.0 if options.smoke else options.reserve)
        _publish(record, rows, options.out)


def _publish(record: Record, rows: list[dict[str, Any]], folder: Path) -> None:
    text = summarize(record, rows)
    print(text, flush=True)
    (folder / "orthogonalize.txt").write_text(text + "\n")
    draw(rows, folder / "orthogonalize.png")


if __name__ == "__main__":
    main()
