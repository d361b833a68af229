"""Makes a plan: balanced owners over all shapes together, and byte-capped buckets."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from math import ceil, sqrt
from typing import Literal

from flashns_dist.layout import block_holders
from flashns_dist.plan.cost import CostModel
from flashns_dist.plan.plan import Matrix, Plan, Prediction

Replicas = Literal["auto", "share", "repeat"]
DEFAULT_BUCKET_BYTES = 64 * 2**20


def make_plan(
    matrices: Sequence[Matrix],
    group_size: int,
    *,
    cost: CostModel | None = None,
    wire_itemsize: int = 2,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    replicas: Replicas = "auto",
) -> Plan:
    """Decide owners, buckets and their order. Deterministic, pure Python, no collectives.

    Owners are assigned largest matrix first to the rank that would finish first; a matrix that
    lives whole on some rank stays there unless moving it pays for the bytes. Buckets cut every
    owner's list, sorted by shape, at equal fractions of its time, so that each bucket is balanced
    too.

    Args:
        matrices: In parameter order, the same on every rank.
        group_size: Ranks in the process group.
        cost: Cost model (default: one H200's).
        wire_itemsize: Bytes per element that travels.
        bucket_bytes: Most bytes that a rank receives, or sends, in one gather; a single larger
            matrix still gets a bucket to itself.
        replicas: ``"share"`` divides the matrices among replicas, ``"repeat"`` lets each replica
            do all of them without talking to the others, ``"auto"`` takes what is predicted faster.

    Raises:
        ValueError: A layout is for another group size, or an argument is out of range.
    """
    if replicas not in ("auto", "share", "repeat"):
        raise ValueError(f'replicas={replicas!r} is unknown; use "auto", "share" or "repeat"')
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes={bucket_bytes} must be positive")
    for matrix in matrices:
        if matrix.layout.group_size != group_size:
            raise ValueError(
                f"{matrix.name}: its layout is for {matrix.layout.group_size} ranks, but the group "
                f"has {group_size}"
            )
    cost = cost or CostModel()
    plans = []
    for share in _share_candidates(matrices, replicas):
        owners = _assign_owners(matrices, group_size, cost, wire_itemsize, share)
        plans.append(_finish(matrices, group_size, owners, cost, wire_itemsize, bucket_bytes))
    return min(plans, key=lambda plan: plan.prediction.step_seconds)


def _share_candidates(matrices: Sequence[Matrix], replicas: Replicas) -> list[int]:
    """Over how many replicas one orthogonalization may be shared: all, some, or none (1)."""
    most = max((m.layout.num_replicas for m in matrices), default=1)
    if replicas != "auto":
        return [most if replicas == "share" else 1]
    return [share for share in range(most, 0, -1) if most % share == 0 and share in (1, 8, most)]


def _by_cost(matrices: Sequence[Matrix], cost: CostModel) -> tuple[list[int], list[float]]:
    """Indices, most expensive first (ties in parameter order), and the seconds of each matrix."""
    seconds = [cost.orthogonalize_seconds(*m.block.shape) for m in matrices]
    return sorted(range(len(matrices)), key=lambda i: (-seconds[i], i)), seconds


def _whole_holders(matrix: Matrix) -> tuple[int, ...]:
    """The ranks that store all of a matrix."""
    boxes = block_holders(matrix.layout, matrix.block)
    if not boxes:
        return ()
    whole = set(boxes[0][2])
    for _, _, ranks in boxes[1:]:
        whole.intersection_update(ranks)
    return tuple(sorted(whole))


def _assign_owners(
    matrices: Sequence[Matrix],
    group_size: int,
    cost: CostModel,
    wire_itemsize: int,
    share: int,
) -> list[tuple[int, ...]]:
    """Largest matrix first, to the rank that would finish first."""
    order, seconds = _by_cost(matrices, cost)
    load = [0.0] * group_size
    idle = [(0.0, rank) for rank in range(group_size)]
    owners: list[tuple[int, ...]] = [()] * len(matrices)
    for index in order:
        matrix = matrices[index]
        if share < matrix.layout.num_replicas and matrix.layout.num_replicas % share == 0:
            owners[index] = _mirrored_owners(matrix, load, share)
        else:
            while idle[0][0] != load[idle[0][1]]:
                heapq.heappop(idle)
            finish, owner = idle[0]
            whole = _whole_holders(matrix)
            if whole and len(whole) < group_size:
                stay = min(whole, key=lambda rank: (load[rank], rank))
                if owner not in whole:
                    finish += 2 * cost.wire_seconds(matrix.numel * wire_itemsize)
                if load[stay] <= finish:
                    owner = stay
            owners[index] = (owner,)
        for rank in owners[index]:
            load[rank] += seconds[index]
            heapq.heappush(idle, (load[rank], rank))
    return owners


def _mirrored_owners(matrix: Matrix, load: Sequence[float], share: int) -> tuple[int, ...]:
    """The least loaded rank of the first ``share`` replicas, and its image in the other ones."""
    candidates = [
        (load[ranks[position]], ranks[position], ranks[position::share])
        for _, _, ranks in block_holders(matrix.layout, matrix.block)
        for position in range(share)
    ]
    return min(candidates)[2]


def _finish(
    matrices: Sequence[Matrix],
    group_size: int,
    owners: Sequence[tuple[int, ...]],
    cost: CostModel,
    wire_itemsize: int,
    bucket_bytes: int,
) -> Plan:
    compute = [0.0] * group_size
    buffered = [0.0] * group_size
    for matrix, ranks in zip(matrices, owners, strict=True):
        for rank in ranks:
            compute[rank] += cost.orthogonalize_seconds(*matrix.block.shape)
            buffered[rank] += _buffered_elements(matrix, ranks) * wire_itemsize
    sent = _sent_bytes(matrices, group_size, owners, wire_itemsize)
    wire = cost.wire_seconds(max(sent, default=0.0))
    latency = 2 * cost.exchange_seconds if wire else 0.0
    most_owned = max(_count(owners, group_size), default=0)
    num_buckets = max(1, ceil(max(buffered, default=0.0) / bucket_bytes))
    if latency:
        num_buckets = max(num_buckets, round(sqrt(wire / latency)))
    num_buckets = max(1, min(num_buckets, most_owned))
    buckets = _cut(matrices, group_size, owners, cost, num_buckets)
    while (
        _largest_bucket(matrices, group_size, owners, buckets) * wire_itemsize > bucket_bytes
        and num_buckets < most_owned
    ):
        num_buckets = min(most_owned, num_buckets + max(1, num_buckets // 4))
        buckets = _cut(matrices, group_size, owners, cost, num_buckets)
    busiest = max(compute, default=0.0)
    step = max(busiest, wire) + wire / len(buckets) + len(buckets) * latency if buckets else 0.0
    prediction = Prediction(tuple(compute), tuple(sent), step)
    return Plan(group_size, tuple(matrices), tuple(owners), buckets, prediction)


def _buffered_elements(matrix: Matrix, owners: Sequence[int]) -> int:
    """What an owner receives of a matrix, or sends of its result, whichever is more."""
    return matrix.numel * max(matrix.layout.num_replicas // len(owners), 1)


def _count(owners: Sequence[tuple[int, ...]], group_size: int) -> list[int]:
    counts = [0] * group_size
    for ranks in owners:
        for rank in ranks:
            counts[rank] += 1
    return counts


def _sent_bytes(
    matrices: Sequence[Matrix],
    group_size: int,
    owners: Sequence[tuple[int, ...]],
    wire_itemsize: int,
) -> list[float]:
    """Bytes that each rank sends to others: its fragments to the owners, results to the holders."""
    sent = [0.0] * group_size
    by_layout: dict[tuple[int, object, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_layout[id(matrix.layout), matrix.block, len(owners[index])].append(index)
    for (_, _, num_owners), indices in by_layout.items():
        matrix = matrices[indices[0]]
        for _, box, ranks in block_holders(matrix.layout, matrix.block):
            copies = max(len(ranks) // num_owners, 1)
            for rank in ranks:
                sent[rank] += len(indices) * box.numel / copies
            for index in indices:
                for owner in owners[index]:
                    if owner in ranks:
                        sent[owner] += box.numel * (copies - 1) - box.numel / copies
                    else:
                        sent[owner] += box.numel * copies
    return [elements * wire_itemsize for elements in sent]


def _cut(
    matrices: Sequence[Matrix],
    group_size: int,
    owners: Sequence[tuple[int, ...]],
    cost: CostModel,
    num_buckets: int,
) -> tuple[tuple[int, ...], ...]:
    """Cut each owner's matrices, sorted by shape, at equal fractions of its time."""
    owned: list[list[int]] = [[] for _ in range(group_size)]
    for index, ranks in enumerate(owners):
        owned[ranks[0]].append(index)
    buckets: list[list[int]] = [[] for _ in range(num_buckets)]
    for indices in owned:
        indices.sort(key=lambda i: (matrices[i].block.shape, matrices[i].kind, i), reverse=True)
        seconds = [cost.orthogonalize_seconds(*matrices[i].block.shape) for i in indices]
        total, done = sum(seconds), 0.0
        for index, duration in zip(indices, seconds, strict=True):
            fraction = (done + duration / 2) / total
            buckets[min(int(fraction * num_buckets), num_buckets - 1)].append(index)
            done += duration
    return tuple(tuple(sorted(bucket)) for bucket in buckets if bucket)


def _largest_bucket(
    matrices: Sequence[Matrix],
    group_size: int,
    owners: Sequence[tuple[int, ...]],
    buckets: Sequence[Sequence[int]],
) -> int:
    """Most elements that one owner buffers in one bucket (single matrices do not count)."""
    largest = 0
    for bucket in buckets:
        elements, counts = [0] * group_size, [0] * group_size
        for index in bucket:
            for owner in owners[index]:
                elements[owner] += _buffered_elements(matrices[index], owners[index])
                counts[owner] += 1
        several = (e for e, c in zip(elements, counts, strict=True) if c > 1)
        largest = max(largest, max(several, default=0))
    return largest
