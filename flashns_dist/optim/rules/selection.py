"""Which rows or columns of matrices are the largest, whatever the sharding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from flashns_dist.exchange import Selection, borders, matrix_box, reduce_largest_, reduce_sum_
from flashns_dist.layout import Box, Piece, block_holders
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.pieces import Run
from flashns_dist.optim.rules.scaling import chunk_size
from flashns_dist.plan import Matrix

_BITS = 30  # of a magnitude, relative to the largest of its matrix


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
        """The selected indices inside a box of the matrix."""
        dim, below = self.selection.dim, self.selection.below
        return self.indices[below[box.start[dim]] : below[box.start[dim] + box.size[dim]]]


class Geometry:
    """Where the matrices of one parameter group lie; numbered from 0 here. Made once per plan."""

    def __init__(self, run: Run, group_index: int) -> None:
        group = run.groups[group_index]
        self.matrices = run.matrices_of(group_index)
        bound = run.bound[run.matrix(self.matrices[0]).tensor]
        self.process_group = bound.process_group
        self.device = bound.local(bound.storage).device
        self.works = [run.matrix(i).work_shape for i in self.matrices]
        shapes = [run.matrix(i).block.shape for i in self.matrices]
        self.dims = [selected_dim(shape, group) for shape in shapes]
        self.lengths = [shape[dim] for shape, dim in zip(shapes, self.dims, strict=True)]
        self.starts = list(accumulate(self.lengths, initial=0))
        self.held: list[tuple[int, Piece]] = []
        numbers: list[int] = []
        alike: dict[tuple[Any, ...], list[tuple[int, int, Box]]] = {}
        for number, index in enumerate(self.matrices):
            for piece in run.pieces_of(index):
                holders = run.matrix(index).layout.holders[piece.fragment.box]
                if holders[0] == bound.group_rank:  # no earlier rank stores the same
                    box = box_of(run, index, piece)
                    dtype = run.bound[run.matrix(index).tensor].storage.dtype
                    key = (box.size, self.dims[number], dtype)
                    alike.setdefault(key, []).append((len(self.held), number, box))
                self.held.append((index, piece))
                numbers.append(number)
        self.number_of_piece = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        self.stacks = [
            _Stack(self, size, dim, found[begin : begin + count])
            for (size, dim, _), found in alike.items()
            for count in [chunk_size(size[0] * size[1], self.device)]
            for begin in range(0, len(found), count)
        ]
        self.borders = [
            borders(run.plan, i, dim) for i, dim in zip(self.matrices, self.dims, strict=True)
        ]
        places = [
            start + border
            for start, found in zip(self.starts, self.borders, strict=False)
            for border in found
        ]
        self.places = torch.tensor(places, device=self.device)


class _Stack:
    """Pieces of equal size, whose magnitudes are summed at once.

    Attributes:
        positions: In ``Geometry.held``.
        numbers: Of their matrices.
        size: Rows and columns of each.
        dim: 0 for sums of rows, 1 of columns.
        rows: Where the sums belong among those of all matrices, piece by piece.
    """

    def __init__(
        self,
        geometry: Geometry,
        size: tuple[int, ...],
        dim: int,
        found: Sequence[tuple[int, int, Box]],
    ) -> None:
        self.positions = [position for position, _, _ in found]
        self.size, self.dim = size, dim
        device = geometry.device
        self.numbers = torch.tensor([number for _, number, _ in found], device=device)
        begins = [geometry.starts[number] + box.start[dim] for _, number, box in found]
        offsets = torch.arange(size[dim], device=device)
        self.rows = (torch.tensor(begins, device=device)[:, None] + offsets).flatten()


def choose(geometry: Geometry, momenta: Sequence[Tensor]) -> dict[int, Choice]:
    """The rows or columns of every matrix with the largest sums of magnitudes.

    Collectives: two ``all_reduce`` on the process group, of a number per matrix and one per row or
    column. Waits for the device once.

    Args:
        geometry: Of the matrices.
        momenta: What this rank stores of them, in the order of ``geometry.held``.
    """
    return _choices(geometry, _largest(geometry, _sums(geometry, momenta)))


def _sums(geometry: Geometry, momenta: Sequence[Tensor]) -> Tensor:
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
    for stack in geometry.stacks:
        scaled = torch.stack([momenta[p].view(stack.size) for p in stack.positions]).abs_()
        scaled.mul_(scales[stack.numbers].to(scaled.dtype)[:, None, None])
        magnitudes = scaled.to(torch.int64).sum(2 - stack.dim)
        sums.index_add_(0, stack.rows, magnitudes.flatten())
    reduce_sum_(sums, geometry.process_group)
    return sums


def _largest(geometry: Geometry, sums: Tensor) -> list[Tensor]:
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


def _choices(geometry: Geometry, chosen: Sequence[Tensor]) -> dict[int, Choice]:
    """How many of the chosen indices lie in each box. Waits for the device."""
    starts, device = geometry.starts, geometry.device
    mask = torch.zeros(starts[-1], dtype=torch.int32, device=device)
    mask[torch.cat(torch._foreach_add(list(chosen), starts[:-1]))] = 1
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


def selected_dim(shape: tuple[int, int], group: Mapping[str, Any]) -> int:
    """0 to select rows, 1 to select columns: from the global shape alone."""
    if group["select"] == "shorter":
        return int(shape[0] > shape[1] and not group["normuon"])
    return int(group["select"] == "columns")


def box_of(run: Run, index: int, piece: Piece) -> Box:
    """Rows and columns of a piece in its matrix."""
    return matrix_box(run.matrix(index), piece.part, piece.box)


__all__ = ["Choice", "Geometry", "box_of", "check_rectangles", "choose", "selected_dim"]
