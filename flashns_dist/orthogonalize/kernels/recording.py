"""Sequences of launches that are recorded once, and repeated without the Python that led to them.

What an orthogonalization launches is determined by the shape, strides and dtype of its input and by
its settings, but for the addresses of the input and of the memory that it allocates. Deciding it
anew takes the host some 40 us per launch, more than the GPU works for on small matrices. So the
second call of a kind is recorded: what it allocates, and every launch with its arguments, as places
in the input or in what was allocated. Later calls allocate and launch, nothing else.

A recording is kept if it consists of launches that ``triton_prepared`` repeats and of nothing else,
and if it gives the bits of the call that it was made from, in memory that was filled with NaN
before. Otherwise calls go on as they did.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashns_dist.orthogonalize.kernels.interface import Kernels

Prepared = Callable[[Sequence[Any]], None]
"""A launch that takes addresses (int) and numbers (float)."""

MAX_RECORDINGS = 1024
_ATTEMPTS = 4
_INPUT = 0
_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")

_threads = threading.local()


@dataclass(frozen=True)
class _Step:
    """One launch, with the memory that it is the first or the last to use."""

    launch: Prepared
    values: list[Any]
    addresses: tuple[tuple[int, int, int], ...]  # position among the values, buffer, offset
    allocated: tuple[tuple[int, int], ...]  # buffer, bytes
    released: tuple[int, ...]


class Recording:
    """Repeats the launches of a call on another input; see ``Recorder.finish``."""

    def __init__(
        self,
        steps: Sequence[_Step],
        buffers: int,
        result: tuple[int, torch.Size, tuple[int, ...], torch.dtype],
        constants: Sequence[Tensor],
    ) -> None:
        self._steps = steps
        self._buffers = buffers
        self._result = result
        self._constants = constants  # their addresses are in the steps

    def __call__(self, x: Tensor, spoil: bool = False) -> Tensor:
        """The result for ``x``, on the current stream of its device, which is the current device.

        Args:
            x: Shaped, strided and aligned as the input of the recorded call.
            spoil: Whether to fill all memory with NaN first.
        """
        device = x.device
        number, shape, strides, dtype = self._result
        memory: list[Tensor | None] = [None] * self._buffers
        addresses = [0] * self._buffers
        addresses[_INPUT] = x.data_ptr()
        for step in self._steps:
            for buffer, size in step.allocated:
                if buffer == number:
                    block = torch.empty_strided(shape, strides, dtype=dtype, device=device)
                else:
                    block = torch.empty(size, dtype=torch.uint8, device=device)
                if spoil:
                    block.fill_(torch.nan if buffer == number else 255)
                memory[buffer], addresses[buffer] = block, block.data_ptr()
            values = step.values.copy()
            for position, buffer, offset in step.addresses:
                values[position] = addresses[buffer] + offset
            step.launch(values)
            for buffer in step.released:
                memory[buffer] = None
        result = memory[number]
        assert result is not None
        return result


class Recorder(TorchDispatchMode):
    """Notes what a call allocates and launches.

    Args:
        x: The call's input.

    Attributes:
        is_foreign: Whether something happened that cannot be repeated, now or ever.
        is_incomplete: Whether a launch was made that is not prepared yet.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.is_foreign = False
        self.is_incomplete = False
        storage = x.untyped_storage()
        self._input = x.data_ptr()
        # First and last address of each: the input, then what was allocated, in order.
        self._ranges = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes())]
        self._launches: list[tuple[Prepared, list[Any]]] = []
        self._constants: dict[int, Tensor] = {}

    def __enter__(self) -> Recorder:
        _threads.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _threads.recorder = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in _ALLOCATIONS:
            storage = out.untyped_storage()
            self._ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
            return out
        sources = {t.untyped_storage().data_ptr(): t for t in args if isinstance(t, Tensor)}
        results = out if isinstance(out, list | tuple) else (out,)
        is_view = not func._schema.is_mutable and all(
            isinstance(t, Tensor) and t.untyped_storage().data_ptr() in sources for t in results
        )
        self.is_foreign |= not is_view
        for t in sources.values():
            if self._find(t.data_ptr()) is None:
                self._constants[t.untyped_storage().data_ptr()] = t
        return out

    def note(self, launch: Prepared, values: Sequence[Any]) -> None:
        """A launch. Integers among its values are addresses."""
        noted: list[Any] = []
        for value in values:
            place = self._find(value) if isinstance(value, int) else None
            if place is None and isinstance(value, int):
                self.is_foreign |= not self._is_constant(value)
            noted.append(value if place is None else place)
        self._launches.append((launch, noted))

    def _find(self, address: int) -> tuple[int, int] | None:
        """The buffer that holds an address, and the offset in it.

        The newest that does: memory is handed out again when it is free.
        """
        for buffer in range(len(self._ranges) - 1, -1, -1):
            begin, end = self._ranges[buffer]
            if begin <= address < end:
                return buffer, address - (self._input if buffer == _INPUT else begin)
        return None

    def _is_constant(self, address: int) -> bool:
        storages = [t.untyped_storage() for t in self._constants.values()]
        return any(s.data_ptr() <= address < s.data_ptr() + s.nbytes() for s in storages)

    def finish(self, result: Tensor) -> Recording | None:
        """The recording of a call that returned ``result``, or None if it cannot be repeated."""
        place = self._find(result.data_ptr())
        if self.is_foreign or self.is_incomplete or place is None or place[0] == _INPUT:
            return None
        number, offset = place
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for index, (_, values) in enumerate(self._launches):
            for value in values:
                if isinstance(value, tuple):
                    first.setdefault(value[0], index)
                    last[value[0]] = index
        if offset != 0 or number not in first:
            return None
        last.pop(number)
        steps = []
        for index, (launch, values) in enumerate(self._launches):
            found = [(at, *value) for at, value in enumerate(values) if isinstance(value, tuple)]
            buffers = sorted({buffer for _, buffer, _ in found} - {_INPUT})
            sizes = [(b, self._ranges[b][1] - self._ranges[b][0]) for b in buffers]
            step = _Step(
                launch,
                [None if isinstance(value, tuple) else value for value in values],
                tuple(found),
                tuple((buffer, size) for buffer, size in sizes if first[buffer] == index),
                tuple(buffer for buffer in buffers if last.get(buffer) == index),
            )
            steps.append(step)
        facts = (number, result.shape, result.stride(), result.dtype)
        return Recording(steps, len(self._ranges), facts, list(self._constants.values()))


