"""Gathers that start while the backward pass still runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from flashns_dist.exchange import connect
from flashns_dist.optim.binding import BoundParameter, new_group
from flashns_dist.optim.early import EarlyQueue, takes_part
from flashns_dist.optim.options import ExchangeOptions
from flashns_dist.optim.step import MatrixStep

_REBOUND = "the optimizer's groups or states have changed since the backward pass"


def check_overlap(
    options: ExchangeOptions, *, cuda_graph: bool = False, has_adapter: bool = False
) -> None:
    """Raise ValueError where ``overlap_backward`` cannot be."""
    if options.overlap_backward and cuda_graph:
        raise ValueError(
            "cuda_graph=True and overlap_backward=True exclude each other: a graph replays all "
            "gathers of a step"
        )
    if options.overlap_backward and has_adapter:
        raise ValueError(
            "overlap_backward=True is for FSDP2's parameters: under an adapter nothing tells the "
            "optimizer when a gradient is final"
        )


class EarlyGathers:
    """Sends buckets to their owners while a backward pass still runs (FSDP2).

    Once the hooks of all parameters of a bucket have been called, its directions are computed from
    their gradients and momenta, which stay as they are, and sent. The buckets go in their order, as
    the planner has cut them for that, on process groups of their own. A step compares what was sent
    with what would be sent now, and the ranks with each other; if all is equal it takes what has
    come, otherwise it drops it and sends everything itself. FSDP2 calls the hooks of one parameter
    on every rank, but nothing relies on that: a rank that has sent fewer buckets sends the others
    in ``step()``, where they are dropped.

    Matrices take part that are sharded DTensors, with Muon's elementwise ``before``. With
    ``overlap_backward=False`` nothing does, and there are no collectives.

    Args:
        options: How matrices travel.
    """

    def __init__(self, options: ExchangeOptions) -> None:
        self._options = options
        self._queues: dict[int, EarlyQueue] = {}  # by the number of the process group
        self._left: list[EarlyQueue] = []  # of earlier bindings, until the next step
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}  # by ranks

    @property
    def num_sent(self) -> int:
        """Buckets sent early, since ``bind``."""
        return sum(queue.num_sent for queue in self._queues.values())

    @property
    def num_dropped(self) -> int:
        """Those of them that no step has used."""
        return sum(queue.num_dropped for queue in self._queues.values())

    def bind(
        self,
        optimizer: Optimizer,
        bound: Sequence[BoundParameter],
        matrices: Sequence[Sequence[int]],
    ) -> None:
        """Add hooks to parameters.

        Args:
            optimizer: Whose settings and state are read; known weakly.
            bound: Its parameters.
            matrices: Indices of the matrices of each process group.
        """
        if not self._options.overlap_backward:
            return
        for number, indices in enumerate(matrices):
            if any(takes_part(bound[i], optimizer.param_groups) for i in indices):
                most_bytes = self._options.overlap_bytes
                self._queues[number] = EarlyQueue(optimizer, bound, indices, most_bytes)
        if not self._queues:
            warnings.warn(
                "overlap_backward=True does nothing here: it is for matrices that are sharded "
                'DTensors (FSDP2) with the update rule "muon" or "normuon"',
                stacklevel=2,
            )

    def retire(self) -> None:
        """Remove the hooks. What has been sent since the last step, the next one drops."""
        for queue in self._queues.values():
            queue.close(_REBOUND)

    def unbind(self) -> None:
        """Make place for another binding."""
        self.retire()
        self._left += self._queues.values()
        self._queues = {}

    def watch(self, number: int, step: MatrixStep) -> None:
        """From now on send the buckets of a step that has been made for a process group.

        Collectives: the first time, those that make a process group of the same ranks.
        """
        if number not in self._queues or not self._queues[number].watch(step):
            return
        ranks, device = self._queues[number].ranks, step.exchange.device
        if ranks not in self._groups:
            self._groups[ranks] = new_group(ranks)
            connect(self._groups[ranks], device)
        self._queues[number].group = self._groups[ranks]

    def compare(self, gradients: Sequence[Tensor | None]) -> None:
        """Begin to compare what was sent with what would be sent now, on all ranks.

        Collectives: one small ``all_reduce`` on each process group with matrices that take part.

        Args:
            gradients: This rank's part of each bound parameter's gradient.
        """
        for queue in (*self._left, *self._queues.values()):
            queue.compare(gradients)

    def settle(self) -> None:
        """Drop what not all ranks can use, with a warning; after three steps in a row, give up.

        Collectives: the ``all_to_all_single`` calls that this rank has not made and others have.
        """
        for queue in (*self._left, *self._queues.values()):
            queue.settle()
        self._left = []  # they keep their plan's buffers

    def drop(self) -> None:
        """End a step: drop all that it has not used. Collectives: as ``settle``."""
        for queue in (*self._left, *self._queues.values()):
            queue.drop()
        self._left = []


__all__ = ["EarlyGathers", "check_overlap"]
