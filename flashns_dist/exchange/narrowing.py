"""Exchanging some rows or columns of matrices, other ones in each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flashns_dist.exchange.schedule import Route, Schedule, Segment
from flashns_dist.layout import Block, Box, rectangle
from flashns_dist.plan import Matrix, Plan


@dataclass(frozen=True)
class Selection:
    """Which rows (dim 0) or columns (dim 1) of a matrix take part in a step.

    Attributes:
        dim: 0 or 1.
        shape: Of the matrix that the selected ones make, in their order.
        below: For each border between boxes along the dim (``borders``), how many of the selected
            indices are smaller.
    """

    dim: int
    shape: tuple[int, int]
    below: Mapping[int, int]

    def narrow(self, box: Box) -> Box:
        """The selected part of a box of the matrix, as a box of the smaller matrix."""
        begin = box.start[self.dim]
        first = self.below[begin]
        count = self.below[begin + box.size[self.dim]] - first
        if self.dim == 0:
            return Box((first, box.start[1]), (count, box.size[1]))
        return Box((box.start[0], first), (box.size[0], count))

    @property
    def block(self) -> Block:
        """The smaller matrix as a block of its own."""
        return Block((Box((0, 0), self.shape),), *self.shape)


def borders(plan: Plan, index: int, dim: int) -> list[int]:
    """Where boxes of a matrix begin and end along a dim, ascending: the same on every rank."""
    found = set()
    for part, box, _ in plan.boxes(index):
        inside = matrix_box(plan.matrices[index], part, box)
        found |= {inside.start[dim], inside.start[dim] + inside.size[dim]}
    return sorted(found)


def matrix_box(matrix: Matrix, part: int, box: Box) -> Box:
    """A stored box in rows and columns of the matrix.

    Raises:
        NotImplementedError: It is not one, because of the matrix view.
    """
    found = rectangle(matrix.block, part, box)
    if found is None:
        raise NotImplementedError(
            f"{matrix.name}: {box} of it is no rectangle of its matrix of shape "
            f"{matrix.block.shape}, so rows or columns cannot be selected. Use another update rule "
            "for it, or a matrix_view whose matrices are boxes."
        )
    return found


class Narrowing:
    """Schedules in which some matrices are replaced by a selection of their rows or columns.

    Args:
        plan: Of the whole matrices.
        schedules: Of the whole matrices, by bucket.
    """

    def __init__(self, plan: Plan, schedules: Sequence[Schedule]) -> None:
        self._schedules = tuple(
            replace(s, gather=_in_matrix(s.gather, plan), scatter=_in_matrix(s.scatter, plan))
            for s in schedules
        )

    def schedules(self, selections: Mapping[int, Selection]) -> tuple[Schedule, ...]:
        """The schedules for these selections, of every matrix whose work is less than its block."""
        return tuple(
            replace(s, gather=_narrow(s.gather, selections), scatter=_narrow(s.scatter, selections))
            for s in self._schedules
        )


def _in_matrix(route: Route, plan: Plan) -> Route:
    """The boxes of partly selected matrices in their rows and columns."""

    def convert(segment: Segment) -> Segment:
        matrix = plan.matrices[segment.matrix]
        if matrix.work is None:
            return segment
        return replace(segment, part=0, box=matrix_box(matrix, segment.part, segment.box))

    return replace(
        route,
        sends=tuple(map(convert, route.sends)),
        receives=tuple(map(convert, route.receives)),
        local=tuple(map(convert, route.local)),
    )


def _narrow(route: Route, selections: Mapping[int, Selection]) -> Route:
    sends, send_splits = _packed(route.sends, route.send_splits, selections)
    receives, receive_splits = _packed(route.receives, route.receive_splits, selections)
    local = tuple(_narrowed(s, -1, selections) for s in route.local)
    return Route(sends, receives, local, send_splits, receive_splits)


def _packed(
    segments: tuple[Segment, ...], splits: tuple[int, ...], selections: Mapping[int, Selection]
) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
    """Segments one after the other again, by peer, with less in them."""
    packed, new_splits, offset, at, end = [], [], 0, 0, 0
    for length in splits:
        end += length
        begin = offset
        while at < len(segments) and segments[at].offset < end:
            packed.append(_narrowed(segments[at], offset, selections))
            offset += packed[-1].box.numel
            at += 1
        new_splits.append(offset - begin)
    return tuple(packed), tuple(new_splits)


def _narrowed(segment: Segment, offset: int, selections: Mapping[int, Selection]) -> Segment:
    selection = selections.get(segment.matrix)
    box = segment.box if selection is None else selection.narrow(segment.box)
    return Segment(segment.matrix, segment.part, box, offset, segment.held)


__all__ = ["Narrowing", "Selection", "borders", "matrix_box"]
