"""Which matrices move and are orthogonalized together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from flashns_dist.plan.plan import Matrix
from flashns_dist.plan.traffic import Traffic, places_of

_MOST_GROWTH = 0.25  # of the number of buckets, from one attempt to the next


class Buckets:
    """Cuts the work of one assignment of owners into byte-capped buckets.

    Args:
        matrices: In parameter order.
        group_size: Ranks in the process group.
        owners: Of each matrix.
        seconds: To orthogonalize each matrix.
        arrival: For each matrix, its place in the order of the buckets; None for the order of their
            shapes, of which a bucket then makes the largest batches.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        group_size: int,
        owners: Sequence[tuple[int, ...]],
        seconds: Sequence[float],
        arrival: Sequence[int] | None = None,
    ) -> None:
        self.matrices, self.group_size, self.owners = matrices, group_size, owners
        self._places = [places_of(matrix) for matrix in matrices]
        self.total = self._traffic(range(len(matrices)))
        self.busy = [0.0] * group_size
        self.most_owned = 0
        self._seconds = seconds
        self._owned: list[list[int]] = [[] for _ in range(group_size)]
        counts = [0] * group_size
        for index, ranks in enumerate(owners):
            self._owned[ranks[0]].append(index)
            for rank in ranks:
                self.busy[rank] += seconds[index]
                counts[rank] += 1
        self.most_owned = max(counts, default=0)
        for indices in self._owned:
            indices.sort(key=lambda i: (matrices[i].work_shape, matrices[i].kind, i), reverse=True)
            if arrival is not None:
                indices.sort(key=lambda i: arrival[i])
        alone = (
            matrix.numel * max(-(-matrix.layout.num_replicas // len(ranks)), 1)
            for matrix, ranks in zip(matrices, owners, strict=True)
        )
        self._alone = max(alone, default=0)
        self._cap = self._local_cap = 0

    def caps(self, cap: int) -> tuple[int, int]:
        """What ``cut`` makes of a cap where something travels, and where nothing does.

        A single matrix (with the copies that replicas get) may take more. Where nothing travels
        there are no transfer buffers, and a bucket may be twice as large.
        """
        return max(cap, self._alone), max(2 * cap, self._alone)

    def cut(self, at_least: int, cap: int) -> list[tuple[tuple[int, ...], Traffic]]:
        """Buckets and their traffic.

        Args:
            at_least: How many there are, where there are enough matrices.
            cap: Most elements that a rank holds of one: see ``caps``.
        """
        self._cap, self._local_cap = self.caps(cap)
        if not self.matrices:
            return []
        number = max(at_least, ceil(self._fill(self.total)), 1)
        while True:
            number = min(number, self.most_owned)
            buckets, traffic, excess = self._evenly(number), [], 0.0
            is_last = number == self.most_owned
            for bucket in buckets:
                traffic.append(self._traffic(bucket))
                excess = max(excess, self._fill(traffic[-1]))
                if excess - 1 >= _MOST_GROWTH and not is_last:
                    break  # there will be more of them anyway
            if excess <= 1:
                return [(tuple(sorted(b)), t) for b, t in zip(buckets, traffic, strict=True)]
            if is_last:
                break
            number += max(1, int(number * min(excess - 1, _MOST_GROWTH)))
        kept: list[tuple[tuple[int, ...], Traffic]] = []
        for bucket, t in zip(buckets, traffic, strict=True):
            parts = [bucket] if self._fill(t) <= 1 else self._split(bucket)
            kept += [(tuple(sorted(p)), t if p is bucket else self._traffic(p)) for p in parts]
        return kept

    def _evenly(self, number: int) -> list[list[int]]:
        """Cut each owner's matrices at equal fractions of its time."""
        buckets: list[list[int]] = [[] for _ in range(number)]
        for indices in self._owned:
            total, done = sum(self._seconds[i] for i in indices), 0.0
            for index in indices:
                fraction = (done + self._seconds[index] / 2) / total
                buckets[min(int(fraction * number), number - 1)].append(index)
                done += self._seconds[index]
        return [bucket for bucket in buckets if bucket]

    def _fill(self, traffic: Traffic) -> float:
        """Of its cap, what a bucket takes."""
        return traffic.largest / (self._local_cap if traffic.is_local else self._cap)

    def _traffic(self, bucket: Sequence[int]) -> Traffic:
        traffic = Traffic(self.group_size)
        others = []
        for index in bucket:
            places = self._places[index]
            if places is None:
                others.append(index)
            else:
                traffic.add_placed(places, self.owners[index][0])
        if others:
            traffic.add(self.matrices, self.owners, others)
        return traffic

    def _split(self, bucket: Sequence[int]) -> list[list[int]]:
        """Parts of a bucket that keep to the cap, one matrix of each owner in turn.

        Needed where a rank stores much more than it owns: it sends to many owners in one bucket.
        """
        turns: dict[int, int] = {}
        order = []
        for index in bucket:
            owner = self.owners[index][0]
            order.append((turns.setdefault(owner, 0), owner, index))
            turns[owner] += 1
        parts: list[list[int]] = [[]]
        traffic = Traffic(self.group_size)
        for _, _, index in sorted(order):
            traffic.add(self.matrices, self.owners, [index])
            if parts[-1] and self._fill(traffic) > 1:
                parts.append([])
                traffic = self._traffic([index])
            parts[-1].append(index)
        return parts
