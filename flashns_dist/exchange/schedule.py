"""What one rank packs, sends, receives and unpacks for one bucket."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from flashns_dist.layout import Box, Piece
from flashns_dist.plan import Plan
from flashns_dist.plan.routing import position, source, supplied, supplier

Item: TypeAlias = "tuple[int, int, Box, int]"  # matrix, part, box, index among the held pieces


@dataclass(frozen=True)
class Segment:
    """A box of one matrix in a buffer, or in place where it does not travel.

    ``part`` is the index of the block's part that the box lies in, ``offset`` counts elements from
    the start of the buffer, and ``held`` is the index of the piece among those that this rank
    stores (-1 on a side that does not store it).
    """

    matrix: int
    part: int
    box: Box
    offset: int
    held: int


@dataclass(frozen=True)
class Route:
    """One direction of one bucket: segments by peer, in the order in which both sides pack them."""

    sends: tuple[Segment, ...]
    receives: tuple[Segment, ...]
    local: tuple[Segment, ...]
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """One bucket as one rank sees it.

    Attributes:
        held: Every piece of the bucket's matrices that this rank stores, as (matrix, piece).
        owned: Matrices that this rank orthogonalizes.
        gather: Fragments to owners.
        scatter: Results to holders.
    """

    held: tuple[tuple[int, Piece], ...]
    owned: tuple[int, ...]
    gather: Route
    scatter: Route


def make_schedule(plan: Plan, bucket: Iterable[int], group_rank: int) -> Schedule:
    """Derive one rank's part of a bucket from the plan, without communication."""
    held: list[tuple[int, Piece]] = []
    owned: list[int] = []
    gather, scatter = _Router(plan.group_size, group_rank), _Router(plan.group_size, group_rank)
    for index in bucket:
        owners = plan.owners[index]
        pieces = plan.pieces(index, group_rank)
        at = {(piece.part, piece.box): len(held) + n for n, piece in enumerate(pieces)}
        held += [(index, piece) for piece in pieces]
        if position(owners, group_rank) >= 0:
            owned.append(index)
            replica = plan.replica_of(index, group_rank)
            for part, box, holders in plan.boxes(index):
                item = (index, part, box, at.get((part, box), -1))
                gather.add(source(holders, group_rank, replica), group_rank, item)
                for holder in supplied(owners, group_rank, holders):
                    scatter.add(group_rank, holder, item)
        all_holders = plan.matrices[index].layout.holders
        for piece in pieces:
            item = (index, piece.part, piece.box, at[piece.part, piece.box])
            holders = all_holders[piece.fragment.box]
            scatter.add(supplier(owners, group_rank, holders), group_rank, item)
            if owners != holders:
                for owner in owners:
                    if owner != group_rank:
                        replica = plan.replica_of(index, owner)
                        gather.add(source(holders, owner, replica), owner, item)
    return Schedule(tuple(held), tuple(owned), gather.route(), scatter.route())


class _Router:
    """Collects the segments of one direction and lays them out by peer."""

    def __init__(self, group_size: int, group_rank: int) -> None:
        self._rank = group_rank
        self._sends: list[list[Item]] = [[] for _ in range(group_size)]
        self._receives: list[list[Item]] = [[] for _ in range(group_size)]
        self._local: list[Segment] = []

    def add(self, source: int, target: int, item: Item) -> None:
        if source == target == self._rank:
            matrix, part, box, held = item
            self._local.append(Segment(matrix, part, box, -1, held))
        elif source == self._rank:
            self._sends[target].append(item)
        elif target == self._rank:
            self._receives[source].append(item)

    def route(self) -> Route:
        sends, send_splits = _lay_out(self._sends)
        receives, receive_splits = _lay_out(self._receives)
        return Route(sends, receives, tuple(self._local), send_splits, receive_splits)


def _lay_out(
    by_peer: list[list[Item]],
) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
    segments, splits, offset = [], [], 0
    for peer in by_peer:
        begin = offset
        for matrix, part, box, held in peer:
            segments.append(Segment(matrix, part, box, offset, held))
            offset += box.numel
        splits.append(offset - begin)
    return tuple(segments), tuple(splits)
