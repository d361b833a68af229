"""Small reductions over a process group, in place on the device."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def reduce_largest_(values: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace each value by the largest on any rank: exact. One ``all_reduce`` on ``group``."""
    _reduce_(values, dist.ReduceOp.MAX, group)


def reduce_sum_(values: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace each value by the sum over the ranks. One ``all_reduce`` on ``group``.

    Exact for integers, whatever the order; floating-point sums depend on it.
    """
    _reduce_(values, dist.ReduceOp.SUM, group)


def _reduce_(values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1 and values.numel():
        dist.all_reduce(values, op=op, group=group)
