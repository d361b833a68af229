"""What a step allocates on each rank beyond weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add, sub

from flashns_dist.plan.plan import Matrix, step_order
from flashns_dist.plan.timeline import Batches
from flashns_dist.plan.traffic import Traffic


@dataclass(frozen=True)
class BucketMemory:
    """Bytes that one bucket takes, by group rank.

    Attributes:
        held: In the buffer of what a rank holds: sent by the gather, received by the scatter.
        owned: In the buffer of what it owns: received by the gather, sent by the scatter.
        batches: The matrices that it owns, which become their results one batch after the other.
        workspace: To orthogonalize the batch that takes most, its result included.
        passes: Of the elementwise passes before and after.
    """

    held: list[int]
    owned: list[int]
    batches: list[int]
    workspace: list[int]
    passes: list[int]


def bucket_memory(
    matrices: Sequence[Matrix],
    bucket: Sequence[int],
    batches: Mapping[int, Batches],
    traffic: Traffic,
    wire_itemsize: int,
) -> BucketMemory:
    """What one bucket takes.

    Args:
        matrices: In parameter order.
        bucket: Indices of its matrices.
        batches: By rank, as ``timeline.batches_of`` finds them.
        traffic: What the bucket makes ranks send, receive, store and own.
        wire_itemsize: Bytes per element that travels.
    """
    workspace = [0] * len(traffic.owned)
    known: dict[int, int] = {}  # owners of the same have one object in common
    for rank, counts in batches.items():
        most = known.get(id(counts))
        if most is None:
            most = max(count * each for (_, _, each), count in counts.items())
            known[id(counts)] = most
        workspace[rank] = most
    each = max((matrices[index].pass_bytes for index in bucket), default=0.0)
    return BucketMemory(
        [n * wire_itemsize for n in map(max, traffic.gather_sends, traffic.scatter_receives)],
        [n * wire_itemsize for n in map(max, traffic.gather_receives, traffic.scatter_sends)],
        [n * wire_itemsize for n in traffic.owned],
        workspace,
        [int(n * each) for n in traffic.stored],
    )


def step_memory(
    buckets: Sequence[BucketMemory], group_size: int, depths: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each depth, bytes by group rank: of the buffers, and with them at the peak of a step."""
    # Ranks that do the same, as replicas do, are counted once.
    columns = list(zip(*(each for b in buckets for each in vars(b).values()), strict=True))
    first: dict[tuple[int, ...], int] = {}
    numbers = [first.setdefault(column, len(first)) for column in columns] or [0] * group_size
    rows = iter(zip(*first, strict=True))
    unlike = [BucketMemory(*(list(next(rows)) for _ in vars(b))) for b in buckets]
    found = []
    for depth in depths:
        buffers, memory = _of_depth(unlike, max(len(first), 1), depth)
        found.append((tuple(buffers[n] for n in numbers), tuple(memory[n] for n in numbers)))
    return found


def _of_depth(
    buckets: Sequence[BucketMemory], size: int, depth: int
) -> tuple[list[int], list[int]]:
    held = owned = live = peak = [0] * size
    for bucket in buckets:
        held, owned = list(map(max, held, bucket.held)), list(map(max, owned, bucket.owned))
    pairs = min(depth, len(buckets))
    buffers = [pairs * both for both in map(add, held, owned)]
    for turn, number in step_order(len(buckets), depth):
        bucket = buckets[number]
        if turn == "gather":
            live = list(map(add, live, bucket.batches))
        beside = bucket.workspace if turn == "compute" else bucket.passes
        peak = list(map(max, peak, map(add, live, beside)))
        if turn == "finish":
            live = list(map(sub, live, bucket.batches))
    return buffers, list(map(add, buffers, peak))
