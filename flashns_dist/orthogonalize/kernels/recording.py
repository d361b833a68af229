"""Sequences of launches that are recorded once, and repeated without the Python that led to them.

What an orthogonalization launches is determined by the shape, strides and dtype of its input and by
its settings, but for the addresses of the input and of the memory that it allocates. Deciding it
anew takes the host some 40 us per launch, more than the GPU works for on small matrices. So the
second call of a kind is recorded: what it allocates, and every launch with its arguments, as places
in the input or in what was allocated. Later calls allocate and launch, nothing else.

A recording is kept if it consists of launches that ``triton_prepared`` repeats and of torch's
operations on tensors (cuBLAS products, say), and if it gives the result of the call that it was
made from (sums of rows, to the bit, all finite), in memory that was filled with NaN before.
Otherwise calls go on as they did.
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
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from flashns_dist.orthogonalize.kernels.interface import Kernels
from flashns_dist.orthogonalize.kernels.torch_ops import exact_sums

Prepared = Callable[[Sequence[Any]], None]
"""A launch that takes addresses (int) and numbers (float)."""

MAX_RECORDINGS = 1024
MAX_IDLE = 64
_ATTEMPTS = 4
_INPUT = 0
_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")
# Of operations whose outcome is not settled by what they are given, or steers what follows.
_UNSETTLED = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}

_LIFT = torch.ops.aten.lift_fresh.default

_threads = threading.local()


class _Memory:
    """The buffers of one call: what holds them, and where they begin."""

    def __init__(self, count: int, x: Tensor) -> None:
        self.tensors: list[Tensor | None] = [None] * count
        self.addresses = [0] * count
        self.tensors[_INPUT], self.addresses[_INPUT] = x, x.data_ptr()

    def put(self, buffer: int, tensor: Tensor) -> None:
        """Let a buffer be a tensor's memory."""
        self.tensors[buffer] = tensor
        self.addresses[buffer] = tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class _Place:
    """A tensor in a buffer, ``offset`` bytes from its beginning."""

    buffer: int
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, memory: _Memory) -> Tensor:
        """The tensor."""
        holder = memory.tensors[self.buffer]
        assert holder is not None
        storage = holder.untyped_storage()
        distance = memory.addresses[self.buffer] + self.offset - storage.data_ptr()
        made = torch.empty(0, dtype=self.dtype, device=holder.device)
        return made.set_(storage, distance // self.dtype.itemsize, self.shape, self.strides)


@dataclass(frozen=True)
class _Launch:
    """A launch, with the addresses among its values as buffers and offsets in bytes."""

    launch: Prepared
    values: list[Any]
    addresses: tuple[tuple[int, int, int], ...]  # position, buffer, offset

    @property
    def buffers(self) -> set[int]:
        return {buffer for _, buffer, _ in self.addresses}

    def run(self, memory: _Memory) -> None:
        values = self.values.copy()
        for position, buffer, offset in self.addresses:
            values[position] = memory.addresses[buffer] + offset
        self.launch(values)


@dataclass(frozen=True)
class _Operation:
    """One of torch's operations; tensors among its arguments are places, or constants."""

    function: Any
    leaves: list[Any]  # of its positional and keyword arguments
    spec: TreeSpec
    results: tuple[int | None, ...]  # the buffers that it allocates

    @property
    def buffers(self) -> set[int]:
        places = {leaf.buffer for leaf in self.leaves if isinstance(leaf, _Place)}
        return places | {buffer for buffer in self.results if buffer is not None}

    def run(self, memory: _Memory) -> None:
        leaves = [a.tensor(memory) if isinstance(a, _Place) else a for a in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        with exact_sums():
            out = self.function(*args, **kwargs)
        for buffer, tensor in zip(self.results, _tensors(out), strict=True):
            if buffer is not None:
                memory.put(buffer, tensor)


@dataclass(frozen=True)
class _Step:
    """A launch or an operation, with the memory that it is the first or the last to use."""

    action: _Launch | _Operation
    allocated: tuple[tuple[int, int], ...]  # buffer, bytes
    released: tuple[int, ...]


class Recording:
    """Repeats a call on another input; see ``Recorder.finish``."""

    def __init__(
        self, steps: Sequence[_Step], buffers: int, result: _Place, constants: Sequence[Tensor]
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
        memory = _Memory(self._buffers, x)
        device, result = x.device, self._result
        for step in self._steps:
            for buffer, size in step.allocated:
                if buffer == result.buffer:
                    block = torch.empty_strided(
                        result.shape, result.strides, dtype=result.dtype, device=device
                    )
                else:
                    block = torch.empty(size, dtype=torch.uint8, device=device)
                if spoil:
                    block.fill_(torch.nan if block.dtype.is_floating_point else 255)
                memory.tensors[buffer], memory.addresses[buffer] = block, block.data_ptr()
            step.action.run(memory)
            for buffer in step.released:
                memory.tensors[buffer] = None
        found = memory.tensors[result.buffer]
        assert found is not None
        # A view of what an operation returned, perhaps.
        is_whole = found.shape == result.shape and found.stride() == result.strides
        return found if is_whole and found.dtype == result.dtype else result.tensor(memory)


class Recorder(TorchDispatchMode):
    """Notes what a call allocates, launches and does by torch's operations.

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
        self._input = x
        # First and last address of each buffer: the input (not all of its storage, where there may
        # be something else), then what was allocated, in order.
        self._ranges = [(x.data_ptr(), x.data_ptr() + _extent(x))]
        self._actions: list[_Launch | _Operation] = []
        self._constants: list[Tensor] = []

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
        results = _tensors(out)
        leaves, spec = tree_flatten((args, kwargs or {}))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not given and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            return out  # of dtypes, say
        for t in given:
            # What is lifted was made unseen, perhaps in memory that was a buffer before.
            is_known = func is not _LIFT and self._find(t.data_ptr()) is not None
            if not is_known and not _shares(t, self._constants):
                self._constants.append(t)
        if func._schema.name in _ALLOCATIONS:
            self._ranges.append(_range(out))
        elif func._schema.is_mutable or not all(_shares(result, given) for result in results):
            places = [self._place(a) if isinstance(a, Tensor) else a for a in leaves]
            first = len(self._ranges)
            new = [result for result in results if not _shares(result, given)]
            self._ranges += map(_range, new)
            numbers = iter(range(first, len(self._ranges)))
            made = tuple(None if _shares(r, given) else next(numbers) for r in results)
            self._actions.append(_Operation(func, places, spec, made))
        # A number may be a tensor on the host.
        unexpected = any(t.device != self._input.device and t.ndim for t in (*given, *results))
        self.is_foreign |= unexpected or not results or bool(_UNSETTLED & set(func.tags))
        return out

    def note(self, launch: Prepared, values: Sequence[Any]) -> None:
        """A launch. Integers among its values are addresses."""
        fixed: list[Any] = list(values)
        addresses = []
        for position, value in enumerate(values):
            if not isinstance(value, int):
                continue
            place = self._find(value)
            if place is not None:
                addresses.append((position, *place))
                fixed[position] = None
            elif not any(begin <= value < end for begin, end in map(_range, self._constants)):
                self.is_foreign = True
        self._actions.append(_Launch(launch, fixed, tuple(addresses)))

    def _find(self, address: int) -> tuple[int, int] | None:
        """The buffer that holds an address, and the offset in it.

        The input first, and none if a constant does, which both stay. Of the others the newest:
        memory is handed out again when it is free.
        """
        begin, end = self._ranges[_INPUT]
        if begin <= address < end:
            return _INPUT, address - begin
        if any(begin <= address < end for begin, end in map(_range, self._constants)):
            return None
        for buffer in range(len(self._ranges) - 1, _INPUT, -1):
            begin, end = self._ranges[buffer]
            if begin <= address < end:
                return buffer, address - begin
        return None

    def _place(self, t: Tensor) -> _Place | Tensor:
        """Where a tensor is, or itself if that is elsewhere."""
        found = self._find(t.data_ptr())
        return t if found is None else _Place(*found, t.shape, t.stride(), t.dtype)

    def finish(self, result: Tensor) -> Recording | None:
        """The recording of a call that returned ``result``, or None if it cannot be repeated."""
        place = self._place(result)
        if self.is_foreign or self.is_incomplete or isinstance(place, Tensor):
            return None
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for index, action in enumerate(self._actions):
            for buffer in action.buffers:
                first.setdefault(buffer, index)
                last[buffer] = index
        if place.buffer == _INPUT or place.offset != 0 or place.buffer not in first:
            return None
        if result.untyped_storage().nbytes() != _extent(result):
            return None  # made anew with its shape, it would be too small
        last.pop(place.buffer)
        made = {b for a in self._actions if isinstance(a, _Operation) for b in a.results}
        steps = []
        for index, action in enumerate(self._actions):
            buffers = sorted(action.buffers - {_INPUT})
            new = [b for b in buffers if first[b] == index and b not in made]
            sizes = tuple((b, self._ranges[b][1] - self._ranges[b][0]) for b in new)
            steps.append(_Step(action, sizes, tuple(b for b in buffers if last.get(b) == index)))
        return Recording(steps, len(self._ranges), place, self._constants)


def _tensors(out: Any) -> list[Tensor]:
    """What an operation returned; empty if that is not only tensors."""
    results = tree_leaves(out)
    return results if all(isinstance(result, Tensor) for result in results) else []


def _extent(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    steps = zip(t.shape, t.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * t.element_size()


def _range(t: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's storage."""
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _shares(t: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether a tensor lies in the storage of one of others."""
    address = t.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == address for other in others)


def active_recorder() -> Recorder | None:
    """The recorder of this thread's present call, if there is one."""
    return getattr(_threads, "recorder", None)


class Recordings:
    """Recordings by key; the oldest of more than ``limit`` is forgotten.

    Args:
        observed: Whether somebody wants to see every launch as it was made first.
        limit: At least one.
    """

    def __init__(self, observed: Callable[[], bool], limit: int = MAX_RECORDINGS) -> None:
        self._observed = observed
        self._limit = limit
        self._lock = threading.Lock()
        # How many calls there were without one, or None if there will be none.
        self._known: dict[Hashable, Recording | int | None] = {}
        # Recordings that were never repeated: of settings that change in every step, say.
        self._idle: set[int] = set()

    def __len__(self) -> int:
        return sum(isinstance(known, Recording) for known in self._known.values())

    def call(self, key: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, from a recording if there is one.

        Args:
            key: Determines what ``function`` does to tensors of the shape, strides, dtype, device
                and alignment to 16 bytes of ``x``; their values must not matter.
            function: Returns a tensor that nothing else refers to.
            x: On the current device. The second call is made twice and waits for the device.
        """
        place = (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
        key = (key, place)
        known = self._known.get(key, 0)
        if isinstance(known, Recording):
            if self._observed():
                return function(x)
            self._idle.discard(id(known))
            return known(x)
        if known is None or self._observed():
            return function(x)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return function(x)
        attempt = 0 < known < _ATTEMPTS and len(self._idle) < MAX_IDLE
        self._keep(key, known + 1 if known == 0 or attempt else known)
        if not attempt:  # The first call compiles and measures.
            return function(x)
        with Recorder(x) as recorder:
            result = function(x)
        recording = recorder.finish(result)
        if recording is None:
            if recorder.is_foreign:
                self._keep(key, None)
            return result
        # Sums instead of the result itself, whose memory is needed.
        expected = _sums(result)
        if not expected.isfinite().all():  # what memory was filled with would not show
            return result
        del result
        repeated = recording(x, spoil=True)
        if torch.equal(_bits(expected), _bits(_sums(repeated))):
            self._keep(key, recording)
            return repeated
        warnings.warn(
            "flashns_dist: a recorded sequence of launches gave another result than the call that "
            "it was made from. It is not used; please report this.",
            stacklevel=2,
        )
        self._keep(key, None)
        del repeated
        return function(x)

    def _keep(self, key: Hashable, known: Recording | int | None) -> None:
        """Note what is known of a key; a number of calls does not replace a recording.

        Another thread may have made one since this one looked.
        """
        with self._lock:
            if key not in self._known:
                while len(self._known) >= self._limit:
                    self._idle.discard(id(self._known.pop(next(iter(self._known)))))
            before = self._known.get(key)
            if isinstance(before, Recording):
                if isinstance(known, int):
                    return
                self._idle.discard(id(before))
            self._known[key] = known
            if isinstance(known, Recording):
                self._idle.add(id(known))


def _sums(t: Tensor) -> Tensor:
    """The sums of a tensor's rows, in fp32 or fp64: what is the same has the same.

    Not of its columns: CUDA reduces these in a buffer as large as the tensor.
    """
    dtype = torch.promote_types(t.dtype, torch.float32)  # converted as it is read
    return t.sum(-1, dtype=dtype)


def _bits(sums: Tensor) -> Tensor:
    """Floats as integers, which tell -0 from 0."""
    return sums.view(torch.int64 if sums.dtype == torch.float64 else torch.int32)


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
