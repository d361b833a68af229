"""How much each rank sends and receives, without listing every transfer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import lcm

from flashns_dist.layout import Block, Layout, block_holders, rank_pieces
from flashns_dist.plan.plan import Matrix
from flashns_dist.plan.routing import position, replica_of, share_of

_FEW = 16


class Traffic:
    """Elements that travel between ranks, by group rank and direction; exactly what schedules say.

    Of a matrix of which a part is selected in each step, what travels if the selection is spread
    evenly over its ranks.

    Attributes:
        gather_sends, gather_receives: Fragments to owners.
        scatter_sends, scatter_receives: Results to holders.
        owned: Elements of the matrices that a rank orthogonalizes.
        stored: Elements of them that a rank stores; of such a selection, its even part.
    """

    def __init__(self, group_size: int) -> None:
        self.gather_sends = [0] * group_size
        self.gather_receives = [0] * group_size
        self.scatter_sends = [0] * group_size
        self.scatter_receives = [0] * group_size
        self.owned = [0] * group_size
        self.stored = [0] * group_size

    @property
    def largest(self) -> int:
        """Most elements that a rank holds at once: sent, received or orthogonalized."""
        directions = (
            self.gather_sends,
            self.gather_receives,
            self.scatter_sends,
            self.scatter_receives,
            self.owned,
        )
        return max(max(direction, default=0) for direction in directions)

    @property
    def is_local(self) -> bool:
        """Whether nothing travels."""
        return not any(self.gather_sends) and not any(self.scatter_sends)

    @property
    def sent(self) -> list[int]:
        """Elements that each rank sends, both ways together."""
        return [g + s for g, s in zip(self.gather_sends, self.scatter_sends, strict=True)]

    def add(
        self, matrices: Sequence[Matrix], owners: Sequence[Sequence[int]], indices: Sequence[int]
    ) -> None:
        """Count some matrices.

        Matrices that lie alike share the work: per distinct block, one visit of each stored box;
        per distinct set of owners, one of each box that they store themselves.

        Args:
            matrices: All matrices of a plan.
            owners: For each, its owners.
            indices: Which to count.
        """
        alike: dict[tuple[int, Block, int], list[int]] = {}
        for index in indices:
            matrix = matrices[index]
            key = (id(matrix.layout), matrix.block, matrix.numel)
            alike.setdefault(key, []).append(index)
        for (_, block, numel), members in alike.items():
            layout = matrices[members[0]].layout
            if numel == block.rows * block.cols:
                self._add_alike(layout, block, owners, members)
            else:
                whole = Traffic(len(self.owned))
                whole._add_alike(layout, block, owners, members)
                self._add_part(whole, numel, block.rows * block.cols)

    def add_placed(self, places: Sequence[tuple[int, int]], owner: int) -> None:
        """Count one matrix, as ``places_of`` says."""
        moved = total = 0
        for holder, elements in places:
            total += elements
            self.stored[holder] += elements
            if holder != owner:
                moved += elements
                self.gather_sends[holder] += elements
                self.scatter_receives[holder] += elements
        self.owned[owner] += total
        if moved:
            self.gather_receives[owner] += moved
            self.scatter_sends[owner] += moved

    def _add_part(self, other: Traffic, numerator: int, denominator: int) -> None:
        """Add a fraction of another count."""
        for name, counts in vars(other).items():
            ours = getattr(self, name)
            for rank, count in enumerate(counts):
                ours[rank] += -(-count * numerator // denominator)

    def _add_alike(
        self, layout: Layout, block: Block, owners: Sequence[Sequence[int]], members: Sequence[int]
    ) -> None:
        stored = _stored(layout, block)
        for holders, elements in stored:
            for holder in holders:
                self.stored[holder] += len(members) * elements
        by_copies: Counter[int] = Counter()
        for holders, elements in stored:
            by_copies[len(holders)] += elements
        period = lcm(*by_copies)
        reads: Counter[int] = Counter()  # by replica, as if owners stored nothing themselves
        by_owners: dict[tuple[int, ...], list[int]] = {}
        for index in members:
            by_owners.setdefault(tuple(owners[index]), []).append(index)
        num_travelling = 0
        for ranks, indices in by_owners.items():
            if len(stored) == 1 and stored[0][0] == ranks:  # every replica does its own
                for owner in ranks:
                    self.owned[owner] += len(indices) * stored[0][1]
                continue
            num_travelling += len(indices)
            for place, owner in enumerate(ranks):
                if rank_pieces(layout, block, owner):
                    reads[replica_of(layout, block, owner, 0)] += len(indices)
                else:
                    reads.update(index % period for index in indices)
                self._add_owner(layout, block, ranks, place, len(indices), by_copies)
        for holders, elements in stored:
            for replica, count in reads.items():
                self.gather_sends[holders[replica % len(holders)]] += count * elements
            for holder in holders:
                self.scatter_receives[holder] += num_travelling * elements

    def _add_owner(
        self,
        layout: Layout,
        block: Block,
        owners: Sequence[int],
        place: int,
        count: int,
        by_copies: Counter[int],
    ) -> None:
        """One owner of ``count`` matrices that lie alike, less what it stores itself."""
        owner = owners[place]
        numel = count * block.rows * block.cols
        self.owned[owner] += numel
        self.gather_receives[owner] += numel
        for copies, elements in by_copies.items():
            first, last = share_of(place, len(owners), copies)
            self.scatter_sends[owner] += count * elements * (last - first)
        replica = replica_of(layout, block, owner, 0)
        for piece in rank_pieces(layout, block, owner):
            elements = count * piece.box.numel
            holders = layout.holders[piece.fragment.box]
            self.gather_receives[owner] -= elements
            self.gather_sends[holders[replica % len(holders)]] -= elements
            self.scatter_receives[owner] -= elements
            instead = position(holders, owner) * len(owners) // len(holders)
            self.scatter_sends[owners[instead]] -= elements


def places_of(matrix: Matrix) -> tuple[tuple[int, int], ...] | None:
    """The (rank, elements) that store a matrix without replicas, all of which travels.

    None for others, and where many ranks store it: ``Traffic.add`` counts these faster.
    """
    stored = _stored(matrix.layout, matrix.block)
    if matrix.work is not None or len(stored) > _FEW or any(len(h) != 1 for h, _ in stored):
        return None
    return tuple((holder, elements) for (holder,), elements in stored)


@cache
def _stored(layout: Layout, block: Block) -> tuple[tuple[tuple[int, ...], int], ...]:
    """How many elements of a block lie on the same ranks: (the ranks, elements)."""
    elements: Counter[tuple[int, ...]] = Counter()
    for _, box, holders in block_holders(layout, block):
        elements[holders] += box.numel
    return tuple(elements.items())