def active_recorder() -> Recorder | None:
    """The recorder of this thread's present call, if there is one."""
    return getattr(_threads, "recorder", None)


class Recordings:
    """Recordings by key; the oldest of more than ``limit`` is forgotten.

    Args:
        limit: At least one.
        observed: Whether somebody wants to see every launch as it was made first.
    """

    def __init__(self, observed: Callable[[], bool], limit: int = MAX_RECORDINGS) -> None:
        self._observed = observed
        self._limit = limit
        # How many calls there were without one, or None if there will be none.
        self._known: dict[Hashable, Recording | int | None] = {}

    def __len__(self) -> int:
        return sum(isinstance(known, Recording) for known in self._known.values())

    def call(self, key: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, from a recording if there is one.

        Args:
            key: Determines what ``function`` does to tensors of the shape, strides, dtype, device
                and alignment to 16 bytes of ``x``; their values must not matter.
            function: Returns a tensor that nothing else refers to.
            x: On the current device. The second call waits for the device once.
        """
        place = (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
        key = (key, place)
        known = self._known.get(key, 0)
        if isinstance(known, Recording):
            return function(x) if self._observed() else known(x)
        if known is None or self._observed():
            return function(x)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return function(x)
        if key not in self._known:
            while len(self._known) >= self._limit:
                self._known.pop(next(iter(self._known)), None)
        self._known[key] = known + 1
        if known == 0:  # Compiles and measures.
            return function(x)
        with Recorder(x) as recorder:
            result = function(x)
        recording = recorder.finish(result)
        if recording is not None and not _is_same(result, recording(x, spoil=True)):
            warnings.warn(
                "flashns_dist: a recorded sequence of launches gave other bits than the call that "
                "it was made from. It is not used; please report this.",
                stacklevel=2,
            )
            recording, recorder.is_foreign = None, True
        if recording is not None:
            self._known[key] = recording
        elif recorder.is_foreign or known >= _ATTEMPTS:
            self._known[key] = None
        return result


def _is_same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def repeated(
    kernels: Kernels, settings: Hashable, function: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """``function(x)``, from a recording where it can be.

    Args:
        kernels: The backend that ``function`` uses; recorded if that is Triton, on a GPU.
        settings: See ``Recordings.call``.
        function: See there.
        x: See there; on any device.
    """
    if kernels.name not in ("auto", "triton") or not x.is_cuda or type(x) is not Tensor:
        return function(x)
    from flashns_dist.orthogonalize.kernels.triton_operators import on_device_of

    with on_device_of(x):
        return _recordings().call((kernels, settings), function, x)


@cache
def _recordings() -> Recordings:
    from flashns_dist.orthogonalize.kernels.triton_prepared import observed

    return Recordings(observed)
