"""Which ranks orthogonalize which matrices: balanced over all shapes together."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache

from flashns_dist.layout import Block, Layout, block_holders
from flashns_dist.plan.plan import Matrix


def assign_owners(
    matrices: Sequence[Matrix],
    group_size: int,
    seconds: Sequence[float],
    move_seconds: Sequence[float],
    share: int,
) -> list[tuple[int, ...]]:
    """Owners of each matrix, ascending.

    Matrices that live whole on one rank, or whose replicas all do their own, are placed where they
    live. The others go, largest first, to the rank that would finish first. Then the busiest rank
    gives whole matrices away to the idlest one, as long as both would finish earlier than the
    busiest does now, moving included.

    Args:
        matrices: In parameter order.
        group_size: Ranks in the process group.
        seconds: To orthogonalize each matrix.
        move_seconds: To send each whole matrix to another rank and its result back.
        share: Over how many replicas one orthogonalization is shared; where a matrix has more
            replicas, groups of ``share`` of them repeat it.
    """
    load = [0.0] * group_size
    owners: list[tuple[int, ...]] = [()] * len(matrices)
    order = sorted(range(len(matrices)), key=lambda i: (-seconds[i], i))
    free: list[int] = []
    home: list[list[int]] = [[] for _ in range(group_size)]
    for index in order:
        matrix = matrices[index]
        if _is_repeated(matrix, share):
            candidates = _mirrored(matrix.layout, matrix.block, share)
            if len(candidates) > share:  # it lies across ranks: they can choose
                free.append(index)
                continue
            owners[index] = _least_loaded(candidates, load)
        else:
            whole = _whole_holders(matrix.layout, matrix.block)
            if not whole or len(whole) == group_size:
                free.append(index)
                continue
            owners[index] = _least_loaded([(rank,) for rank in whole], load)
            home[owners[index][0]].append(index)
        for rank in owners[index]:
            load[rank] += seconds[index]
    _place(free, matrices, seconds, share, owners, load)
    _relieve(home, seconds, move_seconds, owners, load)
    return owners


def _is_repeated(matrix: Matrix, share: int) -> bool:
    return share < matrix.layout.num_replicas and matrix.layout.num_replicas % share == 0


def _least_loaded(candidates: Sequence[tuple[int, ...]], load: Sequence[float]) -> tuple[int, ...]:
    """The candidates' ranks whose busiest one has least to do; the first of equals."""
    return min(candidates, key=lambda ranks: (max(load[rank] for rank in ranks), ranks))


@cache
def _mirrored(layout: Layout, block: Block, share: int) -> list[tuple[int, ...]]:
    """For each rank of the first ``share`` replicas, it and its image in the other ones."""
    return [
        ranks[place::share]
        for _, _, ranks in block_holders(layout, block)
        for place in range(share)
    ]


@cache
def _whole_holders(layout: Layout, block: Block) -> tuple[int, ...]:
    """The ranks that store all of a matrix."""
    whole: set[int] | None = None
    for _, _, ranks in block_holders(layout, block):
        whole = set(ranks) if whole is None else whole.intersection(ranks)
        if not whole:
            return ()
    return tuple(sorted(whole or ()))


def _place(
    free: Sequence[int],
    matrices: Sequence[Matrix],
    seconds: Sequence[float],
    share: int,
    owners: list[tuple[int, ...]],
    load: list[float],
) -> None:
    """Give each matrix, largest first, to the rank that has least to do (or to such replicas)."""
    idle = [(seconds, rank) for rank, seconds in enumerate(load)]
    heapq.heapify(idle)
    for index in free:
        matrix = matrices[index]
        if _is_repeated(matrix, share):
            owners[index] = _least_loaded(_mirrored(matrix.layout, matrix.block, share), load)
        else:
            while idle[0][0] != load[idle[0][1]]:
                heapq.heappop(idle)
            owners[index] = (idle[0][1],)
        for rank in owners[index]:
            load[rank] += seconds[index]
            heapq.heappush(idle, (load[rank], rank))


def _relieve(
    home: list[list[int]],
    seconds: Sequence[float],
    move_seconds: Sequence[float],
    owners: list[tuple[int, ...]],
    load: list[float],
) -> None:
    """Move whole matrices from the busiest rank to the idlest while that pays."""
    price = [s + m for s, m in zip(seconds, move_seconds, strict=True)]
    for indices in home:
        indices.sort(key=lambda i: (price[i], i))
    busy = [(-seconds, rank) for rank, seconds in enumerate(load)]
    idle = [(seconds, rank) for rank, seconds in enumerate(load)]
    heapq.heapify(busy)
    heapq.heapify(idle)
    while True:
        while -busy[0][0] != load[busy[0][1]]:
            heapq.heappop(busy)
        while idle[0][0] != load[idle[0][1]]:
            heapq.heappop(idle)
        busiest, idlest = busy[0][1], idle[0][1]
        gap = load[busiest] - load[idlest]
        movable = home[busiest]
        # The largest that at most halves the gap, or else the smallest, if it narrows the gap.
        at = max(bisect_right(movable, gap / 2, key=lambda i: price[i]) - 1, 0)
        if not movable or price[movable[at]] >= gap:
            return
        index = movable.pop(at)
        owners[index] = (idlest,)
        for rank, change in ((busiest, -seconds[index]), (idlest, seconds[index])):
            load[rank] += change
            heapq.heappush(busy, (-load[rank], rank))
            heapq.heappush(idle, (load[rank], rank))
