"""What the hooks of update rules see of one step: matrices, this rank's pieces, and their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashns_dist.exchange import Exchange
from flashns_dist.layout import Piece, rank_pieces
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.learning_rate import learning_rate_scale
from flashns_dist.optim.rounding import element_noise, rounding_seed, stochastic_round_
from flashns_dist.plan import Matrix, Plan


class Run:
    """One step of the matrices of one process group.

    Args:
        bound: The matrix parameters of the process group.
        plan: Of those that have a gradient on some rank.
        exchange: Made for the plan.
        groups: ``param_groups`` of the optimizer.
        state: Its state.
        gradients: This rank's part of each bound parameter's gradient; None counts as zero.
        resident: Matrices that do not travel; numbered after the plan's.
        starts: For each matrix and state by block, where it begins there and how long it is.
        kept: What rules have found out about the plan, from step to step.
    """

    def __init__(
        self,
        bound: Sequence[BoundParameter],
        plan: Plan,
        exchange: Exchange,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
        resident: Sequence[Matrix],
        starts: Mapping[tuple[int, str], tuple[int, int]],
        kept: dict[Any, Any],
    ) -> None:
        self.bound = bound
        self.plan = plan
        self.exchange = exchange
        self.groups = groups
        self.gradients = gradients
        self.choices: dict[int, Any] = {}  # rows or columns of matrices, where a rule selects some
        self._state = state
        self._starts = starts
        self.kept = kept
        self._matrices = (*plan.matrices, *resident)
        self._local: dict[tuple[int, str], Tensor] = {}

    def matrix(self, index: int) -> Matrix:
        return self._matrices[index]

    def pieces_of(self, index: int) -> tuple[Piece, ...]:
        """What this rank stores of a matrix."""
        matrix = self._matrices[index]
        return rank_pieces(matrix.layout, matrix.block, self.bound[matrix.tensor].group_rank)

    def group_of(self, index: int) -> int:
        """Index of the parameter group of a matrix."""
        return self.bound[self._matrices[index].tensor].group_index

    def matrices_of(self, group_index: int) -> list[int]:
        """A parameter group's matrices in this step: the same on every rank."""
        return [i for i in range(len(self._matrices)) if self.group_of(i) == group_index]

    def weight(self, tensor: int) -> Tensor:
        """This rank's part of a parameter."""
        return self._cached(tensor, "", self.bound[tensor].storage)

    def local_state(self, tensor: int, name: str) -> Tensor:
        """This rank's part of a state that is sharded as its parameter is."""
        return self._cached(tensor, name, self._state[self.bound[tensor].storage][name])

    def block_state(self, index: int, name: str) -> Tensor:
        """What a matrix has in a state by block, the same on every rank: one-dimensional."""
        whole: Tensor = self._state[self.bound[self._matrices[index].tensor].storage][name]
        return whole.narrow(0, *self._starts[index, name])

    def _cached(self, tensor: int, name: str, value: Tensor) -> Tensor:
        found = self._local.get((tensor, name))
        if found is None:
            found = self._local[tensor, name] = self.bound[tensor].local(value)
        return found

    def step_of(self, tensor: int) -> int:
        """How many steps a parameter has made, this one included."""
        return int(self._state[self.bound[tensor].storage]["step"].item())


@dataclass(frozen=True)
class Pieces:
    """What one bucket holds of one parameter group.

    Attributes:
        run: The step.
        group: The parameter group.
        matrices: Its matrices in the bucket, the same on every rank.
        held: What this rank stores of them: (matrix, piece).
    """

    run: Run
    group: dict[str, Any]
    matrices: tuple[int, ...]
    held: tuple[tuple[int, Piece], ...]

    def state(self, name: str) -> list[Tensor]:
        """Views of a state that is sharded as the parameters are."""
        run = self.run
        return [p.view(run.local_state(run.matrix(i).tensor, name)) for i, p in self.held]

    def gradients(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Views of the gradients; zeros like ``like`` where this rank has none."""
        found = []
        for (index, piece), other in zip(self.held, like, strict=True):
            gradient = self.run.gradients[self.run.matrix(index).tensor]
            found.append(torch.zeros_like(other) if gradient is None else piece.view(gradient))
        return found

    def weights(self) -> list[Tensor]:
        """Views of the parameters."""
        return [p.view(self.run.weight(self.run.matrix(i).tensor)) for i, p in self.held]

    def scales(self) -> list[float]:
        """Factor on the learning rate of each piece's matrix."""
        rule = self.group["adjust_lr_fn"]
        return [learning_rate_scale(rule, self.run.matrix(i).block.shape) for i, _ in self.held]

    def write(self, weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write fp32 values into weights of lower precision, as the group rounds.

        A value that is its weight has been updated in place.
        """
        for (index, piece), weight, value in zip(self.held, weights, values, strict=True):
            if value is weight:
                continue
            if self.group["rounding"] == "nearest":
                weight.copy_(value)
                continue
            tensor = self.run.matrix(index).tensor
            bound = self.run.bound[tensor]
            seed = rounding_seed(bound.name, self.run.step_of(tensor))
            noise = element_noise(seed, piece.box, bound.layout.shape, weight.device)
            stochastic_round_(weight, value, noise)


__all__ = ["Pieces", "Run"]
