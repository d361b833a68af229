"""The one step loop: rules' hooks and the exchange, bucket by bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashns_dist.exchange import Exchange, Transfer
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.pieces import Pieces, Run
from flashns_dist.optim.rules import MATRIX_RULES, MatrixRule
from flashns_dist.plan import CostModel, Matrix, Plan, make_plan


@dataclass(frozen=True)
class ExchangeOptions:
    """How matrices travel between ranks.

    Attributes:
        wire_dtype: Dtype that travels both ways and that matrices are orthogonalized from, also
            where nothing needs to travel (so that results do not depend on the number of ranks).
        bucket_bytes: Most bytes that a rank buffers for one direction of one bucket.
        replicas: Whether replicas (DDP, HSDP) divide the matrices among themselves (``"share"``),
            each do all of them (``"repeat"``), or what the cost model predicts to be faster
            (``"auto"``).
        replica_group: The process group over which plain (not DTensor) parameters are replicated:
            ``"world"``, a process group, or None where each process trains by itself.
        cost: Cost model of the planner (default: one H200's).
    """

    wire_dtype: torch.dtype = torch.bfloat16
    bucket_bytes: int = 64 * 2**20
    replicas: str = "auto"
    replica_group: dist.ProcessGroup | str | None = "world"
    cost: CostModel | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.wire_dtype, torch.dtype) or not self.wire_dtype.is_floating_point:
            raise ValueError(f"wire_dtype={self.wire_dtype} must be a floating-point dtype")
        if self.bucket_bytes <= 0:
            raise ValueError(f"bucket_bytes={self.bucket_bytes} must be positive")
        if self.replicas not in ("auto", "share", "repeat"):
            raise ValueError(f'replicas={self.replicas!r}: use "auto", "share" or "repeat"')
        if isinstance(self.replica_group, str) and self.replica_group != "world":
            raise ValueError(
                f'replica_group={self.replica_group!r}: use "world", None or a process group'
            )


def matrices_of(
    bound: Sequence[BoundParameter],
    active: Sequence[bool],
    kinds: Sequence[str],
    groups: Sequence[dict[str, Any]],
    *,
    travel: bool,
) -> list[Matrix]:
    """The matrices of the active parameters of one process group that travel, or that do not.

    Args:
        bound: All matrix parameters of the process group.
        active: Which of them have a gradient in this step.
        kinds: For each, what must agree for its matrices to be batched with others.
        groups: ``param_groups`` of the optimizer.
        travel: Which ones.
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
            found.append(matrix)
    return found


def plan_matrices(matrices: Sequence[Matrix], group_size: int, options: ExchangeOptions) -> Plan:
    """The plan for matrices of one process group."""
    return make_plan(
        matrices,
        group_size,
        cost=options.cost,
        wire_itemsize=options.wire_dtype.itemsize,
        bucket_bytes=options.bucket_bytes,
        replicas=options.replicas,  # type: ignore[arg-type]
    )


class MatrixStep:
    """Updates the matrices of one process group, once per ``run``.

    Args:
        bound: The matrix parameters of one process group.
        plan: Made for the active ones of them.
        exchange: Made for the plan.
        resident: Their matrices that do not travel.
        groups: ``param_groups`` of the optimizer.
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
        self._starts = _block_starts(bound, (*plan.matrices, *resident), groups)
        self._kept: dict[Any, Any] = {}

    def run(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """One step.

        Collectives: two ``all_to_all_single`` per bucket on the process group, and those of the
        rules.

        Args:
            groups: ``param_groups`` of the optimizer.
            state: Its state.
            gradients: This rank's part of each bound parameter's gradient; None counts as zero.
        """
        run = Run(
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
        present = sorted(
            {self._bound[m.tensor].group_index for m in (*self._plan.matrices, *self._resident)}
        )
        for group_index in present:
            _rule(groups[group_index]).begin(run, group_index)
        if run.choices:
            selections = {index: choice.selection for index, choice in run.choices.items()}
            self.exchange.narrow(selections)
        self._run_buckets(run)
        for group_index in present:
            _rule(groups[group_index]).end(run, group_index)

    def _run_buckets(self, run: Run) -> None:
        """Bucket k + 1 is gathered and bucket k - 1 scattered while k is on its owners."""
        exchange, num_buckets = self.exchange, len(self._plan.buckets)
        batches: dict[int, _Batches] = {}
        gathers: dict[int, Transfer] = {}
        scatters: dict[int, Transfer] = {}
        for bucket in range(num_buckets + 1):
            if bucket < num_buckets:
                batches[bucket] = _Batches(exchange, bucket)
                into = batches[bucket].matrices
                directions = self._before(bucket, run, into)
                gathers[bucket] = exchange.start_gather(bucket, directions, into)
            if bucket > 0:
                owned = batches.pop(bucket - 1)
                exchange.finish_gather(bucket - 1, gathers.pop(bucket - 1), owned.matrices)
                results = self._on_owner(run, owned)
                del owned
                scatters[bucket - 1] = exchange.start_scatter(bucket - 1, results)
            if bucket > 1:
                self._after(bucket - 2, run, scatters.pop(bucket - 2))
        if num_buckets:
            self._after(num_buckets - 1, run, scatters.pop(num_buckets - 1))

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

    def _before(self, bucket: int, run: Run, into: Mapping[int, Tensor]) -> list[Tensor]:
        held = self.exchange.schedules[bucket].held
        directions: list[Tensor] = [torch.empty(0)] * len(held)
        for pieces, positions in self._pieces(bucket, run):
            found = _rule(pieces.group).before(pieces)
            for position, direction in zip(positions, found, strict=True):
                directions[position] = direction
        return directions

    def _on_owner(self, run: Run, owned: _Batches) -> dict[int, Tensor]:
        results: dict[int, Tensor] = {}
        for stack, indices in owned.stacks:
            group = run.groups[run.group_of(indices[0])]
            outputs = _rule(group).on_owner(run, indices, stack, group)
            for slot, index in enumerate(indices):
                results[index] = outputs[slot]
        return results

    def _after(self, bucket: int, run: Run, scatter: Transfer) -> None:
        updates = self.exchange.finish_scatter(bucket, scatter)
        for pieces, positions in self._pieces(bucket, run):
            _rule(pieces.group).after(pieces, [updates[p] for p in positions])


class _Batches:
    """A bucket's matrices on their owner, stacked by equal shape and kind, to be gathered into.

    Attributes:
        stacks: Batches ``(len(indices), rows, cols)`` and the indices of their matrices.
        matrices: Views of them, by index.
    """

    def __init__(self, exchange: Exchange, bucket: int) -> None:
        alike: dict[tuple[tuple[int, int], str], list[int]] = {}
        for index in exchange.schedules[bucket].owned:
            matrix = exchange.plan.matrices[index]
            alike.setdefault((matrix.work_shape, matrix.kind), []).append(index)
        self.stacks = [
            (exchange.new_batch(len(indices), *shape), indices)
            for (shape, _), indices in alike.items()
        ]
        self.matrices = {
            index: stack[slot]
            for stack, indices in self.stacks
            for slot, index in enumerate(indices)
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
