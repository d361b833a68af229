"""A pool of processes that run test bodies as ranks of real process groups."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashns_dist.testing.gpus import has_gpus, rank_gpu

_MOST_THREADS = 300  # of a worker: groups that some library keeps have threads that keep waking


class RankError(AssertionError):
    """A body failed or hung on some rank; the message holds every rank's traceback."""


class RankPool:
    """Worker processes that are started once and form process groups of any size up to ``size``.

    Gloo on the CPU, NCCL where there are as many GPUs as ranks (or ``FLASHNS_DIST_SHARE_GPUS=1``).
    After a failure the workers are replaced, because a rank may be stuck in a collective; and where
    they have collected too many threads.

    Args:
        size: Number of workers.
        backend: ``"gloo"`` (workers then see no GPUs), ``"nccl"``, or None to choose by the GPUs
            present.
        interpret: Whether Triton kernels run in its interpreter in the workers, whatever the
            environment says: on the CPU they are not used otherwise.
    """

    def __init__(
        self, size: int = 4, backend: str | None = None, *, interpret: bool = False
    ) -> None:
        self._size = size
        self._backend = backend
        self._interpret = interpret
        self._workers: list[tuple[Any, Connection]] = []
        self._in_group: list[tuple[Any, Connection]] = []  # those of the last job
        atexit.register(self.close)

    def run(
        self, world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 120.0
    ) -> list[Any]:
        """Run ``body(*args)`` on ranks 0 to ``world_size - 1`` and return their results by rank.

        Args:
            world_size: Ranks in the default process group.
            body: A function at module level (it is imported by name in the workers).
            args: Passed by pickle, as is the result.
            timeout: Seconds until the body counts as hung.

        Raises:
            RankError: A rank raised, died or did not answer in time.
        """
        if world_size > self._size:
            raise ValueError(f"world_size={world_size} is more than the pool's {self._size}")
        if any(_num_threads(process) > _MOST_THREADS for process, _ in self._workers):
            self.close()
        self._leave()
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            job = (body.__module__, body.__qualname__, args, world_size, f"{folder}/rendezvous")
            chosen = self._in_group = self._workers[:world_size]
            try:
                for _, connection in chosen:
                    connection.send_bytes(pickle.dumps(job))
                answers = self._collect(chosen, timeout)
            except BaseException:  # interrupted: the next job must not get these answers
                self.close()
                raise
        failures = [f"rank {r}: {text}" for r, (ok, text) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [value for _, value in answers]

    def _collect(self, chosen: list[tuple[Any, Connection]], timeout: float) -> list[Any]:
        answers: list[Any] = [None] * len(chosen)
        deadline = time.monotonic() + timeout
        while any(answer is None for answer in answers) and time.monotonic() < deadline:
            for rank, (process, connection) in enumerate(chosen):
                if answers[rank] is not None:
                    continue
                if connection.poll(0.01):
                    try:
                        answers[rank] = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        answers[rank] = (False, "died before it answered")
                    if not answers[rank][0]:  # the others may be waiting for this rank
                        deadline = min(deadline, time.monotonic() + 5.0)
                elif not process.is_alive():
                    answers[rank] = (False, f"died with exit code {process.exitcode}")
        return [
            answer or (False, _whereabouts(process))
            for answer, (process, _) in zip(answers, chosen, strict=True)
        ]

    def _leave(self) -> None:
        """Let the last job's ranks leave its group, all together: NCCL waits for the others."""
        has_left = False
        try:
            for _, connection in self._in_group:
                connection.send_bytes(pickle.dumps(None))
            has_left = all(ok for ok, _ in self._collect(self._in_group, 60.0))
        except OSError:  # a worker has died
            pass
        finally:
            if not has_left:
                self.close()
        self._in_group = []

    def _start(self) -> None:
        if self._workers:
            return
        context = mp.get_context("spawn")
        paths = [str(Path.cwd()), *sys.path]
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, rank, self._backend, paths, self._interpret),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        """End the workers."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
            _calls_file(process.pid).unlink(missing_ok=True)
        self._workers, self._in_group = [], []


def _whereabouts(process: Any) -> str:
    """Where a worker is that has not answered: its threads' calls."""
    if hasattr(signal, "SIGUSR1") and process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)  # written by C code, whatever holds Python's lock
        time.sleep(0.5)
    calls = _calls_file(process.pid)
    text = calls.read_text() if calls.exists() else ""
    return f"no answer: hung in a collective?\n{text}"


def _calls_file(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"flashns-dist-calls-{pid}"


def _num_threads(process: Any) -> int:
    """How many threads a process has; 0 where the system does not say."""
    folder = Path(f"/proc/{process.pid}/task")
    return len(list(folder.iterdir())) if folder.exists() else 0


def rank_device() -> torch.device:
    """The device of this rank: its GPU under NCCL, else the CPU."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _work(
    connection: Connection, rank: int, backend: str | None, paths: list[str], interpret: bool
) -> None:
    """The worker's loop: receive a job, run it in a process group of its size, answer."""
    calls = _calls_file(os.getpid()).open("w")
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=calls)
    if backend == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop("TRITON_INTERPRET", None)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:] = paths
    torch.set_num_threads(1)
    num_frozen = 0  # modules
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer: tuple[bool, Any] = (True, None)
            if job is None:
                num_frozen = _leave_group(num_frozen)
            else:
                module, name, args, world_size, rendezvous = job
                _join_group(rank, world_size, rendezvous, backend)
                body: Any = importlib.import_module(module)
                for part in name.split("."):
                    body = getattr(body, part)
                answer = (True, body(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


def _leave_group(num_frozen: int) -> int:
    """Leave the last job's process groups, and free them.

    Models and optimizers are reference cycles, and a gloo group that one of them holds keeps its
    threads. What modules hold is frozen, now and then, so that collections need not look at it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    if len(sys.modules) <= num_frozen + 50:
        return num_frozen
    gc.freeze()
    return len(sys.modules)


def _join_group(rank: int, world_size: int, rendezvous: str, backend: str | None) -> None:
    chosen = backend or ("nccl" if has_gpus(world_size) else "gloo")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if chosen == "nccl":
        torch.cuda.set_device(rank_gpu(rank))
        torch.cuda.init()  # or a DeviceMesh takes the GPU of LOCAL_RANK
    dist.init_process_group(
        chosen,
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
