"""The one step loop: rules' hooks and the exchange, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashns_dist.exchange import Exchange, Transfer
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.footprint import owner_bytes, pass_bytes
from flashns_dist.optim.fused import FusedPasses
from flashns_dist.optim.options import ExchangeOptions
from flashns_dist.optim.pieces import Pieces, Run
from flashns_dist.optim.rules import MATRIX_RULES, MatrixRule
from flashns_dist.optim.rules.muon import Muon, early_direction
from flashns_dist.plan import CostModel, Matrix, Plan, make_plan


def matrices_of(
    bound: Sequence[BoundParameter],
    active: Sequence[bool],
    kinds: Sequence[str],
    groups: Sequence[dict[str, Any]],
    *,
    travel: bool,
    wire_dtype: torch.dtype = torch.bfloat16,
) -> list[Matrix]:
    """The matrices of the active parameters of one process group that travel, or that do not.

    Args:
        bound: All matrix parameters of the process group.
        active: Which of them have a gradient in this step.
        kinds: For each, what must agree for its matrices to be batched with others.
        groups: ``param_groups`` of the optimizer.
        travel: Which ones.
        wire_dtype: That they are orthogonalized from.
    """
    found = []
    for index, parameter in enumerate(bound):
        group = groups[parameter.group_index]
        rule = _rule(group)
        if not active[index] or rule.travels != travel:
            continue
        for block in parameter.blocks:
            work = rule.work_shape(block.shape, group) if rule.selects else None
            matrix = Matrix(parameter.name, index, parameter.layout, block, kinds[index], work)
            if travel:
                workspace = owner_bytes(matrix.work_shape, group, wire_dtype)
                passes = pass_bytes(parameter.storage.dtype, group) * (
                    block.rows * block.cols / max(matrix.numel, 1)
                )
                matrix = replace(matrix, workspace_bytes=workspace, pass_bytes=passes)
            found.append(matrix)
    return found


def plan_matrices(
    matrices: Sequence[Matrix],
    group_size: int,
    options: ExchangeOptions,
    cost: CostModel | None = None,
    *,
    must_fit: bool = True,
) -> Plan:
    """The plan for matrices of one process group, with a cost model or the options' own.

    A backward pass makes gradients in the reverse of the order in which the parameters were given.

    Args:
        matrices: As ``matrices_of`` finds them.
        group_size: Ranks in the process group.
        options: How matrices travel.
        cost: Cost model.
        must_fit: See ``make_plan``.

    Raises:
        ValueError: Nothing fits into ``options.memory_bytes``, and something must.
    """
    return make_plan(
        matrices,
        group_size,
        cost=cost or options.cost,
        wire_itemsize=options.wire_dtype.itemsize,
        bucket_bytes=options.bucket_bytes,
        memory_bytes=options.memory_bytes,
        must_fit=must_fit,
        replicas=options.replicas,  # type: ignore[arg-type]
        arrival=range(len(matrices), 0, -1) if options.overlap_backward else None,
    )


class MatrixStep:
    """Updates the matrices of one process group, once per ``run``.

    Args:
        bound: The matrix parameters of one process group.
        plan: Made for the active ones of them.
        exchange: Made for the plan.
        resident: Their matrices that do not travel.
        groups: ``param_groups`` of the optimizer.

    Attributes:
        is_prepared: Whether ``prepare`` has been called for the next run.
        early: Buckets that ``gather_early`` has sent; the next run does not send them again.
    """

    def __init__(
        self,
        bound: Sequence[BoundParameter],
        plan: Plan,
        exchange: Exchange,
        resident: Sequence[Matrix],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        self._bound = bound
        self._plan = plan
        self.exchange = exchange
        self._resident = resident
        present = {bound[matrix.tensor].group_index for matrix in plan.matrices}
        self._groups = [groups[index] for index in sorted(present)]
        self._starts = _block_starts(bound, (*plan.matrices, *resident), groups)
        batches = [owned_batches(exchange, bucket) for bucket in range(len(plan.buckets))]
        self.fused = FusedPasses(bound, exchange, groups, batches)
        self.is_prepared = False
        self.early: dict[int, Transfer] = {}
        self._kept: dict[Any, Any] = {}

    @property
    def is_static(self) -> bool:
        """Whether every run does the same, whatever the values."""
        rules = {MATRIX_RULES[group["update_rule"]] for group in self._groups}
        return not self._resident and not any(rule.selects for rule in rules)

    @property
    def is_elementwise(self) -> bool:
        """Whether momenta and weights are all that a run changes, in kernels that ask before."""
        rules = {MATRIX_RULES[group["update_rule"]] for group in self._groups}
        return self.is_static and not self.fused.not_fused and all(type(r) is Muon for r in rules)

    def prepare(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """What the next run needs to know and the host can do before; changes no state.

        Args:
            groups: As ``run`` takes.
            state: As ``run`` takes.
            gradients: As ``run`` takes; their values may still change.
        """
        if self.fused.num_fused:
            self.fused.begin(groups, state, gradients)
        self.is_prepared = True

    def pack_early(
        self,
        bucket: int,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """What ``gather_early`` sends of a bucket and receives into; changes no state.

        Args:
            bucket: Its rules' ``before`` must be Muon's.
            groups: As ``run`` takes.
            state: As ``run`` takes.
            gradients: As ``run`` takes; the bucket's must be there.
        """
        run = self._new_run(groups, state, gradients)
        return self.exchange.pack_early(bucket, self._before(bucket, run, early_direction))

    def gather_early(
        self,
        bucket: int,
        packed: tuple[Tensor, Tensor],
        process_group: dist.ProcessGroup | None,
    ) -> None:
        """Send a bucket to its owners before the next run.

        Collectives: the bucket's first ``all_to_all_single``, on ``process_group``.

        Args:
            bucket: Index of the bucket.
            packed: What ``pack_early`` returned.
            process_group: Of the exchange's ranks.
        """
        self.early[bucket] = self.exchange.early_gather(bucket, packed, process_group)

    def _new_run(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> Run:
        return Run(
            self._bound,
            self._plan,
            self.exchange,
            groups,
            state,
            gradients,
            self._resident,
            self._starts,
            self._kept,
        )

    def run(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """One step.

        Collectives: two ``all_to_all_single`` per bucket on the process group (one where the bucket
        is in ``early``), and those of the rules.

        Args:
            groups: ``param_groups`` of the optimizer.
            state: Its state.
            gradients: This rank's part of each bound parameter's gradient; None counts as zero.
        """
        run = self._new_run(groups, state, gradients)
        present = sorted(
            {self._bound[m.tensor].group_index for m in (*self._plan.matrices, *self._resident)}
        )
        for group_index in present:
            _rule(groups[group_index]).begin(run, group_index)
        if run.choices:
            selections = {index: choice.selection for index, choice in run.choices.items()}
            self.exchange.narrow(selections)
        if not self.is_prepared:
            self.prepare(groups, state, gradients)
        self.is_prepared = False
        self._run_buckets(
            lambda bucket: self._gather(bucket, run),
            lambda bucket, state: self._compute(bucket, run, state),
            lambda bucket, state: self._finish(bucket, run, state),
        )
        for group_index in present:
            _rule(groups[group_index]).end(run, group_index)

    def passes_seconds(self, seconds_of: Callable[[Callable[[], None]], float]) -> float:
        """Seconds of the first bucket's passes before and after the owner, after a fused run.

        Momenta and weights change as often as the passes are called.

        Args:
            seconds_of: Measures what it is given.
        """
        batches = _UnderWay(self.exchange, 0).batches
        self.fused.pack(0, batches)  # and the results are there
        before, after = partial(self.fused.momentum, 0, batches), partial(self.fused.update, 0)
        return seconds_of(before) + seconds_of(after)

    def run_empty(self) -> None:
        """Make the collectives of a run of the fused kernels, and change nothing."""

        def gather(bucket: int) -> _UnderWay:
            state = _UnderWay(self.exchange, bucket)
            state.transfer = self.exchange.launch_gather(bucket)
            return state

        def compute(bucket: int, state: _UnderWay) -> None:
            assert state.transfer is not None
            state.transfer.wait()
            state.transfer = self.exchange.launch_scatter(bucket)

        def finish(bucket: int, state: _UnderWay) -> None:
            assert state.transfer is not None
            state.transfer.wait()

        self._run_buckets(gather, compute, finish)
        self.is_prepared = False

    def _run_buckets(
        self,
        gather: Callable[[int], _UnderWay],
        compute: Callable[[int, _UnderWay], None],
        finish: Callable[[int, _UnderWay], None],
    ) -> None:
        under_way: dict[int, _UnderWay] = {}
        for turn, bucket in self._plan.order:
            if turn == "gather":
                under_way[bucket] = gather(bucket)
            elif turn == "compute":
                compute(bucket, under_way[bucket])
            else:
                finish(bucket, under_way.pop(bucket))

    def _gather(self, bucket: int, run: Run) -> _UnderWay:
        state = _UnderWay(self.exchange, bucket)
        early = self.early.pop(bucket, None)
        if self.fused.is_fused(bucket):
            self.fused.momentum(bucket, state.batches, early)
            state.transfer = early or self.exchange.launch_gather(bucket)
        else:
            directions = self._before(bucket, run)
            state.transfer = self.exchange.start_gather(bucket, directions, state.inputs(), early)
        return state

    def _compute(self, bucket: int, run: Run, state: _UnderWay) -> None:
        """Whole matrices on their owner: unpack, compute the updates, send them."""
        assert state.transfer is not None
        is_fused = self.fused.is_fused(bucket)
        if is_fused:
            state.transfer.wait()
            self.fused.unpack(bucket)
        else:
            self.exchange.finish_gather(bucket, state.transfer, state.inputs())
        while state.batches:
            indices = state.indices[len(state.results)]
            group = run.groups[run.group_of(indices[0])]
            updates = _rule(group).on_owner(run, indices, state.batches.pop(0), group)
            state.results.append(updates.contiguous())
        if is_fused:
            self.fused.pack(bucket, state.results)
            state.transfer = self.exchange.launch_scatter(bucket)
        else:
            state.transfer = self.exchange.start_scatter(bucket, state.outputs())

    def _finish(self, bucket: int, run: Run, state: _UnderWay) -> None:
        assert state.transfer is not None
        if self.fused.is_fused(bucket):
            state.transfer.wait()
            self.fused.update(bucket)
            return
        updates = self.exchange.finish_scatter(bucket, state.transfer)
        for pieces, positions in self._pieces(bucket, run):
            _rule(pieces.group).after(pieces, [updates[p] for p in positions])

    def _pieces(self, bucket: int, run: Run) -> list[tuple[Pieces, list[int]]]:
        """The bucket by parameter group, with the positions of its pieces among the held ones."""
        held = self.exchange.schedules[bucket].held
        positions: dict[int, list[int]] = {}
        for position, (index, _) in enumerate(held):
            positions.setdefault(run.group_of(index), []).append(position)
        matrices: dict[int, list[int]] = {}
        for index in self._plan.buckets[bucket]:
            matrices.setdefault(run.group_of(index), []).append(index)
        return [
            (
                Pieces(
                    run,
                    run.groups[group_index],
                    tuple(indices),
                    tuple(held[p] for p in positions.get(group_index, [])),
                ),
                positions.get(group_index, []),
            )
            for group_index, indices in sorted(matrices.items())
        ]

    def _before(
        self, bucket: int, run: Run, instead: Callable[[Pieces], list[Tensor]] | None = None
    ) -> list[Tensor]:
        held = self.exchange.schedules[bucket].held
        directions: list[Tensor] = [torch.empty(0)] * len(held)
        for pieces, positions in self._pieces(bucket, run):
            found = (instead or _rule(pieces.group).before)(pieces)
            for position, direction in zip(positions, found, strict=True):
                directions[position] = direction
        return directions


class _UnderWay:
    """One bucket between its gather and its update.

    Attributes:
        indices: The matrices that this rank owns, by batch.
        batches: ``(len(indices), rows, cols)`` each, to gather into; gone once computed.
        results: Their updates.
        transfer: The last collective.
    """

    def __init__(self, exchange: Exchange, bucket: int) -> None:
        owned = owned_batches(exchange, bucket)
        self.indices = [indices for _, indices in owned]
        self.batches = [exchange.new_batch(len(indices), *shape) for shape, indices in owned]
        self.results: list[Tensor] = []
        self.transfer: Transfer | None = None

    def inputs(self) -> dict[int, Tensor]:
        return _by_matrix(self.indices, self.batches)

    def outputs(self) -> dict[int, Tensor]:
        return _by_matrix(self.indices, self.results)


def owned_batches(exchange: Exchange, bucket: int) -> list[tuple[tuple[int, int], list[int]]]:
    """A bucket's matrices that this rank owns, by equal shape and kind: the shape, and which."""
    alike: dict[tuple[tuple[int, int], str], list[int]] = {}
    for index in exchange.schedules[bucket].owned:
        matrix = exchange.plan.matrices[index]
        alike.setdefault((matrix.work_shape, matrix.kind), []).append(index)
    return [(shape, indices) for (shape, _), indices in alike.items()]


