"""Carries out a plan's transfers: fragments to owners, results back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flashns_dist.exchange.narrowing import Narrowing, Selection
from flashns_dist.exchange.schedule import Route, Schedule, Segment, make_schedule
from flashns_dist.plan import Plan


@dataclass
class Transfer:
    """A collective under way. ``work`` is None where nothing travels or it has been waited for."""

    received: Tensor
    work: dist.Work | None
    local: tuple[Tensor, ...] = ()
    sent: Tensor | None = None

    def wait(self) -> None:
        """Let the current stream (on CPU: the caller) wait for the data."""
        if self.work is not None:
            self.work.wait()
            self.work = None


class Exchange:
    """The transfers of one plan on one process group.

    Each bucket makes two ``all_to_all_single`` calls on ``group``, asynchronous, so that the caller
    can overlap them with other buckets' work; every rank of the group must call them in the order
    of ``plan.order``. With one rank, nothing is communicated. At most ``plan.depth`` buckets may be
    under way: each has two buffers, reserved once and used in turn. What the gather has sent and
    received makes room for what the scatter receives and sends.

    Args:
        plan: The same on every rank of the group.
        group: The process group (None in a single process).
        group_rank: This process's rank in the group.
        device: Where the tensors live.
        wire_dtype: Dtype that travels, both ways, and that matrices are orthogonalized from.
    """

    def __init__(
        self,
        plan: Plan,
        group: dist.ProcessGroup | None,
        group_rank: int,
        device: torch.device,
        wire_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.plan = plan
        self.schedules = tuple(make_schedule(plan, bucket, group_rank) for bucket in plan.buckets)
        self._moves = tuple(plan.moves(bucket) for bucket in range(len(plan.buckets)))
        self._group = group
        self.device = device
        self.dtype = wire_dtype
        self._blocks = [matrix.block for matrix in plan.matrices]
        self._narrowing: Narrowing | None = None
        self._buffers: list[list[Tensor]] = []
        if any(matrix.work is not None for matrix in plan.matrices):
            self._narrowing = Narrowing(plan, self.schedules)  # reserves with the first selection
        else:
            self._reserve()

    def _reserve(self) -> None:
        """Buffers for the present schedules; larger ones stay."""
        sizes = [
            max((max(map(sum, splits(schedule))) for schedule in self.schedules), default=0)
            for splits in (
                lambda s: (s.gather.send_splits, s.scatter.receive_splits),
                lambda s: (s.gather.receive_splits, s.scatter.send_splits),
            )
        ]
        if self._buffers and all(
            size <= buffer.numel() for size, buffer in zip(sizes, self._buffers[0], strict=True)
        ):
            return
        if self._buffers:  # selections vary from step to step
            sizes = [
                max(size + size // 8, old.numel())
                for size, old in zip(sizes, self._buffers[0], strict=True)
            ]
        self._buffers = [
            [torch.empty(size, dtype=self.dtype, device=self.device) for size in sizes]
            for _ in range(min(self.plan.depth, len(self.schedules)))
        ]

    def narrow(self, selections: Mapping[int, Selection]) -> None:
        """From now on, exchange only some rows or columns of some matrices.

        Their directions, owned matrices and updates then have the selections' boxes and shapes, and
        two dims. No transfer may be under way. No collectives.

        Args:
            selections: For each matrix whose work is less than its block; the same on every rank.
        """
        assert self._narrowing is not None, "no matrix of the plan is to be narrowed"
        self.schedules = self._narrowing.schedules(selections)
        for index, selection in selections.items():
            self._blocks[index] = selection.block
        self._reserve()

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sends to others in one step, both ways together."""
        elements = sum(
            sum(s.gather.send_splits) + sum(s.scatter.send_splits) for s in self.schedules
        )
        return elements * self.dtype.itemsize

    @property
    def buffer_bytes(self) -> int:
        """Bytes reserved for transfers on this rank."""
        return sum(b.numel() * b.element_size() for pair in self._buffers for b in pair)

    def new_batch(self, batch: int, rows: int, cols: int) -> Tensor:
        """An uninitialized batch to gather matrices into."""
        return torch.empty(batch, rows, cols, dtype=self.dtype, device=self.device)

    def addresses(self, bucket: int) -> list[int]:
        """Where the bucket's buffers are: gather's sent and received, scatter's sent and received.

        For kernels that pack and unpack by themselves, around ``launch_gather`` and
        ``launch_scatter``.
        """
        held, owned = (buffer.data_ptr() for buffer in self._pair(bucket))
        return [held, owned, owned, held]

    def launch_gather(self, bucket: int) -> Transfer:
        """``start_gather`` where the send buffer is packed already."""
        held, owned = self._pair(bucket)
        return self._launch(bucket, self.schedules[bucket].gather, held, owned)

    def launch_scatter(self, bucket: int) -> Transfer:
        """``start_scatter`` where the send buffer is packed already."""
        held, owned = self._pair(bucket)
        return self._launch(bucket, self.schedules[bucket].scatter, owned, held)

    def pack_early(self, bucket: int, directions: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """What ``early_gather`` sends and receives into: memory of its own.

        Args:
            bucket: Index of the bucket.
            directions: As ``start_gather`` takes; None to send anything, for ranks that wait.
        """
        route = self.schedules[bucket].gather
        sent, received = (
            torch.empty(sum(splits), dtype=self.dtype, device=self.device)
            for splits in (route.send_splits, route.receive_splits)
        )
        if directions is not None:
            _copy(
                [_segment(sent, segment) for segment in route.sends],
                [directions[segment.held] for segment in route.sends],
            )
        return sent, received

    def early_gather(
        self, bucket: int, packed: tuple[Tensor, Tensor], group: dist.ProcessGroup | None
    ) -> Transfer:
        """Send what travels of a bucket ahead of its turn.

        Its turn is a later ``start_gather``, which sends nothing then.

        Args:
            bucket: Index of the bucket.
            packed: What ``pack_early`` returned.
            group: The process group to send on, of the same ranks as the exchange's.
        """
        return self._launch(bucket, self.schedules[bucket].gather, *packed, group)

    def start_gather(
        self,
        bucket: int,
        directions: Sequence[Tensor],
        into: Mapping[int, Tensor],
        early: Transfer | None = None,
    ) -> Transfer:
        """Send this rank's pieces of a bucket to the owners.

        Args:
            bucket: Index of the bucket.
            directions: For each of the schedule's held pieces, a tensor shaped like its box, of any
                float dtype; cast to the wire dtype while packing.
            into: For each owned matrix, a contiguous ``(rows, cols)`` tensor; pieces that this rank
                both holds and owns are written now.
            early: What ``early_gather`` returned, where it has sent them.
        """
        route = self.schedules[bucket].gather
        _copy(
            [self._inside(into[segment.matrix], segment) for segment in route.local],
            [directions[segment.held] for segment in route.local],
        )
        if early is not None:
            return early
        held, owned = self._pair(bucket)
        directions = [directions[segment.held] for segment in route.sends]
        return self._start(bucket, route, held, owned, directions)

    def finish_gather(self, bucket: int, transfer: Transfer, into: Mapping[int, Tensor]) -> None:
        """Write the boxes that others have sent into the owned matrices.

        Args:
            bucket: Index of the bucket.
            transfer: What ``start_gather`` returned.
            into: As there.
        """
        transfer.wait()
        route = self.schedules[bucket].gather
        _copy(
            [self._inside(into[segment.matrix], segment) for segment in route.receives],
            [_segment(transfer.received, segment) for segment in route.receives],
        )

    def start_scatter(self, bucket: int, results: Mapping[int, Tensor]) -> Transfer:
        """Send the owned matrices' results to the ranks that store them.

        Args:
            bucket: Index of the bucket.
            results: For each owned matrix, its contiguous ``(rows, cols)`` result.
        """
        route = self.schedules[bucket].scatter
        sources = [self._inside(results[s.matrix], s) for s in route.sends]
        held, owned = self._pair(bucket)
        transfer = self._start(bucket, route, owned, held, sources)
        transfer.local = tuple(self._inside(results[s.matrix], s) for s in route.local)
        return transfer

    def finish_scatter(self, bucket: int, transfer: Transfer) -> list[Tensor]:
        """The result for each of the schedule's held pieces, in the wire dtype.

        They are views of a reserved buffer: use them before ``plan.depth`` further gathers start.
        """
        transfer.wait()
        schedule = self.schedules[bucket]
        updates: list[Tensor | None] = [None] * len(schedule.held)
        for segment in schedule.scatter.receives:
            updates[segment.held] = _segment(transfer.received, segment)
        for segment, value in zip(schedule.scatter.local, transfer.local, strict=True):
            updates[segment.held] = value
        complete = [update for update in updates if update is not None]
        assert len(complete) == len(updates), "a held piece has no supplier"
        return complete

    def _pair(self, bucket: int) -> list[Tensor]:
        """The bucket's buffers: for what this rank holds, and for what it owns."""
        return self._buffers[bucket % len(self._buffers)]

    def _start(
        self, bucket: int, route: Route, sent: Tensor, received: Tensor, sources: Sequence[Tensor]
    ) -> Transfer:
        _copy([_segment(sent, segment) for segment in route.sends], sources)
        return self._launch(bucket, route, sent, received)

    def _launch(
        self,
        bucket: int,
        route: Route,
        sent: Tensor,
        received: Tensor,
        group: dist.ProcessGroup | None = None,
    ) -> Transfer:
        sent = sent[: sum(route.send_splits)]
        received = received[: sum(route.receive_splits)]
        work = None
        if self._moves[bucket]:
            work = dist.all_to_all_single(
                received,
                sent,
                list(route.receive_splits),
                list(route.send_splits),
                group=group or self._group,
                async_op=True,
            )
        return Transfer(received, work, sent=sent)

    def _inside(self, matrix: Tensor, segment: Segment) -> Tensor:
        return self._blocks[segment.matrix].view(matrix, segment.part, segment.box)


def connect(group: dist.ProcessGroup, device: torch.device) -> None:
    """Send something from every rank to every other, so that later calls need not connect them.

    Where NCCL must connect ranks, a call waits on the host for all of them. Collectives: one
    ``all_to_all_single``.
    """
    sent = torch.zeros(dist.get_world_size(group), device=device)
    dist.all_to_all_single(torch.empty_like(sent), sent, group=group)


def _segment(buffer: Tensor, segment: Segment) -> Tensor:
    """A segment of a flat buffer, shaped like its box."""
    return buffer.narrow(0, segment.offset, segment.box.numel).view(segment.box.size)


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    pairs = [(t, v) for t, v in zip(targets, values, strict=True) if t.numel()]
    if pairs:
        torch._foreach_copy_([t for t, _ in pairs], [v for _, v in pairs])


__all__ = ["Exchange", "Schedule", "Transfer", "connect"]
