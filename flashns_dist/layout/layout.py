"""How one logical array lies across the ranks of a process group."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from math import prod

from flashns_dist.layout.fragment import Box, Fragment, flat_range_boxes


@dataclass(frozen=True, eq=False)
class Layout:
    """Fragments by group rank. Made once per kind of sharding, then shared; compared by identity.

    Every element of the array is stored at least once. Ranks that store the same box are replicas
    of it; boxes never overlap in part.

    Attributes:
        shape: Global shape.
        fragments: For each group rank, what it stores, in storage order (empty for an empty shard).
    """

    shape: tuple[int, ...]
    fragments: tuple[tuple[Fragment, ...], ...]

    def __post_init__(self) -> None:
        covered = sum(box.numel for box in self.holders)
        if covered != prod(self.shape):
            raise ValueError(
                f"the distinct fragments of a layout of shape {self.shape} hold {covered} elements "
                f"instead of {prod(self.shape)}: some are missing or overlap in part"
            )
        if not _tiles(self.shape, tuple(self.holders)):
            raise ValueError(
                f"the distinct fragments of a layout of shape {self.shape} hold as many elements "
                "as it has, but not each of them once: some overlap in part or lie outside"
            )
        for box, ranks in self.holders.items():
            if len(set(ranks)) != len(ranks):
                raise ValueError(
                    f"group ranks {ranks} store {box} of a layout of shape {self.shape}: a rank "
                    "must store a box at most once"
                )

    @property
    def group_size(self) -> int:
        """Ranks in the process group."""
        return len(self.fragments)

    @cached_property
    def holders(self) -> dict[Box, tuple[int, ...]]:
        """The group ranks that store each distinct box, ascending; in order of first holder."""
        found: dict[Box, list[int]] = {}
        for group_rank, fragments in enumerate(self.fragments):
            for fragment in fragments:
                found.setdefault(fragment.box, []).append(group_rank)
        return {box: tuple(ranks) for box, ranks in found.items()}

    @cached_property
    def box_order(self) -> dict[Box, int]:
        """The position of each distinct box among ``holders``."""
        return {box: position for position, box in enumerate(self.holders)}

    @cached_property
    def num_replicas(self) -> int:
        """How many ranks store each element (the least over the boxes; 1 for an empty array)."""
        return min((len(ranks) for ranks in self.holders.values()), default=1)

    def local_numel(self, group_rank: int) -> int:
        return sum(fragment.box.numel for fragment in self.fragments[group_rank])

    @cached_property
    def digest(self) -> str:
        """A short text that is equal for equal layouts, in any process."""
        text = repr((self.shape, [[(f.box, f.offset) for f in fs] for fs in self.fragments]))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def boxes_tile(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> bool:
    """Whether boxes hold every element of an array exactly once."""
    return sum(box.numel for box in boxes) == prod(shape) and _tiles(shape, boxes)


_PRIME = 2**61 - 1


def _tiles(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> bool:
    """Whether boxes, which hold as many elements as the array, hold each of its elements once.

    Compares the generating polynomials ``sum of x_1^i_1 x_2^i_2 ...`` over the elements of the
    boxes and of the array at one point modulo a prime: linear in the number of boxes, where
    comparing pairs is quadratic (0.5 s for 1024 ranks), and wrong for one in about 10^13 inputs.
    """

    @cache
    def difference(dim: int, start: int, size: int) -> int:
        """``(x - 1)`` times the sum of ``x^i`` over an interval of one dim."""
        point = 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03 * dim
        return pow(point, start, _PRIME) * (pow(point, size, _PRIME) - 1) % _PRIME

    def fingerprint(box: Box) -> int:
        value = 1
        for dim, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
            value = value * difference(dim, start, size) % _PRIME
        return value

    if any(start < 0 for box in boxes for start in box.start):
        return False
    whole = fingerprint(Box((0,) * len(shape), shape))
    return sum(map(fingerprint, boxes)) % _PRIME == whole


@cache
def replicated_layout(shape: tuple[int, ...], group_size: int) -> Layout:
    """Every rank stores the whole array (one process, DDP)."""
    box = Box((0,) * len(shape), shape)
    whole = (Fragment(box, box.start, flat=False),) if prod(shape) else ()
    return Layout(shape, (whole,) * group_size)


@cache
def flat_layout(
    shape: tuple[int, ...], ranges: tuple[tuple[tuple[int, int, int], ...], ...]
) -> Layout:
    """Every rank stores row-major ranges of the array in one-dimensional local storage.

    Args:
        shape: Global shape.
        ranges: For each group rank, ``(start, stop, offset)`` triples: elements ``[start, stop)``
            of the row-major array lie from ``offset`` in the rank's local storage.
    """
    return Layout(
        shape,
        tuple(
            tuple(
                Fragment(box, (offset + inner,), flat=True)
                for start, stop, offset in rank_ranges
                for box, inner in flat_range_boxes(shape, start, stop)
            )
            for rank_ranges in ranges
        ),
    )


def even_flat_layout(shape: tuple[int, ...], group_size: int) -> Layout:
    """The array flattened and cut into ``group_size`` ranges of ``ceil(numel / group_size)``."""
    numel = prod(shape)
    length = -(-numel // group_size)
    cuts = [min(i * length, numel) for i in range(group_size + 1)]
    return flat_layout(shape, tuple(((a, b, 0),) for a, b in pairwise(cuts)))