def _by_matrix(indices: Sequence[Sequence[int]], batches: Sequence[Tensor]) -> dict[int, Tensor]:
    return {
        index: batch[slot]
        for batch, each in zip(batches, indices, strict=True)
        for slot, index in enumerate(each)
    }


def _block_starts(
    bound: Sequence[BoundParameter], matrices: Sequence[Matrix], groups: Sequence[dict[str, Any]]
) -> dict[tuple[int, str], tuple[int, int]]:
    """For each matrix and state by block: where it begins in its storage's, and how long it is."""
    found: dict[tuple[int, int, str], tuple[int, int]] = {}
    ends: dict[tuple[int, str], int] = {}
    for tensor, parameter in enumerate(bound):
        group = groups[parameter.group_index]
        for number, block in enumerate(parameter.blocks):
            for name, size in _rule(group).block_states(group, block).items():
                begin = ends.get((id(parameter.storage), name), 0)
                found[tensor, number, name] = (begin, size)
                ends[id(parameter.storage), name] = begin + size
    seen: dict[int, int] = {}
    starts = {}
    for index, matrix in enumerate(matrices):  # all blocks of a parameter, in their order
        number = seen.get(matrix.tensor, 0)
        seen[matrix.tensor] = number + 1
        group = groups[bound[matrix.tensor].group_index]
        for name in _rule(group).block_states(group, matrix.block):
            starts[index, name] = found[matrix.tensor, number, name]
    return starts


def _rule(group: Mapping[str, Any]) -> MatrixRule:
    return MATRIX_RULES[group["update_rule"]]
