"""Which rank sends what to whom, for one box of one matrix. Every rank derives the same answers.

``holders`` are the ranks that store the box and ``owners`` those that orthogonalize the matrix,
both ascending.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from flashns_dist.layout import Block, Layout, rank_pieces


def position(ranks: Sequence[int], rank: int) -> int:
    """Where ``rank`` stands among ascending ``ranks``; -1 where it does not."""
    at = bisect_left(ranks, rank)
    return at if at < len(ranks) and ranks[at] == rank else -1


def replica_of(layout: Layout, block: Block, owner: int, index: int) -> int:
    """Which replica an owner reads from: its own where it stores a part of the matrix.

    Other owners read from replica ``index`` (of the matrix), which spreads them evenly.
    """
    pieces = rank_pieces(layout, block, owner)
    return position(layout.holders[pieces[0].fragment.box], owner) if pieces else index


def source(holders: Sequence[int], owner: int, replica: int) -> int:
    """The holder whose copy an owner that reads from ``replica`` gets: its own if it has one."""
    return owner if position(holders, owner) >= 0 else holders[replica % len(holders)]


def supplier(owners: Sequence[int], holder: int, holders: Sequence[int]) -> int:
    """The owner whose result a holder gets: its own, where it is an owner."""
    if position(owners, holder) >= 0:
        return holder
    return owners[position(holders, holder) * len(owners) // len(holders)]


def supplied(owners: Sequence[int], owner: int, holders: Sequence[int]) -> list[int]:
    """The other holders that get an owner's result."""
    first, last = share_of(position(owners, owner), len(owners), len(holders))
    return [h for h in holders[first:last] if position(owners, h) < 0]


def share_of(place: int, num_owners: int, num_holders: int) -> tuple[int, int]:
    """The range of holders that owner ``place`` of ``num_owners`` supplies, itself included."""
    first = -(-place * num_holders // num_owners)
    return first, -(-(place + 1) * num_holders // num_owners)
