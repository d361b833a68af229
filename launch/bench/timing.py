"""Timing CUDA work, and what every measurement says about where it was made."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "quack-kernels", "gram-newton-schulz", "nvidia-cutlass-dsl")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: Over the repeats.
        low: Tenth percentile.
        high: Ninetieth percentile.
        repeats: How many there were.
    """

    median: float
    low: float
    high: float
    repeats: int


def summarize(seconds: list[float]) -> Timing:
    """Median, tenth and ninetieth percentile."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        ordered[round(0.1 * last)],
        ordered[round(0.9 * last)],
        len(ordered),
    )


def timed(call: Callable[[], object], count: int, repeats: int) -> list[float]:
    seconds = []
    if not torch.cuda.is_available():
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            seconds.append((time.perf_counter() - begin) / count)
        return seconds
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / count)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _calls_per_repeat(call: Callable[[], object], target: float) -> int:
    call()
    _synchronize()
    single = min(timed(call, 1, 3 if target else 1))
    return max(1, min(50, int(target / max(single, 1e-6))))


def eager(call: Callable[[], object], *, target: float = 5e-3, repeats: int = 10) -> Timing:
    """Times ``call`` launched from Python, ``target`` seconds of it per repeat."""
    count = _calls_per_repeat(call, target)

    def several() -> None:
        for _ in range(count):
            call()

    return summarize(timed(several, count, repeats))


def graphed(call: Callable[[], object], *, target: float = 5e-3, repeats: int = 10) -> Timing:
    """Times ``call`` replayed from a CUDA graph that holds ``target`` seconds of it.

    Without a GPU there is no graph, and the numbers mean nothing: that is for trying scripts out.
    """
    if not torch.cuda.is_available():
        return eager(call, target=0.0, repeats=1)
    count = _calls_per_repeat(call, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return summarize(timed(graph.replay, count, repeats))


def sustained(
    calls: dict[str, Callable[[], object]], *, seconds: float = 0.04, rounds: int = 3
) -> dict[str, Timing]:
    """Times calls with the GPU kept busy, so that its power limits its clock as in training.

    The calls are replayed from CUDA graphs in turn, each for ``seconds`` before its ``seconds`` are
    taken: one measured cool after the others would seem faster. One that fails is left out, and the
    failure printed.
    """
    if not torch.cuda.is_available():
        return {name: eager(call, target=0.0, repeats=1) for name, call in calls.items()}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, call in calls.items():
        try:
            count = _calls_per_repeat(call, seconds / 10)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(count):
                    call()
        except Exception as error:
            print(f"  {name} failed: {type(error).__name__}: {str(error)[:200]}")
            continue
        graphs[name] = graph, count
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            single = timed(graph.replay, 1, 1)[0]
            replays = max(1, round(seconds / single))

            def several(graph: torch.cuda.CUDAGraph = graph, replays: int = replays) -> None:
                for _ in range(replays):
                    graph.replay()

            several()
            taken[name] += timed(several, count * replays, 1)
    return {name: summarize(values) for name, values in taken.items()}


def host(call: Callable[[], object], *, count: int = 200) -> float:
    """Seconds of Python and driver time per call of ``call``, whose GPU work must be tiny."""
    for _ in range(20):
        call()
    rounds = []
    for _ in range(5):
        _synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        rounds.append((time.perf_counter() - begin) / count)
    return min(rounds)


def environment() -> dict[str, Any]:
    """Commit, versions and hardware of this process."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "commit": commit or "unknown",
        "versions": versions | {"cuda": torch.version.cuda, "python": platform.python_version()},
        "device": device,
    }


class Record:
    """JSON lines on disk, each with the environment; flushed one by one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._environment = environment()

    def write(self, question: str, timing: Timing | None = None, **facts: Any) -> None:
        """Writes one measurement."""
        line = {"question": question, **facts}
        if timing is not None:
            line["seconds"] = asdict(timing)
        self._file.write(json.dumps(line | self._environment) + "\n")
        self._file.flush()
