"""The Dion2 update rule: only the largest rows (or columns) of the momentum are orthogonalized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashns_dist.exchange import Selection, borders, matrix_box, reduce_largest_, reduce_sum_
from flashns_dist.layout import Block, Box, Piece, block_holders
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.pieces import Pieces, Run
from flashns_dist.optim.rules.muon import MUON_SETTINGS, Muon, orthogonalized_, update_weights
from flashns_dist.optim.rules.normuon import scale_rows_, share_row_moments
from flashns_dist.optim.rules.rule import check_fraction, check_positive
from flashns_dist.optim.rules.scaling import renormalize_
from flashns_dist.plan import Matrix

_BITS = 30  # of a magnitude, relative to the largest of its matrix


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

    def check_layout(self, bound: BoundParameter) -> None:
        check_rectangles(bound)

    def block_states(self, group: Mapping[str, Any], block: Block) -> dict[str, int]:
        return {"row_moment": block.rows} if group["normuon"] else {}

    def kind(self, group: Mapping[str, Any]) -> str:
        return f"{super().kind(group)}:{group['eps']}"

    def work_shape(self, shape: tuple[int, int], group: Mapping[str, Any]) -> tuple[int, int]:
        rows, cols = shape
        if _selected_dim(shape, group) == 0:
            return ceil(float(group["fraction"]) * rows), cols
        return rows, ceil(float(group["fraction"]) * cols)

    def begin(self, run: Run, group_index: int) -> None:
        """Add the gradients to the momenta and select.

        Collectives: two ``all_reduce`` on the process group, of a number per matrix and one per
        row. Waits for the device once.
        """
        work = _Work(run, group_index)
        for (index, piece), momentum in zip(work.held, work.momenta, strict=True):
            gradient = run.gradients[run.matrix(index).tensor]
            if gradient is not None:
                momentum.add_(piece.view(gradient))
        run.choices.update(work.select())

    def before(self, pieces: Pieces) -> list[Tensor]:
        mu = float(pieces.group["momentum"])
        directions = []
        for (index, piece), momentum in zip(
            pieces.held, pieces.state("momentum_buffer"), strict=True
        ):
            choice, box = pieces.run.choices[index], _box(pieces.run, index, piece)
            inside = momentum.view(box.size)
            where = choice.inside(box)
            selected = inside.index_select(choice.selection.dim, where)
            inside.index_copy_(choice.selection.dim, where, selected * mu)
            directions.append(selected)
        return directions

    def on_owner(
        self, run: Run, indices: Sequence[int], batch: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        updates = orthogonalized_(batch, group)
        if group["normuon"]:
            for index, update in zip(indices, updates, strict=True):
                moments = run.block_state(index, "row_moment")
                where = run.choices[index].indices
                selected = moments[where]
                scale_rows_(update, selected, group)
                moments[where] = selected
        renormalize_(updates, group["renormalize"])
        return updates

    def after(self, pieces: Pieces, updates: Sequence[Tensor]) -> None:
        whole = []
        for (index, piece), update in zip(pieces.held, updates, strict=True):
            choice, box = pieces.run.choices[index], _box(pieces.run, index, piece)
            full = update.new_zeros(box.size)
            full.index_copy_(choice.selection.dim, choice.inside(box), update)
            whole.append(full.view(piece.box.size))
        update_weights(pieces, whole)

    def end(self, run: Run, group_index: int) -> None:
        if run.groups[group_index]["normuon"]:
            share_row_moments(run, run.matrices_of(group_index))


@dataclass(frozen=True)
class Choice:
    """The rows or columns of one matrix that take part in a step.

    Attributes:
        selection: How many, and where they lie between boxes.
        indices: Ascending, on the device.
    """

    selection: Selection
    indices: Tensor

    def inside(self, box: Box) -> Tensor:
        """The selected indices inside a box of the matrix, counted from its beginning."""
        dim, below = self.selection.dim, self.selection.below
        start, stop = box.start[dim], box.start[dim] + box.size[dim]
        return self.indices[below[start] : below[stop]] - start


class _Work:
    """The matrices of one parameter group in one step, numbered from 0 here."""

    def __init__(self, run: Run, group_index: int) -> None:
        self.run = run
        group = run.groups[group_index]
        self.matrices = run.matrices_of(group_index)
        self.bound = run.bound[run.matrix(self.matrices[0]).tensor]
        self.shapes = [run.matrix(i).block.shape for i in self.matrices]
        self.dims = [_selected_dim(shape, group) for shape in self.shapes]
        self.lengths = [shape[dim] for shape, dim in zip(self.shapes, self.dims, strict=True)]
        self.starts = list(accumulate(self.lengths, initial=0))
        self.held: list[tuple[int, Piece]] = []
        self.numbers: list[int] = []
        for number, index in enumerate(self.matrices):
            for piece in run.pieces_of(index):
                self.held.append((index, piece))
                self.numbers.append(number)
        self.momenta = [
            p.view(run.local_state(run.matrix(i).tensor, "momentum_buffer")) for i, p in self.held
        ]
        self.device = self.bound.local(self.bound.storage).device

    def select(self) -> dict[int, Choice]:
        """The largest rows or columns of every matrix."""
        sums = self._sums()
        chosen = self._largest(sums)
        mask = torch.zeros(self.starts[-1], dtype=torch.int32, device=self.device)
        for number, indices in enumerate(chosen):
            mask[indices + self.starts[number]] = 1
        below = torch.zeros(len(mask) + 1, dtype=torch.int32, device=self.device)
        torch.cumsum(mask, 0, out=below[1:])
        edges = [
            borders(self.run.plan, i, d) for i, d in zip(self.matrices, self.dims, strict=True)
        ]
        places = [s + edge for s, found in zip(self.starts, edges, strict=False) for edge in found]
        counts = iter(below[torch.tensor(places, device=self.device)].tolist())
        choices = {}
        for number, index in enumerate(self.matrices):
            found = {edge: next(counts) for edge in edges[number]}
            first = found[0]
            selection = Selection(
                self.dims[number],
                self.run.matrix(index).work_shape,
                {edge: count - first for edge, count in found.items()},
            )
            choices[index] = Choice(selection, chosen[number])
        return choices

    def _sums(self) -> Tensor:
        """Sums of magnitudes of all rows or columns: int64, exact, the same on every rank."""
        largest = torch.zeros(len(self.matrices), dtype=torch.float64, device=self.device)
        if self.held:
            found = torch.stack(list(torch._foreach_norm(self.momenta, ord=float("inf")))).double()
            where = torch.tensor(self.numbers, device=self.device)
            largest.scatter_reduce_(0, where, found, "amax")
        group = self.bound.process_group
        reduce_largest_(largest, group)
        exponents = (_BITS - torch.frexp(largest).exponent).clamp(max=126)  # in fp32
        scales = torch.ldexp(torch.ones_like(largest), exponents)
        sums = torch.zeros(self.starts[-1], dtype=torch.int64, device=self.device)
        for (index, piece), number, momentum in zip(
            self.held, self.numbers, self.momenta, strict=True
        ):
            holders = self.run.matrix(index).layout.holders[piece.fragment.box]
            if holders[0] != self.bound.group_rank:
                continue  # another replica counts it
            dim, box = self.dims[number], _box(self.run, index, piece)
            scaled = momentum.view(box.size).abs().mul_(scales[number].to(momentum.dtype))
            begin = self.starts[number] + box.start[dim]
            sums[begin : begin + box.size[dim]] += scaled.to(torch.int32).sum(
                1 - dim, dtype=torch.int64
            )
        reduce_sum_(sums, group)
        return sums

    def _largest(self, sums: Tensor) -> list[Tensor]:
        """For each matrix, the indices with the largest sums, ascending; of equals the first."""
        alike: dict[tuple[int, int], list[int]] = {}
        for number, index in enumerate(self.matrices):
            count = self.run.matrix(index).work_shape[self.dims[number]]
            alike.setdefault((self.lengths[number], count), []).append(number)
        chosen: dict[int, Tensor] = {}
        for (length, count), numbers in alike.items():
            rows = torch.stack([sums.narrow(0, self.starts[n], length) for n in numbers])
            order = torch.sort(rows, dim=1, descending=True, stable=True).indices
            found = order[:, :count].sort(dim=1).values
            chosen.update(zip(numbers, found.unbind(), strict=True))
        return [chosen[number] for number in range(len(self.matrices))]


def check_rectangles(bound: BoundParameter) -> None:
    """Raise NotImplementedError where a rank's piece is no rectangle of its matrix."""
    for block in bound.blocks:
        matrix = Matrix(bound.name, 0, bound.layout, block)
        for part, box, _ in block_holders(bound.layout, block):
            matrix_box(matrix, part, box)


def _selected_dim(shape: tuple[int, int], group: Mapping[str, Any]) -> int:
    """0 to select rows, 1 to select columns: from the global shape alone."""
    if group["select"] == "shorter":
        return int(shape[0] > shape[1] and not group["normuon"])
    return int(group["select"] == "columns")


def _box(run: Run, index: int, piece: Piece) -> Box:
    return matrix_box(run.matrix(index), piece.part, piece.box)


__all__ = ["Choice", "Dion2", "check_rectangles"]
