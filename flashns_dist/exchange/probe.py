"""What collectives cost on this machine, for the cost model."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist


def all_to_all_seconds(
    num_bytes: int, group: dist.ProcessGroup, device: torch.device, repeats: int = 5
) -> float:
    """Median seconds in which every rank sends ``num_bytes`` to the others, on the slowest rank.

    Collectives: ``all_to_all_single``, ``barrier`` and one ``all_reduce`` on ``group``.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    each = num_bytes // max(size - 1, 1)
    splits = [0 if peer == rank else each for peer in range(size)]
    sent = torch.zeros(sum(splits), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    times = []
    for _ in range(repeats + 2):
        _synchronize(device)
        dist.barrier(group)
        begin = time.perf_counter()
        dist.all_to_all_single(received, sent, splits, splits, group=group)
        _synchronize(device)
        times.append(time.perf_counter() - begin)
    found = torch.tensor(statistics.median(times[2:]), dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return float(found)


def gather_values(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, in the order of the ranks. Collectives: one ``all_gather_object``."""
    if group is None:
        return [value]
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def first_value(value: Any, group: dist.ProcessGroup | None) -> Any:
    """The first rank's value, on every rank of the group.

    Collectives: one ``broadcast_object_list``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=dist.get_process_group_ranks(group)[0], group=group)
    return found[0]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
