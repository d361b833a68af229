"""This process among the others of a run: rank, device, threads, process group."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from flashns_dist.testing.gpus import has_gpus, rank_gpu

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """The ranks of a run, as this process sees them.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        device: Where this process computes.
        distributed: Whether there is a process group; not under plain `python`.
    """

    rank: int
    size: int
    device: torch.device
    distributed: bool

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes the files of the run."""
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> float:
        """Average a scalar over all ranks; one all-reduce on the default group."""
        total = value.detach().to(torch.float64 if self.device.type == "cpu" else torch.float32)
        if self.distributed:
            dist.all_reduce(total)
        return float(total) / self.size

    def agree(self, text: str) -> str:
        """Return rank 0's text on every rank; one broadcast on the default group."""
        if not self.distributed:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, src=0, device=self.device)
        return texts[0]

    def now(self) -> float:
        """Seconds on a clock, once every rank has got here and its device is done; a barrier."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.barrier()
        return time.perf_counter()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.distributed:
            dist.barrier()


@contextmanager
def joined_world(device_name: str | None, threads: int | None) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end.

    Args:
        device_name: `cpu` or `cuda`; None takes CUDA where there is a GPU for each process.
        threads: CPU threads of this process; None shares the cores between the processes of this
            host, where torchrun would leave one to each.

    A process group that exists already is used and left alone.

    Raises:
        ValueError: CUDA is asked for and there is no GPU for this process.
    """
    joined = dist.is_initialized()
    distributed = joined or "RANK" in os.environ
    device = _joined_device() if joined else _device(device_name)
    if threads or "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(threads or max(1, _num_cores() // _local_size()))
    if not distributed:
        yield World(rank=0, size=1, device=device, distributed=False)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if joined:
        pass
    elif device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, timeout=_TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, distributed=True)
    finally:
        if not joined:
            dist.destroy_process_group()


def leave_process() -> NoReturn:
    """End this process with success, without taking Python's interpreter apart.

    gloo's threads drop the tensors of the last collectives, which takes Python's lock; on a busy
    machine one of them comes when the interpreter is already going, and the process aborts
    although all its work is done (pytorch issue 190489). For the end of a script; errors should
    leave by their exceptions.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _local_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _num_cores() -> int:
    # Of this process, which a container may keep from some of the machine's.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _joined_device() -> torch.device:
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _device(name: str | None) -> torch.device:
    is_possible = name != "cpu" and has_gpus(_local_size())
    if name == "cuda" and not is_possible:
        raise ValueError(
            f"--device cuda: {_local_size()} processes on this host and "
            f"{torch.cuda.device_count()} GPUs. "
            "Start at most one process per GPU, or pass --device cpu."
        )
    if not is_possible:
        return torch.device("cpu")
    return rank_gpu(int(os.environ.get("LOCAL_RANK", "0")))
