"""Makes a plan: balanced owners over all shapes together, and buckets that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from typing import Literal

from flashns_dist.plan.buckets import Buckets
from flashns_dist.plan.cost import CostModel
from flashns_dist.plan.memory import bucket_memory, step_memory
from flashns_dist.plan.owners import assign_owners
from flashns_dist.plan.plan import Matrix, Plan, Prediction
from flashns_dist.plan.timeline import batches_of, bucket_stages, step_seconds

Replicas = Literal["auto", "share", "repeat"]
DEFAULT_MEMORY_BYTES = 2**30
LARGEST_BUCKET_BYTES, SMALLEST_BUCKET_BYTES = 2**30, 2**26  # that are tried whether they fit or not


def make_plan(
    matrices: Sequence[Matrix],
    group_size: int,
    *,
    cost: CostModel | None = None,
    wire_itemsize: int = 2,
    bucket_bytes: int | None = None,
    memory_bytes: int | None = None,
    must_fit: bool = True,
    replicas: Replicas = "auto",
    arrival: Sequence[int] | None = None,
) -> Plan:
    """Decide owners, buckets and their order. Deterministic, pure Python, no collectives.

    Owners are balanced over all shapes together (``assign_owners``). Buckets cut every owner's
    list, sorted by shape or by ``arrival``, at equal fractions of its time, so that each bucket is
    balanced too. Of several sizes of buckets, with one to three of them under way, the plan is what
    is predicted to be fastest and to fit; what takes less memory, where that costs less than 1 %.

    Args:
        matrices: In parameter order, the same on every rank.
        group_size: Ranks in the process group.
        cost: Cost model (default: one H200's).
        wire_itemsize: Bytes per element that travels.
        bucket_bytes: Most bytes that a rank sends, receives or orthogonalizes in one bucket, in
            either direction (twice as much where nothing travels); or as much as a single matrix
            (with the copies that replicas get) takes, where that is more. None to choose.
        memory_bytes: Most bytes that a step may be predicted to take on a rank. None for
            ``DEFAULT_MEMORY_BYTES`` where that can be (else within a tenth of the least), or for no
            bound where ``bucket_bytes`` is given.
        must_fit: Whether to raise where nothing fits into ``memory_bytes``; if not, the plan is
            within a tenth of the least.
        replicas: ``"share"`` divides the matrices among replicas, ``"repeat"`` lets each replica
            do all of them without talking to the others, ``"auto"`` takes what is predicted faster.
        arrival: For each matrix, its place in the order in which gradients arrive, which the
            buckets then follow, of which large ones would wait long for their last gradient; None
            where all gradients are there before the first bucket.

    Raises:
        ValueError: A layout is for another group size, an argument is out of range, or nothing fits
            into ``memory_bytes``.
    """
    if replicas not in ("auto", "share", "repeat"):
        raise ValueError(f'replicas={replicas!r} is unknown; use "auto", "share" or "repeat"')
    for name, given in (("bucket_bytes", bucket_bytes), ("memory_bytes", memory_bytes)):
        if given is not None and given <= 0:
            raise ValueError(f"{name}={given} must be positive")
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
    most: float = memory_bytes or (DEFAULT_MEMORY_BYTES if bucket_bytes is None else inf)
    found: list[Plan] = []
    for share in _share_candidates(matrices, replicas):
        owners = assign_owners(matrices, group_size, seconds, move, share)
        work = Buckets(matrices, group_size, owners, seconds, arrival)
        if bucket_bytes is not None:
            found += _plans(work, cost, wire_itemsize, bucket_bytes)
        else:
            largest = LARGEST_BUCKET_BYTES if arrival is None else SMALLEST_BUCKET_BYTES
            found += _plans_that_fit(work, cost, wire_itemsize, most, largest)
    least = min(found, key=_memory)
    if _memory(least) > most:
        if memory_bytes is not None and must_fit:
            raise ValueError(_no_fit(least, memory_bytes, wire_itemsize, bucket_bytes))
        most = 1.1 * _memory(least)
    return _fastest([plan for plan in found if _memory(plan) <= most])


def _share_candidates(matrices: Sequence[Matrix], replicas: Replicas) -> list[int]:
    """Over how many replicas one orthogonalization may be shared: all, some, or none (1)."""
    most = max((m.layout.num_replicas for m in matrices), default=1)
    if replicas != "auto":
        return [most if replicas == "share" else 1]
    return [share for share in range(most, 0, -1) if most % share == 0 and share in (1, 8, most)]


def _plans_that_fit(
    work: Buckets, cost: CostModel, wire_itemsize: int, most: float, largest: int
) -> list[Plan]:
    """Plans with buckets of all sizes in turn, and smaller ones while not even these fit."""
    found: list[Plan] = []
    size, before = largest, None
    while size > SMALLEST_BUCKET_BYTES and work.total.largest * wire_itemsize <= size // 2:
        size //= 2  # all sizes that hold everything make the same plan
    while True:
        caps = work.caps(size // wire_itemsize)
        if caps == before:
            return found
        found += _plans(work, cost, wire_itemsize, size)
        if size <= SMALLEST_BUCKET_BYTES and _memory(found[-1]) <= most:
            return found
        size, before = size // 2, caps


def _plans(work: Buckets, cost: CostModel, wire_itemsize: int, bucket_bytes: int) -> list[Plan]:
    """With one to three buckets under way."""
    sent = [elements * wire_itemsize for elements in work.total.sent]
    wire = cost.wire_seconds(max(sent, default=0))
    latency = 2 * cost.exchange_seconds if wire else 0.0
    at_least = round(sqrt(wire / latency)) if latency else 1
    cut = work.cut(at_least, bucket_bytes // wire_itemsize)
    stages, memories = [], []
    for bucket, traffic in cut:
        batches = batches_of(work.matrices, work.owners, bucket)
        stages.append(bucket_stages(batches, traffic, cost, wire_itemsize))
        memories.append(bucket_memory(work.matrices, bucket, batches, traffic, wire_itemsize))
    depths = range(1, 2 if len(cut) < 2 else 4)
    found = []
    for depth, (buffers, memory) in zip(
        depths, step_memory(memories, work.group_size, depths), strict=True
    ):
        seconds = step_seconds(stages, cost, depth)
        prediction = Prediction(tuple(work.busy), tuple(sent), seconds, buffers, memory)
        found.append(
            Plan(
                work.group_size,
                tuple(work.matrices),
                tuple(work.owners),
                tuple(bucket for bucket, _ in cut),
                depth,
                prediction,
            )
        )
    return found


def _memory(plan: Plan) -> int:
    return max(plan.prediction.memory_bytes, default=0)


def _fastest(plans: Sequence[Plan]) -> Plan:
    """From the least memory up, whatever is 1 % faster: more memory never makes it slower."""
    best, *others = sorted(plans, key=lambda plan: (_memory(plan), plan.prediction.step_seconds))
    for plan in others:
        if plan.prediction.step_seconds < 0.99 * best.prediction.step_seconds:
            best = plan
    return best


def _no_fit(least: Plan, most: int, wire_itemsize: int, bucket_bytes: int | None) -> str:
    """Says what would do."""
    largest = max(least.matrices, key=lambda m: m.numel * wire_itemsize + m.workspace_bytes)
    matrix_bytes, work_bytes = largest.numel * wire_itemsize, largest.workspace_bytes
    others = "" if bucket_bytes is None else f" with bucket_bytes={bucket_bytes}"
    return (
        f"memory_bytes={most} is too little{others}: a step takes {_memory(least)} bytes at least. "
        f"Of its matrices {largest.name}, {' x '.join(map(str, largest.work_shape))}, takes most: "
        f"{matrix_bytes} bytes each time that it is buffered, {work_bytes} while it is "
        f"orthogonalized. Set memory_bytes to at least {_memory(least)}, or leave it out."
    )
