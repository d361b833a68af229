"""Boxes of an array, and the fragments of it that one rank stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangular part of an array: ``start[d] <= index[d] < start[d] + size[d]``."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.size)

    def intersect(self, other: Box) -> Box | None:
        """The common part of two boxes, or None where they do not overlap."""
        start, size = [], []
        for a, s, b, t in zip(self.start, self.size, other.start, other.size, strict=True):
            low, high = max(a, b), min(a + s, b + t)
            if low >= high:
                return None
            start.append(low)
            size.append(high - low)
        return Box(tuple(start), tuple(size))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Index expression of this box in an array that holds exactly ``outer``."""
        return tuple(
            slice(s - o, s - o + n)
            for s, n, o in zip(self.start, self.size, outer.start, strict=True)
        )


@dataclass(frozen=True)
class Fragment:
    """A box of the global array and where a rank keeps it.

    ``offset`` is the box's first index in the rank's local array, either with one entry per
    dimension (the local array has the global array's number of dimensions) or a single entry (the
    local storage is one-dimensional and holds the box row-major from there: ZeRO, Megatron).
    """

    box: Box
    offset: tuple[int, ...]
    flat: bool

    def view(self, local: Tensor) -> Tensor:
        """This fragment as a view of the rank's local array, shaped like the box."""
        if self.flat:
            return local.narrow(0, self.offset[0], self.box.numel).view(self.box.size)
        if self.box.size == tuple(local.shape):
            return local
        return local[
            tuple(slice(o, o + n) for o, n in zip(self.offset, self.box.size, strict=True))
        ]


def flat_range_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Split a row-major range into boxes.

    A range of an ``(n, m)`` matrix is at most the end of one row, whole rows, and the beginning of
    another; in more dimensions the rule applies to each partial slice again.

    Args:
        shape: Global shape.
        start: First element of the range.
        stop: One past its last element.

    Yields:
        Boxes in storage order, each with its offset in elements from ``start``.
    """
    if stop <= start:
        return
    stride = prod(shape[1:])
    if len(shape) == 1:
        yield Box((start,), (stop - start,)), 0
        return
    first, last = start // stride, (stop - 1) // stride
    whole_first = first if start % stride == 0 else first + 1
    whole_stop = last + 1 if stop % stride == 0 else last
    if whole_first > last or (first == last and whole_stop <= whole_first):
        yield from _inside_one_slice(shape, first, start, stop, 0)
        return
    if first < whole_first:
        yield from _inside_one_slice(shape, first, start, whole_first * stride, 0)
    if whole_first < whole_stop:
        box = Box((whole_first, *(0 for _ in shape[1:])), (whole_stop - whole_first, *shape[1:]))
        yield box, whole_first * stride - start
    if whole_stop <= last:
        begin = whole_stop * stride
        yield from _inside_one_slice(shape, last, begin, stop, begin - start)


def _inside_one_slice(
    shape: tuple[int, ...], index: int, start: int, stop: int, offset: int
) -> Iterator[tuple[Box, int]]:
    """Boxes of a range that lies inside ``array[index]``."""
    base = index * prod(shape[1:])
    for box, inner in flat_range_boxes(shape[1:], start - base, stop - base):
        yield Box((index, *box.start), (1, *box.size)), offset + inner
