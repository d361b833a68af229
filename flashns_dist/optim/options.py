"""How matrices travel: what a user can choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from flashns_dist.optim.rules.rule import check_flag, number
from flashns_dist.plan import CostModel

WIRE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ExchangeOptions:
    """How matrices travel between ranks.

    Attributes:
        wire_dtype: Dtype that travels both ways and that matrices are orthogonalized from, also
            where nothing needs to travel (so that results do not depend on the number of ranks):
            bf16, fp32 or fp64, since momenta may lie outside of the range of fp16.
        memory_bytes: Most bytes of memory that a step may take on a rank beyond weights, gradients
            and state, for each process group's matrices, as the planner predicts it: transfer
            buffers, the matrices that the rank owns of the buckets under way, and what the busiest
            batch takes to orthogonalize. Where nothing fits, the first step raises. None for 1 GiB
            where that can be, else within a tenth of the least (one bucket under way, of one matrix
            for each owner); with ``bucket_bytes``, for no bound.
        bucket_bytes: Most bytes that a rank buffers for one direction of one bucket, or one matrix;
            where nothing travels, half of what it orthogonalizes at once. None for what the planner
            predicts to be fastest within ``memory_bytes``.
        replicas: Whether replicas (DDP, HSDP) divide the matrices among themselves (``"share"``),
            each do all of them (``"repeat"``), or what the cost model predicts to be faster
            (``"auto"``).
        replica_group: The process group over which plain (not DTensor) parameters are replicated:
            ``"world"``, a process group, or None where each process trains by itself. Every rank of
            it must have some parameter: a rank without any cannot know that the others wait.
        cost: Cost model of the planner; None for what ``flashns_dist.optim.calibration`` measured
            on this machine, or else one H200's. The first rank's holds on all ranks of a group.
        overlap_backward: Let FSDP2's matrices travel to their owners while the backward pass still
            runs (``optim/overlap.py``), on process groups of their own: with the same results, and
            of use where nothing changes the gradients between the last backward pass and
            ``step()``.
        overlap_bytes: Most bytes that a rank buffers for that, of each process group's matrices,
            beside ``memory_bytes``; what does not fit travels in ``step()``.
    """

    wire_dtype: torch.dtype = torch.bfloat16
    memory_bytes: int | None = None
    bucket_bytes: int | None = None
    replicas: str = "auto"
    replica_group: dist.ProcessGroup | str | None = "world"
    cost: CostModel | None = None
    overlap_backward: bool = False
    overlap_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.wire_dtype not in WIRE_DTYPES:
            raise ValueError(
                f"wire_dtype={self.wire_dtype!r}: use torch.bfloat16, torch.float32 or "
                "torch.float64; momenta are not scaled before they travel, and may lie outside of "
                "the range of fp16 or fp8"
            )
        for name in ("memory_bytes", "bucket_bytes", "overlap_bytes"):
            given = getattr(self, name)
            if given is not None or name == "overlap_bytes":
                object.__setattr__(self, name, _bytes(name, given))
        if self.replicas not in ("auto", "share", "repeat"):
            raise ValueError(f'replicas={self.replicas!r}: use "auto", "share" or "repeat"')
        if not _is_replica_group(self.replica_group):
            raise ValueError(
                f'replica_group={self.replica_group!r}: use "world", None or a process group'
            )
        if self.cost is not None and not isinstance(self.cost, CostModel):
            raise ValueError(
                f"cost={self.cost!r}: use None or a CostModel, such as "
                "flashns_dist.optim.calibration measures"
            )
        check_flag("overlap_backward", self.overlap_backward)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExchangeOptions:
        return self  # frozen, and process groups cannot be copied


def check_exchange(exchange: Any) -> None:
    """Raise ValueError for what is neither None nor an ``ExchangeOptions``."""
    if exchange is not None and not isinstance(exchange, ExchangeOptions):
        raise ValueError(
            f"exchange={exchange!r}: use None or an ExchangeOptions object, such as "
            "ExchangeOptions(memory_bytes=2**30)"
        )


def _bytes(name: str, given: Any) -> int:
    """A number of bytes, at least one, as an int."""
    found = number(name, given)
    if found != int(found) or found <= 0:
        raise ValueError(f"{name}={given!r} must be a positive whole number of bytes")
    return int(given)


def _is_replica_group(given: Any) -> bool:
    if given is None or isinstance(given, str):
        return given in (None, "world")
    return dist.is_available() and isinstance(given, dist.ProcessGroup)


__all__ = ["WIRE_DTYPES", "ExchangeOptions", "check_exchange"]
