"""The Dion2 update rule: only the largest rows (or columns) of the momentum are orthogonalized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashns_dist.layout import Block, Box
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.pieces import Pieces, Run
from flashns_dist.optim.rules.muon import MUON_SETTINGS, Muon, orthogonalized_, update_weights
from flashns_dist.optim.rules.normuon import moment_dtype, scale_rows_, share_row_moments
from flashns_dist.optim.rules.rule import check_fraction, check_positive
from flashns_dist.optim.rules.scaling import renormalize_
from flashns_dist.optim.rules.selection import (
    Geometry,
    box_of,
    check_rectangles,
    choose,
    selected_dim,
)


class Dion2(Muon):
    """Dion2 (arXiv 2512.16928), selecting from the whole matrix whatever its sharding.

    ``m <- m + g``; of the rows ``K`` with the largest sums of magnitudes, ``O = polar(m[K])``, then
    ``m[K] <- momentum m[K]`` (error feedback) and ``w[K] <- w[K] - lr scale O``, with the scale of
    the whole matrix. All weights decay. There is no Nesterov momentum.

    Only the selected rows travel. Sums of magnitudes are of integers, 30 bits from the largest of
    the matrix down, and equal ones are told apart by their index: the selection does not depend on
    the order of summation, and so not on the number of ranks.

    Settings, besides Muon's: ``fraction`` of rows; ``select``: ``"rows"``, ``"columns"``, or
    ``"shorter"`` for rows of wide and columns of tall matrices; ``normuon``: NorMuon's scaling of
    the selected rows, with ``beta2``.
    """

    name = "dion2"
    selects = True
    settings: ClassVar[Mapping[str, Any]] = {
        **MUON_SETTINGS,
        "fraction": 0.25,
        "select": "shorter",
        "normuon": False,
        "beta2": 0.95,
    }

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check_fraction("fraction", group["fraction"], one=True)
        check_fraction("beta2", group["beta2"])
        if group["normuon"]:
            check_positive("eps", group["eps"])
        if group["select"] not in ("shorter", "rows", "columns"):
            raise ValueError(f'select={group["select"]!r}: use "shorter", "rows" or "columns"')
        if group["normuon"] and group["select"] == "columns":
            raise ValueError(
                'select="columns" with normuon=True would scale parts of rows; use "rows"'
            )

    def check_layout(self, bound: BoundParameter, group: Mapping[str, Any]) -> None:
        check_rectangles(bound)

    def block_states(self, group: Mapping[str, Any], block: Block) -> dict[str, int]:
        return {"row_moment": block.rows} if group["normuon"] else {}

    def kind(self, group: Mapping[str, Any]) -> str:
        return f"{super().kind(group)}:{group['eps']}"

    def work_shape(self, shape: tuple[int, int], group: Mapping[str, Any]) -> tuple[int, int]:
        rows, cols = shape
        if selected_dim(shape, group) == 0:
            return ceil(float(group["fraction"]) * rows), cols
        return rows, ceil(float(group["fraction"]) * cols)

    def begin(self, run: Run, group_index: int) -> None:
        """Add the gradients to the momenta and select.

        Collectives: two ``all_reduce`` on the process group, of a number per matrix and one per
        row. Waits for the device once.
        """
        geometry = run.kept.get((self.name, group_index))
        if geometry is None:
            geometry = run.kept[self.name, group_index] = Geometry(run, group_index)
        momenta, added, gradients = [], [], []
        for index, piece in geometry.held:
            tensor = run.matrix(index).tensor
            momentum = piece.view(run.local_state(tensor, "momentum_buffer"))
            gradient = run.gradients[tensor]
            if gradient is not None:
                added.append(momentum)
                gradients.append(piece.view(gradient))
            momenta.append(momentum)
        if added:
            torch._foreach_add_(added, gradients)
        run.choices.update(choose(geometry, momenta))

    def before(self, pieces: Pieces) -> list[Tensor]:
        if not pieces.held:
            return []
        places, selected = _places(pieces), []
        momenta = pieces.state("momentum_buffer")
        for place, momentum in zip(places, momenta, strict=True):
            inside = momentum.view(place.box.size)
            selected.append(inside.index_select(place.dim, place.indices))
        kept = torch._foreach_mul(selected, float(pieces.group["momentum"]))
        for place, momentum, value in zip(places, momenta, kept, strict=True):
            momentum.view(place.box.size).index_copy_(place.dim, place.indices, value)
        return selected

    def on_owner(
        self, run: Run, indices: Sequence[int], batch: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        updates = orthogonalized_(batch, group)
        if group["normuon"]:
            moments = [run.block_state(index, "row_moment") for index in indices]
            starts = list(accumulate((len(m) for m in moments[:-1]), initial=0))
            rows = [run.choices[index].indices for index in indices]
            where = torch.stack(torch._foreach_add(rows, starts))
            dtype = moment_dtype(updates)
            flat = torch.cat([moment.to(dtype) for moment in moments])
            selected = flat[where]
            scale_rows_(updates, selected, group)
            flat[where] = selected
            torch._foreach_copy_(moments, list(flat.split([len(m) for m in moments])))
        renormalize_(updates, group["renormalize"])
        return updates

    def after(self, pieces: Pieces, updates: Sequence[Tensor]) -> None:
        if not pieces.held:
            return
        sizes = [piece.box.numel for _, piece in pieces.held]
        whole = []
        for place, update, part, (_, piece) in zip(
            _places(pieces),
            updates,
            updates[0].new_zeros(sum(sizes)).split(sizes),
            pieces.held,
            strict=True,
        ):
            part.view(place.box.size).index_copy_(place.dim, place.indices, update)
            whole.append(part.view(piece.box.size))
        update_weights(pieces, whole)

    def end(self, run: Run, group_index: int) -> None:
        if run.groups[group_index]["normuon"]:
            share_row_moments(run, run.matrices_of(group_index))


@dataclass(frozen=True)
class _Place:
    """Where a piece's selected rows or columns are.

    Attributes:
        box: The piece in its matrix.
        dim: 0 for rows, 1 for columns.
        indices: Counted from the box's beginning.
    """

    box: Box
    dim: int
    indices: Tensor


def _places(pieces: Pieces) -> list[_Place]:
    boxes = [box_of(pieces.run, index, piece) for index, piece in pieces.held]
    choices = [pieces.run.choices[index] for index, _ in pieces.held]
    dims = [choice.selection.dim for choice in choices]
    inside = [choice.inside(box) for choice, box in zip(choices, boxes, strict=True)]
    starts = [box.start[dim] for box, dim in zip(boxes, dims, strict=True)]
    return [
        _Place(*found)
        for found in zip(boxes, dims, torch._foreach_sub(inside, starts), strict=True)
    ]


__all__ = ["Dion2"]
