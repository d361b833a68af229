"""Time spent in a part of the step, on the clock of the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the time inside `with stopwatch:`; on CUDA without waiting for the device.

    Args:
        device: Where the work is done.
        clock: Seconds on the CPU; `time.process_time` leaves out what other processes take.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._cuda = device.type == "cuda"
        self._clock = clock
        self._seconds = 0.0
        self._start = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events.append(pair)
            pair[0].record()
        else:
            self._start = self._clock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += self._clock() - self._start

    def read(self) -> float:
        """Return the seconds so far and start again from zero; waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds
