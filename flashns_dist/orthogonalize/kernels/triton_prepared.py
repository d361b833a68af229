"""Repeated launches of compiled kernels, without the work that Triton repeats for each.

Triton binds, classifies and packs every argument of every launch, and encodes its descriptors anew.
A launch of these kernels is determined by shapes, strides, dtypes and alignments (the key) except
for a few addresses and scalars. For a key that was launched before, the arguments that Triton's own
driver packed then are used again, with new addresses, scalars and stream.

This is the one file that knows Triton's internals. They are checked where they are used: if the
driver's launcher is not of the form known from Triton 3.6, or what it packs is not laid out as
expected, every launch goes through Triton's ordinary interface, which is slower and otherwise the
same. So do launches while a profiler has hooks in Triton.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import triton
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Multiple, Scalar
from flashns_dist.orthogonalize.kernels.recording import active_recorder

# Triton 3.6: grid (3), stream, function, cooperative, dependent, two scratch buffers, metadata of
# kernel and launch, two hooks; then the kernel's arguments, of which a descriptor takes one for the
# encoded map, one for each size and one for each stride.
BASE_FORMAT = "iiiKKppOOOOOO"
_STREAM = BASE_FORMAT.index("K")
_SIGNATURES = {
    "wrap_handle_tensordesc": ["launcher", "signature", "tensordesc_meta"],
    "make_tensordesc_arg": ["arg", "metadata"],
}
_SCRATCH = ("global_scratch_size", "profile_scratch_size")
MAX_LAUNCHES = 1024
MAX_ADDRESSES = 128


@dataclass(frozen=True)
class Launch:
    """A launch as Triton takes it.

    Attributes:
        kernel: The function decorated by ``triton.jit``.
        grid: Programs, in one to three dimensions.
        changing: The leading arguments, which the key of a launch does not determine: tensors,
            descriptors and scalars.
        fixed: The arguments after them.
        constants: Compile-time arguments by name.
        options: ``num_warps`` and ``num_stages``.
        settled: Whether the next launch of the same key shall be the same.
    """

    kernel: Any
    grid: tuple[int, ...]
    changing: tuple[Any, ...]
    fixed: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    settled: bool = True

    def run(self) -> Any:
        """Launches through Triton's ordinary interface; the compiled kernel."""
        run = self.kernel[self.grid]
        return run(*self.changing, *self.fixed, **self.constants, **self.options)

    def arguments(self) -> list[Any]:
        """All arguments in the kernel's order."""
        given = [*self.changing, *self.fixed]
        return given + [self.constants[name] for name in self.kernel.arg_names[len(given) :]]


class LaunchTable:
    """Launches by key; the oldest of more than ``limit`` is forgotten.

    Keys must contain the device and everything that Triton compiles or packs by: dtypes, sizes,
    strides, compile-time arguments, and for each tensor whether its address is a multiple of 16.
    """

    def __init__(self, limit: int = MAX_LAUNCHES) -> None:
        self._limit = limit
        self._known: dict[Hashable, Callable[[Sequence[Any]], None] | None] = {}

    def __len__(self) -> int:
        return len(self._known)

    def launch(
        self, key: Hashable, device: int, values: Sequence[Any], make: Callable[[], Launch]
    ) -> None:
        """Launches on the current stream of ``device``, which must be the current device.

        Args:
            key: See above.
            device: Index of the CUDA device; negative for the CPU (the interpreter).
            values: Addresses and numbers for ``Launch.changing``.
            make: Called if the key is new, or if launches are being observed.
        """
        if device < 0:
            make().run()
            return
        prepared = self._known.get(key)
        recorder = active_recorder()
        if prepared is not None and not observed():
            if recorder is not None:
                recorder.note(prepared, values)
            prepared(values)
            return
        if recorder is not None:
            recorder.is_incomplete = True
        launch = make()
        compiled = launch.run()
        if key not in self._known and launch.settled:
            while len(self._known) >= self._limit:
                self._known.pop(next(iter(self._known)), None)
            self._known[key] = prepare(launch, compiled, device)


class EncodedDescriptors(dict[int, Any]):
    """TMA descriptors by address, encoded at first use; shape, strides and box are those of one.

    Bounded: the caching allocator hands out few addresses again and again.
    """

    def __init__(self, encode: Callable[[int], Any], limit: int = MAX_ADDRESSES) -> None:
        super().__init__()
        self._encode = encode
        self._limit = limit

    def __missing__(self, address: int) -> Any:
        while len(self) >= self._limit:
            self.pop(next(iter(self)), None)
        encoded = self[address] = self._encode(address)
        return encoded


class PreparedLaunch:
    """Calls a compiled launch function with a copy of packed arguments.

    Args:
        function: Takes what the format says.
        packed: Arguments of an earlier launch.
        places: Where in ``packed`` the changing values are.
        encoders: For each of them None, or what turns an address into a descriptor.
        stream: Returns the current stream.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        packed: list[Any],
        places: list[int],
        encoders: list[EncodedDescriptors | None],
        stream: Callable[[], int],
    ) -> None:
        self._function = function
        self._packed = packed
        self._changing = list(zip(places, encoders, strict=True))
        self._stream = stream

    def __call__(self, values: Sequence[Any]) -> None:
        packed = self._packed.copy()
        packed[_STREAM] = self._stream()
        for (place, encoder), value in zip(self._changing, values, strict=True):
            packed[place] = value if encoder is None else encoder[value]
        self._function(*packed)


@dataclass(frozen=True)
class _Address:
    """Stands for a tensor where only its address is asked for."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def observed() -> bool:
    """Whether somebody (a profiler) wants to hear of launches from Triton."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@cache
def unfamiliar() -> str | None:
    """In what Triton's CUDA driver differs from what this file knows, or None."""
    try:
        driver = importlib.import_module("triton.backends.nvidia.driver")
    except ImportError as error:
        return f"no CUDA driver: {error}"
    if getattr(driver, "_BASE_ARGS_FORMAT", None) != BASE_FORMAT:
        return "the launcher takes other arguments"
    for name, parameters in _SIGNATURES.items():
        function = getattr(driver, name, None)
        if function is None or list(inspect.signature(function).parameters) != parameters:
            return f"{name} takes other arguments"
    return None


def prepare(launch: Launch, compiled: Any, device: int) -> PreparedLaunch | None:
    """What repeats a launch, or None if anything about its packed arguments is unexpected.

    Triton's own driver packs the arguments, for a function that notes them instead of launching.
    """
    if unfamiliar() is not None or not hasattr(compiled, "packed_metadata"):
        return None
    driver: Any = importlib.import_module("triton.backends.nvidia.driver")
    launcher = compiled.run
    if any(getattr(launcher, name, 1) != 0 for name in _SCRATCH):
        return None
    arguments = launch.arguments()
    metadata = getattr(compiled.metadata, "tensordesc_meta", None) or None
    function = _innermost(launcher.launch, any(_is_descriptor(a) for a in arguments))
    if function is None:
        return None
    noted: list[list[Any]] = []
    probe = copy.copy(launcher)
    probe.launch = driver.wrap_handle_tensordesc(
        lambda *packed: noted.append(list(packed)), compiled.src.signature, metadata
    )
    grid = (*launch.grid, 1, 1)[:3]
    probe(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    packed = noted[0]
    places = _places(arguments, packed, len(launch.changing))
    if places is None:
        return None
    encoders: list[EncodedDescriptors | None] = []
    descriptors = 0
    for place, argument in zip(places, launch.changing, strict=True):
        packed[place] = None  # keeps no tensor alive
        if not _is_descriptor(argument):
            encoders.append(None)
            continue
        if metadata is None:  # a descriptor that the device encodes
            return None
        encoders.append(_encoder(driver, argument, metadata[descriptors]))
        descriptors += 1
    current = triton.runtime.driver.active.get_current_stream
    return PreparedLaunch(function, packed, places, encoders, lambda: current(device))


def _is_descriptor(argument: Any) -> bool:
    return hasattr(argument, "block_shape")  # Triton's class, or Gluon's


def _innermost(function: Any, wrapped: bool) -> Callable[..., Any] | None:
    """The launch function itself, inside of what encodes descriptors for it."""
    if not wrapped:
        return function  # type: ignore[no-any-return]
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if "launcher" not in names:
        return None
    return function.__closure__[names.index("launcher")].cell_contents  # type: ignore[no-any-return]


def _places(arguments: list[Any], packed: list[Any], count: int) -> list[int] | None:
    """Where the first ``count`` arguments are, or None if ``packed`` is not laid out as known."""
    places: list[int] = []
    place = len(BASE_FORMAT)
    for argument in arguments:
        places.append(place)
        place += 1 + 2 * len(argument.shape) if _is_descriptor(argument) else 1
    if place != len(packed):
        return None
    for index, argument in zip(places, arguments, strict=True):
        if _is_descriptor(argument):
            facts = [*argument.shape, *argument.strides]
            if packed[index + 1 : index + 1 + len(facts)] != facts:
                return None
        elif packed[index] is not argument:
            return None
    return places[:count]


def _encoder(driver: Any, descriptor: Any, metadata: Any) -> EncodedDescriptors:
    blank = copy.copy(descriptor)
    blank.base = None

    def encode(address: int) -> Any:
        placed = copy.copy(blank)
        placed.base = _Address(address)
        return driver.make_tensordesc_arg(placed, metadata)[0]

    return EncodedDescriptors(encode)


def argument(scalar: Scalar) -> float | Tensor:
    """A scalar as a kernel takes it: a number, or a pointer to contiguous fp32."""
    if isinstance(scalar, Multiple):
        scalar = scalar.tensor()
    if isinstance(scalar, Tensor):
        return scalar.float().contiguous()
    return float(scalar)


def arguments(*scalars: Scalar) -> tuple[float | Tensor, ...]:
    """Scalars as products take them: each as a kernel's argument, then each one's multiplier."""
    values = [argument(s.each if isinstance(s, Multiple) else s) for s in scalars]
    return *values, *[float(s.factor) if isinstance(s, Multiple) else 1.0 for s in scalars]


def key_and_values(
    tensors: Sequence[Tensor], scalars: Sequence[float | Tensor]
) -> tuple[tuple[Any, ...], list[Any]]:
    """What tensors and scalars contribute to a key (beside their shapes), and their values."""
    facts: list[Any] = []
    values: list[Any] = []
    for tensor in tensors:
        address = tensor.data_ptr()
        values.append(address)
        facts += (tensor.stride(), tensor.dtype, not address & 15)
    for scalar in scalars:
        if isinstance(scalar, Tensor):
            address = scalar.data_ptr()
            values.append(address)
            facts.append(not address & 15)
        else:
            values.append(scalar)
            facts.append(None)
    return tuple(facts), values
