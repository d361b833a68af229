"""Measured choices, kept on disk: which configuration of a kernel suits a problem."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

CACHE_VARIABLE = "FLASHNS_DIST_CACHE"
TUNE_VARIABLE = "FLASHNS_DIST_TUNE"
# Raised when kernels change so much that what was measured before should be measured again.
KERNELS_VERSION = 6
_QUEUED_CALLS = 4
_QUEUEING_CYCLES = 3_000_000  # 1.5 to 2 ms


def cache_folder() -> Path:
    """``$FLASHNS_DIST_CACHE``, or ``flashns_dist`` in the user's cache folder.

    For a user without a home, as containers have them, a place that can hold no file.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "flashns_dist"
    except RuntimeError:
        return Path(os.devnull) / "flashns_dist"


def tuning_requested() -> bool:
    """Whether ``$FLASHNS_DIST_TUNE`` asks for measuring problems that the cache lacks."""
    return os.environ.get(TUNE_VARIABLE, "0") not in ("", "0")


def batch_bucket(batch: int) -> int:
    """The power of two at or above ``batch``: batches in one bucket share their choice."""
    return 1 << max(batch - 1, 0).bit_length()


class TuningCache:
    """Choices by problem, shared by processes through one small JSON file per problem.

    Files are written beside their place and renamed, so that a reader never sees half of one; when
    several processes measure the same problem at once, the last one's choice stays. What cannot be
    read or written (read-only home, damaged file) or was measured with other kernels counts as
    absent.

    Args:
        folder: Where the files lie; ``cache_folder()`` if None, looked up at first use.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._known: dict[str, int | str | None] = {}

    def lookup(self, problem: str) -> int | str | None:
        """The choice kept for ``problem``, or None."""
        if problem not in self._known:
            self._known[problem] = self._read(problem)
        return self._known[problem]

    def store(self, problem: str, choice: int | str, seconds: dict[str, float]) -> None:
        """Keeps a choice, with the measured ``seconds`` by candidate beside it for the reader."""
        self._known[problem] = choice
        path = self._path(problem)
        facts = {"problem": problem, "kernels": KERNELS_VERSION}
        content = json.dumps(facts | {"choice": choice, "seconds": seconds})
        name = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(handle, "w") as file:
                file.write(content)
            os.replace(name, path)
        except OSError:
            if name:  # or a full disk would collect them
                with suppress(OSError):
                    os.unlink(name)

    def _path(self, problem: str) -> Path:
        folder = self._folder if self._folder is not None else cache_folder()
        safe = "".join(ch if ch.isalnum() or ch in "-._" else "_" for ch in problem)
        return folder / f"{safe}.json"

    def _read(self, problem: str) -> int | str | None:
        try:
            content = json.loads(self._path(problem).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("problem") != problem:
            return None
        if content.get("kernels") != KERNELS_VERSION:
            return None
        choice = content.get("choice")
        return choice if isinstance(choice, (int, str)) else None


def warm_up(call: Callable[[], object]) -> None:
    """Compiles ``call``, and whatever it measures itself."""
    call()
    torch.cuda.synchronize()


def measure(call: Callable[[], object], seconds: float = 0.0) -> float:
    """Seconds of ``call`` on the current CUDA device, from a few calls in a row.

    They are queued while the device waits, so that what the host takes to launch them, more than
    many kernels take, does not count: later launches are repeated from what the first prepared.

    Args:
        call: Launches the work on the current stream; warm.
        seconds: How long to go on; the few calls say how many that are.
    """
    found = _in_a_row(call, _QUEUED_CALLS)
    return _in_a_row(call, int(seconds / found)) if seconds > _QUEUED_CALLS * found else found


def _in_a_row(call: Callable[[], object], count: int) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_QUEUEING_CYCLES)
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / count


def fastest(
    candidates: Sequence[tuple[str, Callable[[], object]]],
    *,
    rounds: int = 6,
    advantage: float = 0.0,
    seconds: float = 0.0,
) -> tuple[int, dict[str, float]]:
    """Index of the fastest candidate, and the median seconds of each; one that fails is left out.

    Candidates are compiled first and then take turns, forwards and backwards, so that they are
    measured alike: the device's clock depends on what ran before.

    Args:
        candidates: Name and call of each.
        rounds: How often each is measured, after a round that does not count.
        advantage: The part of its time by which another has to beat the first candidate.
        seconds: How long a candidate runs each time it is measured; a few calls if that is longer.
            Where power limits the clock, one that takes less shows it only when it runs for long.

    Raises:
        RuntimeError: If every candidate fails.
    """
    times: dict[int, list[float]] = {}
    errors: list[str] = []
    for index, (name, call) in enumerate(candidates):
        try:
            warm_up(call)
        except Exception as error:  # a configuration that this device cannot run
            errors.append(f"{name}: {error}")
        else:
            times[index] = []
    if not times:
        raise RuntimeError("no candidate runs on this device: " + "; ".join(errors))
    for turn in range(1 + rounds):
        for index in sorted(times, reverse=turn % 2 == 1):
            times[index].append(measure(candidates[index][1], seconds))
    medians = {index: statistics.median(found[1:]) for index, found in times.items()}
    best = min(medians, key=lambda index: medians[index])
    if 0 in medians and medians[best] > (1 - advantage) * medians[0]:
        best = 0
    return best, {candidates[index][0]: seconds for index, seconds in medians.items()}
