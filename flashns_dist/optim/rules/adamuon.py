"""The AdaMuon update rule: Muon, with elements scaled by their second moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import frexp, ldexp, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashns_dist.exchange import reduce_sum_
from flashns_dist.optim.pieces import Pieces
from flashns_dist.optim.rules.muon import MUON_SETTINGS, Muon, update_weights
from flashns_dist.optim.rules.rule import check_fraction, check_positive
from flashns_dist.optim.rules.scaling import chunk_size

_BITS = 30  # of a square, relative to the largest that there can be


class AdaMuon(Muon):
    """AdaMuon (arXiv 2507.11005), with norms of whole matrices whatever their sharding.

    With Muon's ``d``, ``O = polar(sign(d))``, ``v <- beta2 v + (1 - beta2) O^2``,
    ``O' = O / (sqrt(v) + eps)``, scaled to the Frobenius norm ``sqrt(min(rows, cols))``; the
    paper's root mean square of 0.2 is ``adjust_lr_fn="match_rms_adamw"``. The second moment is
    sharded as the parameter is. Sums of squares are of integers, so that their order does not
    matter.
    """

    name = "adamuon"
    settings: ClassVar[Mapping[str, Any]] = {**MUON_SETTINGS, "beta2": 0.95}
    local_states = ("momentum_buffer", "second_moment")

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check_fraction("beta2", group["beta2"])
        check_positive("eps", group["eps"])

    def before(self, pieces: Pieces) -> list[Tensor]:
        directions = super().before(pieces)
        return list(torch._foreach_sign(directions)) if directions else []

    def after(self, pieces: Pieces, updates: Sequence[Tensor]) -> None:
        """Collectives: one ``all_reduce`` on the process group, of a number per matrix."""
        run, beta2, eps = pieces.run, float(pieces.group["beta2"]), float(pieces.group["eps"])
        stacks = run.kept.get((self.name, pieces.matrices))
        if stacks is None:
            stacks = run.kept[self.name, pieces.matrices] = _Stacks(pieces)
        values, scaled = stacks.values(updates)
        if scaled:
            moments = pieces.state("second_moment")
            torch._foreach_mul_(moments, beta2)
            squares = torch._foreach_mul(scaled, scaled)
            torch._foreach_mul_(squares, 1 - beta2)
            torch._foreach_add_(moments, squares)
            del squares
            roots = torch._foreach_sqrt(moments)
            torch._foreach_add_(roots, eps)
            torch._foreach_div_(scaled, roots)
            del roots
        # v >= (1 - beta2) O^2, so no square exceeds 1 / (1 - beta2).
        unit = ldexp(1.0, frexp(1 / (1 - beta2))[1] - _BITS)
        sums = stacks.square_sums(values, unit)
        reduce_sum_(sums, stacks.process_group)
        factors = torch.where(sums > 0, stacks.norms / (sums.double() * unit).sqrt(), 0.0)
        for value, stack in zip(values, stacks.stacks, strict=True):
            value.mul_(factors[stack.numbers].to(value.dtype)[:, None])
        update_weights(pieces, scaled)


@dataclass(frozen=True)
class _Stack:
    """Pieces with equally many elements.

    Attributes:
        positions: Among the held pieces.
        numbers: Of their matrices, on the device.
        numel: Elements of each.
        dtype: Of their second moments.
        is_counted: Whether no earlier rank stores the same.
    """

    positions: list[int]
    numbers: Tensor
    numel: int
    dtype: torch.dtype
    is_counted: bool


class _Stacks:
    """This rank's pieces of one bucket by equal size. Made once per plan."""

    def __init__(self, pieces: Pieces) -> None:
        run = pieces.run
        bound = run.bound[run.matrix(pieces.matrices[0]).tensor]
        self.process_group = bound.process_group
        self.device = bound.local(bound.storage).device
        wanted = [sqrt(min(run.matrix(index).block.shape)) for index in pieces.matrices]
        self.norms = torch.tensor(wanted, dtype=torch.float64, device=self.device)
        number = {index: i for i, index in enumerate(pieces.matrices)}
        alike: dict[tuple[int, torch.dtype, bool], list[int]] = {}
        for position, ((index, piece), moment) in enumerate(
            zip(pieces.held, pieces.state("second_moment"), strict=True)
        ):
            holders = run.matrix(index).layout.holders[piece.fragment.box]
            key = (piece.box.numel, moment.dtype, holders[0] == bound.group_rank)
            alike.setdefault(key, []).append(position)
        self.stacks = [
            _Stack(
                positions,
                torch.tensor([number[pieces.held[p][0]] for p in positions], device=self.device),
                *key,
            )
            for key, positions in alike.items()
        ]

    def values(self, updates: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Copies in the moments' dtype: a row each of one tensor per stack, and piece by piece."""
        stacked, copies = [], list(updates)
        for stack in self.stacks:
            shape = (len(stack.positions), stack.numel)
            rows = torch.empty(shape, dtype=stack.dtype, device=self.device)
            stacked.append(rows)
            for position, row in zip(stack.positions, rows.unbind(), strict=True):
                copies[position] = row.view(updates[position].shape)
        if copies:
            torch._foreach_copy_(copies, list(updates))
        return stacked, copies

    def square_sums(self, values: Sequence[Tensor], unit: float) -> Tensor:
        """By matrix, the sum of the squares of what this rank counts, in units: int64."""
        sums = torch.zeros(len(self.norms), dtype=torch.int64, device=self.device)
        for rows, stack in zip(values, self.stacks, strict=True):
            if not stack.is_counted:
                continue
            count = chunk_size(stack.numel, self.device)
            for part, numbers in zip(rows.split(count), stack.numbers.split(count), strict=True):
                squares = part.square().mul_(1 / unit).to(torch.int64)
                sums.index_add_(0, numbers, squares.sum(1))
        return sums


__all__ = ["AdaMuon"]
