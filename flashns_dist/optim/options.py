"""How matrices travel: what a user can choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from flashns_dist.plan import CostModel


@dataclass(frozen=True)
class ExchangeOptions:
    """How matrices travel between ranks.

    Attributes:
        wire_dtype: Dtype that travels both ways and that matrices are orthogonalized from, also
            where nothing needs to travel (so that results do not depend on the number of ranks).
        bucket_bytes: Most bytes that a rank buffers for one direction of one bucket, or one matrix;
            where nothing travels, half of what it orthogonalizes at once.
        replicas: Whether replicas (DDP, HSDP) divide the matrices among themselves (``"share"``),
            each do all of them (``"repeat"``), or what the cost model predicts to be faster
            (``"auto"``).
        replica_group: The process group over which plain (not DTensor) parameters are replicated:
            ``"world"``, a process group, or None where each process trains by itself.
        cost: Cost model of the planner; None for what ``flashns_dist.optim.calibration`` measured
            on this machine, or else one H200's. The first rank's holds on all ranks of a group.
        overlap_backward: Let FSDP2's matrices travel to their owners while the backward pass still
            runs (``optim/overlap.py``), on process groups of their own: with the same results, and
            of use where nothing changes the gradients between the last backward pass and
            ``step()``.
        overlap_bytes: Most bytes that a rank buffers for that, of each process group's matrices;
            what does not fit travels in ``step()``.
    """

    wire_dtype: torch.dtype = torch.bfloat16
    bucket_bytes: int = 64 * 2**20
    replicas: str = "auto"
    replica_group: dist.ProcessGroup | str | None = "world"
    cost: CostModel | None = None
    overlap_backward: bool = False
    overlap_bytes: int = 2**30

    def __post_init__(self) -> None:
        if not isinstance(self.wire_dtype, torch.dtype) or not self.wire_dtype.is_floating_point:
            raise ValueError(f"wire_dtype={self.wire_dtype} must be a floating-point dtype")
        if self.bucket_bytes <= 0:
            raise ValueError(f"bucket_bytes={self.bucket_bytes} must be positive")
        if self.overlap_bytes <= 0:
            raise ValueError(f"overlap_bytes={self.overlap_bytes} must be positive")
        if self.replicas not in ("auto", "share", "repeat"):
            raise ValueError(f'replicas={self.replicas!r}: use "auto", "share" or "repeat"')
        if isinstance(self.replica_group, str) and self.replica_group != "world":
            raise ValueError(
                f'replica_group={self.replica_group!r}: use "world", None or a process group'
            )


__all__ = ["ExchangeOptions"]
