"""How long a step takes: stages of buckets on two streams, and the host that launches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flashns_dist.plan.cost import CostModel
from flashns_dist.plan.plan import Matrix, Plan, step_order
from flashns_dist.plan.traffic import Traffic


@dataclass(frozen=True)
class Stages:
    """Seconds of one bucket, of the slowest rank in each stage.

    Attributes:
        before: Momentum and packing of the stored pieces.
        gather: Pieces to owners.
        owner: Unpacking, orthogonalization, packing.
        scatter: Results to holders.
        after: Update of the stored pieces.
        host: To launch all of that.
    """

    before: float
    gather: float
    owner: float
    scatter: float
    after: float
    host: float


Batches: TypeAlias = "Counter[tuple[tuple[int, int], str, int]]"
"""How many matrices of one bucket a rank owns, by shape, kind and workspace."""


def batches_of(
    matrices: Sequence[Matrix], owners: Sequence[tuple[int, ...]], bucket: Sequence[int]
) -> dict[int, Batches]:
    """What the owners of a bucket's matrices orthogonalize, by rank."""
    together: dict[tuple[int, ...], Batches] = {}
    for index in bucket:
        matrix = matrices[index]
        key = (matrix.work_shape, matrix.kind, matrix.workspace_bytes)
        together.setdefault(owners[index], Counter())[key] += 1
    batches: dict[int, Batches] = {}
    for ranks, counts in together.items():
        for rank in ranks:
            found = batches.get(rank)
            batches[rank] = counts if found is None else found + counts
    return batches


def bucket_stages(
    batches: Mapping[int, Batches], traffic: Traffic, cost: CostModel, wire_itemsize: int
) -> Stages:
    """What the cost model says of one bucket.

    Args:
        batches: By rank.
        traffic: What the bucket makes ranks send, receive, store and own.
        cost: Cost model.
        wire_itemsize: Bytes per element that travels.
    """
    known: dict[tuple[tuple[int, int], int], float] = {}
    busiest, most_batches = 0.0, 0
    for rank, counts in batches.items():
        seconds = cost.memory_seconds(cost.copy_bytes * traffic.owned[rank])
        for (shape, *_), count in counts.items():
            key = (shape, count)
            if key not in known:
                known[key] = cost.orthogonalize_batch_seconds(*shape, count)
            seconds += known[key]
        busiest, most_batches = max(busiest, seconds), max(most_batches, len(counts))
    stored = max(traffic.stored, default=0)
    gather = max(*traffic.gather_sends, *traffic.gather_receives)
    scatter = max(*traffic.scatter_sends, *traffic.scatter_receives)
    return Stages(
        cost.memory_seconds(cost.before_bytes * stored),
        _travel(gather * wire_itemsize, cost),
        busiest,
        _travel(scatter * wire_itemsize, cost),
        cost.memory_seconds(cost.after_bytes * stored),
        cost.bucket_seconds + cost.batch_seconds * most_batches,
    )


def _travel(num_bytes: int, cost: CostModel) -> float:
    return cost.exchange_seconds + cost.wire_seconds(num_bytes) if num_bytes else 0.0


def step_seconds(stages: Sequence[Stages], cost: CostModel, depth: int) -> float:
    """Seconds of a step: the order of ``step_order``, with one stream that computes and one wire.

    The host runs ahead of the device, or else is what a step waits for.
    """
    if not stages:
        return 0.0
    computing = wire = 0.0
    arrived = [0.0] * len(stages)  # on the wire: pieces at the owners, then results at the holders
    for turn, bucket in step_order(len(stages), depth):
        stage = stages[bucket]
        if turn == "gather":
            computing += stage.before
            wire = arrived[bucket] = max(computing, wire) + stage.gather
        elif turn == "compute":
            computing = max(computing, arrived[bucket]) + stage.owner
            wire = arrived[bucket] = max(computing, wire) + stage.scatter
        else:
            computing = max(computing, arrived[bucket]) + stage.after
    return cost.step_seconds + max(computing, sum(stage.host for stage in stages))


def plan_stages(plan: Plan, cost: CostModel, wire_itemsize: int = 2) -> list[Stages]:
    """What another cost model than the plan's own says of its buckets."""
    found = []
    for bucket in plan.buckets:
        traffic = Traffic(plan.group_size)
        traffic.add(plan.matrices, plan.owners, bucket)
        batches = batches_of(plan.matrices, plan.owners, bucket)
        found.append(bucket_stages(batches, traffic, cost, wire_itemsize))
    return found
