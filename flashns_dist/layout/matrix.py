"""The matrices of a parameter: blocks of it, each orthogonalized by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product
from math import prod
from operator import mul

from torch import Tensor

from flashns_dist.layout.fragment import Box, Fragment
from flashns_dist.layout.layout import Layout


@dataclass(frozen=True)
class Block:
    """Boxes of a parameter that together are one ``(rows, cols)`` matrix.

    Each part, flattened row-major to ``cols`` columns, is some of the matrix's rows; with
    ``axis=1``, flattened to ``rows`` rows, some of its columns. The parts follow one another. Most
    matrices are one box; the queries of a fused QKV weight that is ordered by query group are one
    box per group.
    """

    parts: tuple[Box, ...]
    rows: int
    cols: int
    axis: int = 0

    def __post_init__(self) -> None:
        stored = sum(part.numel for part in self.parts)
        if stored != self.rows * self.cols or not all(map(self._stacks, self.parts)):
            by = "beside each other " if self.axis else ""
            raise ValueError(
                f"the parts {self.parts} do not stack {by}to a ({self.rows}, {self.cols}) matrix"
            )

    def _stacks(self, part: Box) -> bool:
        if self.axis == 0:
            return part.numel % self.cols == 0
        # Columns of the matrix are strided: a view splits its dims, but merges none.
        return self.rows in accumulate(part.size, mul)

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the matrix."""
        return self.rows, self.cols

    def view(self, matrix: Tensor, part: int, box: Box) -> Tensor:
        """The elements of ``box``, which lies in one part, as a view of a contiguous matrix.

        Args:
            matrix: ``(rows, cols)``.
            part: Index of the part.
            box: A box of the parameter inside that part; the view is shaped like it.
        """
        whole = self.parts[part]
        across = self.rows if self.axis else self.cols
        begin = sum(earlier.numel for earlier in self.parts[:part]) // across
        held = matrix.narrow(self.axis, begin, whole.numel // across).view(whole.size)
        return held if box == whole else held[box.slices_in(whole)]


@dataclass(frozen=True)
class Piece:
    """What one fragment holds of one part of a block."""

    fragment: Fragment
    box: Box
    part: int

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
        Block((Box((*index, 0, 0), (*(1 for _ in index), rows, cols)),), rows, cols)
        for index in product(*(range(size) for size in leading))
    )


@cache
def rank_pieces(layout: Layout, block: Block, group_rank: int) -> tuple[Piece, ...]:
    """What ``group_rank`` stores of ``block``, in the order of ``block_holders``."""
    pieces = []
    for index, part in enumerate(block.parts):
        for fragment in layout.fragments[group_rank]:
            common = fragment.box.intersect(part)
            if common is not None:
                pieces.append(Piece(fragment, common, index))
    pieces.sort(key=lambda piece: (piece.part, layout.box_order[piece.fragment.box]))
    return tuple(pieces)


@cache
def block_holders(layout: Layout, block: Block) -> tuple[tuple[int, Box, tuple[int, ...]], ...]:
    """The distinct boxes that make up ``block``: (index of the part, box, ranks that store it)."""
    found = []
    for index, part in enumerate(block.parts):
        for box, ranks in layout.holders.items():
            common = box.intersect(part)
            if common is not None:
                found.append((index, common, ranks))
    return tuple(found)


@cache
def rectangle(block: Block, part: int, box: Box) -> Box | None:
    """The rows and columns of a block's matrix that a box of one of its parts is, as a 2-D box.

    None where it is no rectangle, or where its elements are not in the matrix's order.
    """
    whole = block.parts[part]
    across = block.rows if block.axis else block.cols
    begin = sum(earlier.numel for earlier in block.parts[:part]) // across
    row, col = (0, begin) if block.axis else (begin, 0)
    num_cols = whole.numel // block.rows if block.axis else block.cols
    start = tuple(b - w for b, w in zip(box.start, whole.start, strict=True))
    for split in range(len(start) + 1):
        if prod(whole.size[split:]) == num_cols:
            rows = _run(start[:split], box.size[:split], whole.size[:split])
            cols = _run(start[split:], box.size[split:], whole.size[split:])
            if rows is not None and cols is not None:
                return Box((row + rows[0], col + cols[0]), (rows[1], cols[1]))
    run = _run(start, box.size, whole.size)
    if run is not None and run[0] % num_cols == 0 and run[1] % num_cols == 0:
        return Box((row + run[0] // num_cols, col), (run[1] // num_cols, num_cols))
    return None


def _run(
    start: tuple[int, ...], size: tuple[int, ...], full: tuple[int, ...]
) -> tuple[int, int] | None:
    """A box of an array as a (start, length) run of the flattened array, if it is one."""
    first, length = 0, 1
    for begin, count, extent in zip(start, size, full, strict=True):
        if length > 1 and count != extent:
            return None
        first, length = first * extent + begin, length * count
    return first, length
