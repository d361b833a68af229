"""The one step loop: momentum, gather, orthogonalize, scatter, update, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashns_dist.exchange import Exchange, Transfer
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.learning_rate import learning_rate_scale
from flashns_dist.optim.muon import apply_update, momentum_direction
from flashns_dist.optim.rounding import element_noise, stochastic_round_
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


Orthogonalizer = Callable[[Tensor, dict[str, Any]], Tensor]


def plan_matrices(
    bound: Sequence[BoundParameter],
    active: Sequence[bool],
    kinds: Sequence[str],
    options: ExchangeOptions,
) -> Plan:
    """The plan for the active parameters of one process group.

    Args:
        bound: All matrix parameters of the group.
        active: Which of them have a gradient in this step.
        kinds: For each, what must agree for its matrices to be batched with others.
        options: How matrices travel.
    """
    matrices = [
        Matrix(b.name, index, b.layout, block, kinds[index])
        for index, b in enumerate(bound)
        if active[index]
        for block in b.blocks
    ]
    return make_plan(
        matrices,
        bound[0].layout.group_size,
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
        orthogonalize: Maps a ``(batch, rows, cols)`` batch and its parameter group to the results.
    """

    def __init__(
        self,
        bound: Sequence[BoundParameter],
        plan: Plan,
        exchange: Exchange,
        orthogonalize: Orthogonalizer,
    ) -> None:
        self._bound = bound
        self._plan = plan
        self._exchange = exchange
        self._orthogonalize = orthogonalize

    def run(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """One step.

        Collectives: two ``all_to_all_single`` per bucket on the process group.

        Args:
            groups: ``param_groups`` of the optimizer.
            state: Its state.
            gradients: This rank's part of each bound parameter's gradient; None counts as zero.
        """
        views = _Views(self._bound, state, gradients)
        exchange, num_buckets = self._exchange, len(self._plan.buckets)
        gathers: dict[int, Transfer] = {}
        scatters: dict[int, Transfer] = {}
        for bucket in range(num_buckets + 1):
            if bucket < num_buckets:
                directions = self._directions(bucket, groups, views)
                gathers[bucket] = exchange.start_gather(bucket, directions)
            if bucket > 0:
                results = self._results(bucket - 1, groups, gathers.pop(bucket - 1))
                scatters[bucket - 1] = exchange.start_scatter(bucket - 1, results)
            if bucket > 1:
                self._update(bucket - 2, groups, views, scatters.pop(bucket - 2))
        if num_buckets:
            self._update(num_buckets - 1, groups, views, scatters.pop(num_buckets - 1))

    def _held_by_group(self, bucket: int) -> dict[int, list[int]]:
        """Positions of the bucket's held pieces by parameter group."""
        found: dict[int, list[int]] = {}
        for position, (index, _) in enumerate(self._exchange.schedules[bucket].held):
            bound = self._bound[self._plan.matrices[index].tensor]
            found.setdefault(bound.group_index, []).append(position)
        return found

    def _directions(
        self, bucket: int, groups: Sequence[dict[str, Any]], views: _Views
    ) -> list[Tensor]:
        held = self._exchange.schedules[bucket].held
        gradients, momenta = [], []
        for index, piece in held:
            tensor = self._plan.matrices[index].tensor
            momentum = piece.view(views.momenta[tensor])
            gradient = views.gradients[tensor]
            gradients.append(
                torch.zeros_like(momentum) if gradient is None else piece.view(gradient)
            )
            momenta.append(momentum)
        directions: list[Tensor] = [torch.empty(0)] * len(held)
        for group_index, positions in self._held_by_group(bucket).items():
            found = momentum_direction(
                [gradients[p] for p in positions],
                [momenta[p] for p in positions],
                groups[group_index],
            )
            for position, direction in zip(positions, found, strict=True):
                directions[position] = direction
        return directions

    def _results(
        self, bucket: int, groups: Sequence[dict[str, Any]], gather: Transfer
    ) -> dict[int, Tensor]:
        """Gather the owned matrices into batches of equal shape and kind, and orthogonalize."""
        schedule = self._exchange.schedules[bucket]
        batches: dict[tuple[tuple[int, int], str], list[int]] = {}
        for index in schedule.owned:
            matrix = self._plan.matrices[index]
            batches.setdefault((matrix.block.shape, matrix.kind), []).append(index)
        inputs: dict[int, Tensor] = {}
        stacks = []
        for (shape, _), indices in batches.items():
            stack = self._exchange.new_batch(len(indices), *shape)
            stacks.append((stack, indices))
            for slot, index in enumerate(indices):
                inputs[index] = stack[slot]
        self._exchange.finish_gather(bucket, gather, inputs)
        results: dict[int, Tensor] = {}
        for stack, indices in stacks:
            group = groups[self._bound[self._plan.matrices[indices[0]].tensor].group_index]
            outputs = self._orthogonalize(stack, group)
            for slot, index in enumerate(indices):
                results[index] = outputs[slot]
        return results

    def _update(
        self, bucket: int, groups: Sequence[dict[str, Any]], views: _Views, scatter: Transfer
    ) -> None:
        updates = self._exchange.finish_scatter(bucket, scatter)
        held = self._exchange.schedules[bucket].held
        by_scale: dict[tuple[int, float], list[int]] = {}
        for position, (index, _) in enumerate(held):
            matrix = self._plan.matrices[index]
            group_index = self._bound[matrix.tensor].group_index
            scale = learning_rate_scale(groups[group_index]["adjust_lr_fn"], matrix.block.shape)
            by_scale.setdefault((group_index, scale), []).append(position)
        for (group_index, scale), positions in by_scale.items():
            group = groups[group_index]
            weights = [
                held[p][1].view(views.weights[self._plan.matrices[held[p][0]].tensor])
                for p in positions
            ]
            full = [w if w.dtype in (torch.float32, torch.float64) else w.float() for w in weights]
            apply_update(
                full,
                [updates[p] for p in positions],
                lr=float(group["lr"]),
                scale=scale,
                weight_decay=float(group["weight_decay"]),
                cautious=bool(group["cautious"]),
            )
            for position, weight, value in zip(positions, weights, full, strict=True):
                if value is not weight:
                    index, piece = held[position]
                    tensor = self._plan.matrices[index].tensor
                    views.write(tensor, piece.box, weight, value, group["rounding"])


class _Views:
    """This rank's parts of weights, momenta and gradients, by parameter."""

    def __init__(
        self,
        bound: Sequence[BoundParameter],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        self._bound = bound
        self._state = state
        self.gradients = gradients
        self.weights = [b.local(b.storage) for b in bound]
        self.momenta = [b.local(state[b.storage]["momentum_buffer"]) for b in bound]

    def write(self, tensor: int, box: Any, weight: Tensor, value: Tensor, rounding: str) -> None:
        """Write an fp32 value into a weight of lower precision."""
        if rounding == "nearest":
            weight.copy_(value)
            return
        bound = self._bound[tensor]
        step = int(self._state[bound.storage]["step"].item())
        seed = step * 1_000_003 + rounding_seed(bound.name)
        noise = element_noise(seed, box, bound.layout.shape, weight.device)
        stochastic_round_(weight, value, noise)


def rounding_seed(name: str) -> int:
    """A number from a parameter's name, the same in every process."""
    seed = 0
    for byte in name.encode():
        seed = (seed * 131 + byte) % 2_147_483_647
    return seed
