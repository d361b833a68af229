"""Makes a plan: balanced owners over all shapes together, and byte-capped buckets."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal

from flashns_dist.plan.buckets import Buckets
from flashns_dist.plan.cost import CostModel
from flashns_dist.plan.owners import assign_owners
from flashns_dist.plan.plan import Matrix, Plan, Prediction
from flashns_dist.plan.timeline import bucket_stages, step_seconds

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
    arrival: Sequence[int] | None = None,
) -> Plan:
    """Decide owners, buckets and their order. Deterministic, pure Python, no collectives.

    Owners are balanced over all shapes together (``assign_owners``). Buckets cut every owner's
    list, sorted by shape or by ``arrival``, at equal fractions of its time, so that each bucket is
    balanced too.

    Args:
        matrices: In parameter order, the same on every rank.
        group_size: Ranks in the process group.
        cost: Cost model (default: one H200's).
        wire_itemsize: Bytes per element that travels.
        bucket_bytes: Most bytes that a rank sends, receives or orthogonalizes in one bucket, in
            either direction (twice as much where nothing travels); or as much as a single matrix
            (with the copies that replicas get) takes, where that is more.
        replicas: ``"share"`` divides the matrices among replicas, ``"repeat"`` lets each replica
            do all of them without talking to the others, ``"auto"`` takes what is predicted faster.
        arrival: For each matrix, its place in the order in which gradients arrive, which the
            buckets then follow; None where all gradients are there before the first bucket.

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
    by_shape = {
        shape: cost.orthogonalize_seconds(*shape) for shape in {m.work_shape for m in matrices}
    }
    seconds = [by_shape[matrix.work_shape] for matrix in matrices]
    move = [2 * cost.wire_seconds(matrix.numel * wire_itemsize) for matrix in matrices]
    plans = []
    for share in _share_candidates(matrices, replicas):
        owners = assign_owners(matrices, group_size, seconds, move, share)
        cap = bucket_bytes // wire_itemsize
        buckets = Buckets(matrices, group_size, owners, seconds, cap, arrival)
        plans.append(_finish(buckets, cost, wire_itemsize))
    return min(plans, key=lambda plan: plan.prediction.step_seconds)


def _share_candidates(matrices: Sequence[Matrix], replicas: Replicas) -> list[int]:
    """Over how many replicas one orthogonalization may be shared: all, some, or none (1)."""
    most = max((m.layout.num_replicas for m in matrices), default=1)
    if replicas != "auto":
        return [most if replicas == "share" else 1]
    return [share for share in range(most, 0, -1) if most % share == 0 and share in (1, 8, most)]


def _finish(work: Buckets, cost: CostModel, wire_itemsize: int) -> Plan:
    """Choose the number of buckets, and predict."""
    sent = [elements * wire_itemsize for elements in work.total.sent]
    wire = cost.wire_seconds(max(sent, default=0))
    latency = 2 * cost.exchange_seconds if wire else 0.0
    cut = work.cut(round(sqrt(wire / latency)) if latency else 1)
    stages = [
        bucket_stages(work.matrices, work.owners, bucket, traffic, cost, wire_itemsize)
        for bucket, traffic in cut
    ]
    prediction = Prediction(tuple(work.busy), tuple(sent), step_seconds(stages, cost))
    buckets = tuple(bucket for bucket, _ in cut)
    return Plan(work.group_size, tuple(work.matrices), tuple(work.owners), buckets, prediction)
