"""The matrices of a parameter: boxes of it, each orthogonalized by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

from torch import Tensor

from flashns_dist.layout.fragment import Box, Fragment
from flashns_dist.layout.layout import Layout


@dataclass(frozen=True)
class Block:
    """A box of a parameter that, flattened row-major to ``(rows, cols)``, is one matrix."""

    box: Box
    rows: int
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols


@dataclass(frozen=True)
class Piece:
    """The part of one block that one fragment holds."""

    fragment: Fragment
    box: Box

    def view(self, local: Tensor) -> Tensor:
        """The piece as a view of the rank's local array, shaped like ``box``."""
        held = self.fragment.view(local)
        return (
            held if self.box == self.fragment.box else held[self.box.slices_in(self.fragment.box)]
        )


@cache
def leading_blocks(shape: tuple[int, ...]) -> tuple[Block, ...]:
    """One matrix per index of the leading dims: ``(n, m)`` is one, ``(experts, n, m)`` are many."""
    if len(shape) < 2:
        raise ValueError(f"a matrix needs at least two dims, got shape {shape}")
    *leading, rows, cols = shape
    if prod(shape) == 0:
        return ()
    return tuple(
        Block(Box((*index, 0, 0), (*(1 for _ in index), rows, cols)), rows, cols)
        for index in product(*(range(size) for size in leading))
    )


@cache
def rank_pieces(layout: Layout, block: Block, group_rank: int) -> tuple[Piece, ...]:
    """What ``group_rank`` stores of ``block``, in storage order."""
    pieces = []
    for fragment in layout.fragments[group_rank]:
        common = fragment.box.intersect(block.box)
        if common is not None:
            pieces.append(Piece(fragment, common))
    return tuple(pieces)


@cache
def block_holders(layout: Layout, block: Block) -> tuple[tuple[Box, tuple[int, ...]], ...]:
    """The distinct boxes that make up ``block``, each with the group ranks that store it."""
    found = []
    for box, ranks in layout.holders.items():
        common = box.intersect(block.box)
        if common is not None:
            found.append((common, ranks))
    return tuple(found)
