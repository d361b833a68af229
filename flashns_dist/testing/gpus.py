"""Which GPU a rank computes on; with FLASHNS_DIST_SHARE_GPUS=1 several ranks may be on one."""

from __future__ import annotations

import os
import socket

import torch


def has_gpus(num_ranks: int) -> bool:
    """Whether each of ``num_ranks`` ranks of this host can be on a GPU."""
    count = torch.cuda.device_count()
    return count >= num_ranks or (count > 0 and _may_share())


def rank_gpu(local_rank: int) -> torch.device:
    """The GPU of a rank of this host.

    Where ranks share GPUs, NCCL is told (before it is started) that each round of ranks over the
    GPUs is a host of its own: it refuses two ranks on one GPU of one host, and connects ranks of
    different hosts by sockets. Results are those of as many GPUs; times are not.
    """
    if not _may_share():
        return torch.device("cuda", local_rank)
    host, gpu = divmod(local_rank, torch.cuda.device_count())
    os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{host}"
    return torch.device("cuda", gpu)


def _may_share() -> bool:
    return os.environ.get("FLASHNS_DIST_SHARE_GPUS", "0") == "1"


__all__ = ["has_gpus", "rank_gpu"]
