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

    def check_layout(self, bound: BoundParameter, group: Mapping[str, Any]) -> None:
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
        geometry = run.kept.get((self.name, group_index))
        if geometry is None:
            geometry = run.kept[self.name, group_index] = _Geometry(run, group_index)
        momenta = []
        for index, piece in geometry.held:
            tensor = run.matrix(index).tensor
            momentum = piece.view(run.local_state(tensor, "momentum_buffer"))
            gradient = run.gradients[tensor]
            if gradient is not None:
                momentum.add_(piece.view(gradient))
            momenta.append(momentum)
        sums = _sums(geometry, momenta)
        run.choices.update(_choices(geometry, _largest(geometry, sums)))

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


class _Geometry:
    """Where the matrices of one parameter group lie; numbered from 0 here. Made once per plan."""

    def __init__(self, run: Run, group_index: int) -> None:
        group = run.groups[group_index]
        self.matrices = run.matrices_of(group_index)
        bound = run.bound[run.matrix(self.matrices[0]).tensor]
        self.process_group = bound.process_group
        self.device = bound.local(bound.storage).device
        self.works = [run.matrix(i).work_shape for i in self.matrices]
        shapes = [run.matrix(i).block.shape for i in self.matrices]
        self.dims = [_selected_dim(shape, group) for shape in shapes]
        self.lengths = [shape[dim] for shape, dim in zip(shapes, self.dims, strict=True)]
        self.starts = list(accumulate(self.lengths, initial=0))
        self.held: list[tuple[int, Piece]] = []
        self.numbers: list[int] = []
        self.boxes: list[Box] = []
        self.counted: list[bool] = []  # whether no earlier rank stores the same
        for number, index in enumerate(self.matrices):
            for piece in run.pieces_of(index):
                holders = run.matrix(index).layout.holders[piece.fragment.box]
                self.held.append((index, piece))
                self.numbers.append(number)
                self.boxes.append(_box(run, index, piece))
                self.counted.append(holders[0] == bound.group_rank)
        self.number_of_piece = torch.tensor(self.numbers, dtype=torch.int64, device=self.device)
        self.borders = [
            borders(run.plan, i, dim) for i, dim in zip(self.matrices, self.dims, strict=True)
        ]
        places = [
            start + border
            for start, found in zip(self.starts, self.borders, strict=False)
            for border in found
        ]
        self.places = torch.tensor(places, device=self.device)


def _sums(geometry: _Geometry, momenta: Sequence[Tensor]) -> Tensor:
    """Sums of magnitudes of all rows or columns: int64, exact, the same on every rank."""
    device = geometry.device
    largest = torch.zeros(len(geometry.matrices), dtype=torch.float64, device=device)
    if momenta:
        found = torch.stack(list(torch._foreach_norm(list(momenta), ord=float("inf")))).double()
        largest.scatter_reduce_(0, geometry.number_of_piece, found, "amax")
    reduce_largest_(largest, geometry.process_group)
    exponents = (_BITS - torch.frexp(largest).exponent).clamp(max=126)  # in fp32
    scales = torch.ldexp(torch.ones_like(largest), exponents)
    sums = torch.zeros(geometry.starts[-1], dtype=torch.int64, device=device)
    for momentum, number, box, is_counted in zip(
        momenta, geometry.numbers, geometry.boxes, geometry.counted, strict=True
    ):
        if is_counted:
            dim = geometry.dims[number]
            scaled = momentum.view(box.size).abs().mul_(scales[number].to(momentum.dtype))
            begin = geometry.starts[number] + box.start[dim]
            magnitudes = scaled.to(torch.int32)
            sums[begin : begin + box.size[dim]] += magnitudes.sum(1 - dim, dtype=torch.int64)
    reduce_sum_(sums, geometry.process_group)
    return sums


def _largest(geometry: _Geometry, sums: Tensor) -> list[Tensor]:
    """For each matrix, the indices with the largest sums, ascending; of equals the first."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (length, dim) in enumerate(zip(geometry.lengths, geometry.dims, strict=True)):
        alike.setdefault((length, geometry.works[number][dim]), []).append(number)
    chosen: dict[int, Tensor] = {}
    for (length, count), numbers in alike.items():
        rows = torch.stack([sums.narrow(0, geometry.starts[n], length) for n in numbers])
        order = torch.sort(rows, dim=1, descending=True, stable=True).indices
        found = order[:, :count].sort(dim=1).values
        chosen.update(zip(numbers, found.unbind(), strict=True))
    return [chosen[number] for number in range(len(geometry.matrices))]


def _choices(geometry: _Geometry, chosen: Sequence[Tensor]) -> dict[int, Choice]:
    """How many of the chosen indices lie in each box. Waits for the device."""
    starts, device = geometry.starts, geometry.device
    mask = torch.zeros(starts[-1], dtype=torch.int32, device=device)
    mask[torch.cat([indices + start for indices, start in zip(chosen, starts, strict=False)])] = 1
    below = torch.zeros(len(mask) + 1, dtype=torch.int32, device=device)
    torch.cumsum(mask, 0, out=below[1:])
    counts = iter(below[geometry.places].tolist())
    choices = {}
    for number, index in enumerate(geometry.matrices):
        found = {border: next(counts) for border in geometry.borders[number]}
        first = found[0]
        selection = Selection(
            geometry.dims[number],
            geometry.works[number],
            {border: count - first for border, count in found.items()},
        )
        choices[index] = Choice(selection, chosen[number])
    return choices


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
