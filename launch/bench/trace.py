"""Where the time of a step goes, from a Chrome trace of torch.profiler."""

from __future__ import annotations

import functools
import gzip
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = (
    "agreement",
    "momentum",
    "pack",
    "wire",
    "unpack",
    "orthogonalize",
    "update",
    "pack or unpack",  # in a CUDA graph nothing tells them apart
    "other",
)

_GRAPH = "a graph"  # whose kernels' names say more than who launched it

# Functions whose kernels belong to a part; the innermost decides. One that is gone is left out.
_CALLS = {
    "flashns_dist.optim.flash_muon:agree_on_gradients": "agreement",
    "flashns_dist.optim.graph:GraphedStep.replay": _GRAPH,
    "flashns_dist.optim.step:MatrixStep._gather": "momentum",
    "flashns_dist.optim.step:MatrixStep._before": "momentum",
    "flashns_dist.optim.step:MatrixStep._compute": "orthogonalize",
    "flashns_dist.optim.step:MatrixStep._finish": "update",
    "flashns_dist.optim.fused.passes:FusedPasses.pack": "pack",
    "flashns_dist.optim.fused.passes:FusedPasses.unpack": "unpack",
    "flashns_dist.exchange.exchange:Exchange.start_gather": "pack",
    "flashns_dist.exchange.exchange:Exchange.finish_gather": "unpack",
    "flashns_dist.exchange.exchange:Exchange.start_scatter": "pack",
}

# By the kernel's name, where no annotation says it: kernels of a CUDA graph.
_NAMES = (
    (r"nccl.*(SendRecv|AllToAll|alltoall)", "wire"),
    (r"nccl", "agreement"),
    (r"momentum|direction", "momentum"),
    (r"^copy_kernel", "pack or unpack"),
    (r"unpack", "unpack"),
    (r"pack", "pack"),
    (r"update|decay", "update"),
    (
        r"gemm|nvjet|cutlass|xmma|wgmma|symmetric_kernel|product_kernel|gram|shrink|bound_scalars|"
        r"partial_norms|inverse_norms?_|sketch|^squares_kernel|scale_|normalize|"
        r"combine_kernel|ns_line",
        "orthogonalize",
    ),
)

Interval = tuple[float, float]


@contextmanager
def annotated() -> Iterator[None]:
    """Name the parts of FlashMuon's step for the profiler, without their knowing."""
    replaced: list[tuple[Any, str, Any]] = []
    for path, part in _CALLS.items():
        module_name, _, names = path.partition(":")
        owner: Any = importlib.import_module(module_name)
        *outer, last = names.split(".")
        for name in outer:
            owner = getattr(owner, name, None)
        original = getattr(owner, last, None)
        if original is None:
            continue
        replaced.append((owner, last, original))
        setattr(owner, last, _named(original, part))
    try:
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def _named(call: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def inside(*args: Any, **keywords: Any) -> Any:
        with record_function(f"part:{part}"):
            return call(*args, **keywords)

    return inside


def record_trace(step: Callable[[], object], path: Path) -> None:
    """Write a (gzipped) Chrome trace of one call."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def read_trace(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return events


def summary(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by part, what of the wire is exposed, and the largest gaps.

    Returns:
        ``parts`` (kernels and summed seconds of each), ``span`` (first to last kernel), ``busy``
        (something runs), ``compute`` (something but the wire runs), ``exposed_wire`` (only the wire
        runs), ``idle`` (nothing runs), ``gaps`` (the three longest times without computation).
    """
    kernels = _classified(events)
    parts: dict[str, dict[str, Any]] = {p: {"kernels": 0, "seconds": 0.0} for p in PARTS}
    for begin, end, part, _ in kernels:
        parts[part]["kernels"] += 1
        parts[part]["seconds"] += (end - begin) / 1e6
    if not kernels:
        return {"parts": parts, "span": 0.0, "gaps": []}
    everything = _union([(b, e) for b, e, _, _ in kernels])
    computing = [k for k in kernels if k[2] != "wire"]
    compute = _union([(b, e) for b, e, _, _ in computing])
    first, last = everything[0][0], everything[-1][1]
    busy, computed = _length(everything), _length(compute)
    return {
        "parts": parts,
        "span": (last - first) / 1e6,
        "busy": busy / 1e6,
        "compute": computed / 1e6,
        "exposed_wire": (busy - computed) / 1e6,
        "idle": (last - first - busy) / 1e6,
        "gaps": _gaps(computing, compute, everything, first),
    }


def _classified(events: Sequence[dict[str, Any]]) -> list[tuple[float, float, str, str]]:
    """(begin, end, part, name) of every piece of GPU work, in microseconds."""
    launches: dict[int, tuple[Any, float]] = {}
    ranges: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        kind, args = event.get("cat"), event.get("args", {})
        if kind in ("cuda_runtime", "cuda_driver") and "correlation" in args:
            launches[args["correlation"]] = (event["tid"], event["ts"])
        elif kind == "user_annotation" and str(event["name"]).startswith("part:"):
            span = (event["ts"], event["ts"] + event["dur"], event["name"][5:])
            ranges.setdefault(event["tid"], []).append(span)
    found = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name = str(event["name"])
        tid, at = launches.get(event["args"].get("correlation"), (None, 0.0))
        inside = [r for r in ranges.get(tid, []) if r[0] <= at <= r[1]]
        part = _by_name(name)
        if part != "wire" and inside:
            innermost = min(inside, key=lambda r: r[1] - r[0])[2]
            part = part if innermost == _GRAPH else innermost
        found.append((event["ts"], event["ts"] + event["dur"], part, name))
    return sorted(found)


def _by_name(name: str) -> str:
    return next((p for pattern, p in _NAMES if re.search(pattern, name, re.IGNORECASE)), "other")


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _gaps(
    computing: Sequence[tuple[float, float, str, str]],
    compute: Sequence[Interval],
    everything: Sequence[Interval],
    first: float,
) -> list[dict[str, Any]]:
    """The three longest times between computations: between what, and how much is the wire's."""
    between = [(a[1], b[0]) for a, b in pairwise(compute)]
    found = []
    for begin, end in sorted(between, key=lambda g: g[0] - g[1])[:3]:
        before = max((k for k in computing if k[1] <= begin), key=lambda k: k[1])
        after = min((k for k in computing if k[0] >= end), key=lambda k: k[0])
        wire = sum(max(0.0, min(end, e) - max(begin, b)) for b, e in everything)
        found.append(
            {
                "seconds": (end - begin) / 1e6,
                "wire_seconds": wire / 1e6,
                "at": (begin - first) / 1e6,
                "after": f"{before[2]}: {before[3][:60]}",
                "before": f"{after[2]}: {after[3][:60]}",
            }
        )
    return found


def table(found: dict[str, Any]) -> str:
    """The summary as text."""
    lines = ["| part | kernels | ms | of the span |", "|---|---|---|---|"]
    span = found["span"] or 1.0
    for part, values in found["parts"].items():
        ms, share = 1e3 * values["seconds"], values["seconds"] / span
        lines.append(f"| {part} | {values['kernels']} | {ms:.3f} | {share:.3f} |")
    for name in ("span", "compute", "exposed_wire", "idle"):
        if name in found:
            lines.append(f"{name}: {1e3 * found[name]:.3f} ms")
    for gap in found["gaps"]:
        lines.append(
            f"gap of {1e3 * gap['seconds']:.3f} ms (wire {1e3 * gap['wire_seconds']:.3f}) at "
            f"{1e3 * gap['at']:.3f} ms, after {gap['after']}, before {gap['before']}"
        )
    return "\n".join(lines)
