"""The blocks that a split function cuts a parameter into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from flashns_dist.layout.fragment import Box, flat_range_boxes
from flashns_dist.layout.matrix import Block


@dataclass(frozen=True)
class Split:
    """A view from a function that takes a parameter apart, as gram-newton-schulz's Muon has it.

    The function is called once, on the CPU, with the elements' numbers in place of their values
    (int64, the global shape; 8 bytes per element for a moment). What it returns says which elements
    each matrix holds; so it works for any sharding, but can only select and move elements.

    Attributes:
        split: Maps the parameter to its matrices ``(rows, cols)``, or stacks ``(count, rows,
            cols)`` of them. A matrix must be made of boxes of the parameter that stand one below
            the other or one beside the other; each is a copy of its own, so few large ones are
            fast.
        recombine: Its inverse, checked against it; not needed.
    """

    split: Callable[[Tensor], Sequence[Tensor]]
    recombine: Callable[[list[Tensor]], Tensor] | None = None

    def __call__(self, shape: tuple[int, ...]) -> tuple[Block, ...]:
        """The blocks, in the order of what ``split`` returns.

        Raises:
            ValueError: The functions do more than move elements, or a matrix is no stack of boxes.
        """
        numbers = torch.arange(prod(shape), device="cpu").view(shape)
        matrices = self._matrices(numbers.clone())
        if self.recombine is not None:
            again = _called("recombine", self.recombine, [m.clone() for m in matrices])
            if not isinstance(again, Tensor) or not torch.equal(again, numbers):
                raise ValueError("recombine(split(parameter)) is not the parameter; correct it")
        return tuple(
            _block(matrix, numbers)
            for found in matrices
            for matrix in (found if found.ndim == 3 else [found])
        )

    def _matrices(self, numbers: Tensor) -> list[Tensor]:
        found = _called("split", self.split, numbers)
        if isinstance(found, Tensor) or not isinstance(found, Sequence):
            raise ValueError("split must return a list of tensors")
        for number, matrix in enumerate(found):
            if not isinstance(matrix, Tensor) or matrix.dtype != torch.int64:
                raise ValueError(
                    f"result {number} of split holds computed values; split may only select and "
                    "move elements"
                )
            if matrix.ndim not in (2, 3):
                raise ValueError(
                    f"result {number} of split has shape {tuple(matrix.shape)}; return matrices, "
                    "or stacks of them"
                )
            if matrix.numel() == 0:
                raise ValueError(
                    f"result {number} of split has shape {tuple(matrix.shape)}, without any "
                    "elements; leave it out"
                )
        return list(found)


def _called(name: str, function: Callable[..., object], argument: object) -> object:
    try:
        return function(argument)
    except Exception as error:
        raise ValueError(f"{name} failed on it: {type(error).__name__}: {error}") from error


def _block(
    matrix: Tensor,  # (rows, cols): numbers of the elements
    numbers: Tensor,
) -> Block:
    rows, cols = matrix.shape
    shape = tuple(numbers.shape)
    parts, axis = _stacked(matrix, shape), 0
    if parts is None:
        parts, axis = _side_by_side(matrix, shape), 1
    if parts is not None:
        cuts = [numbers[box.slices_in(Box((0,) * len(shape), shape))] for box in parts]
        like = [c.reshape(-1, cols) if axis == 0 else c.reshape(rows, -1) for c in cuts]
        if torch.equal(torch.cat(like, dim=axis), matrix):
            return Block(parts, rows, cols, axis)
    raise ValueError(
        f"a ({rows}, {cols}) result of split is not made of boxes of the parameter that stand one "
        "below the other, or one beside the other; split it further, or reorder the weight"
    )


def _stacked(matrix: Tensor, shape: tuple[int, ...]) -> tuple[Box, ...] | None:
    """Boxes that are some rows of the matrix each; None where it is not made of such."""
    rows, cols = matrix.shape
    starts = matrix[:, 0]
    if not torch.equal(matrix, starts[:, None] + torch.arange(cols, device="cpu")):
        return None
    begins, width = starts.tolist(), shape[-1]
    boxes: list[Box] = []
    row = 0
    while row < rows:
        step = begins[row + 1] - begins[row] if row + 1 < rows else cols
        end = row + 1
        if step in (cols, width):
            while end < rows and begins[end] - begins[end - 1] == step:
                end += 1
        if step != cols and end > row + 1 and begins[row] % width + cols > width:
            return None  # the runs go on in the next row
        boxes += _run(shape, begins[row], end - row, cols, step)
        row = end
    return tuple(boxes) if all(box.numel % cols == 0 for box in boxes) else None


def _run(shape: tuple[int, ...], begin: int, rows: int, cols: int, step: int) -> list[Box]:
    """Boxes of ``rows`` runs of ``cols`` elements that begin ``step`` apart."""
    if step == cols or rows == 1:
        return [box for box, _ in flat_range_boxes(shape, begin, begin + rows * cols)]
    first, column = divmod(begin, shape[-1])
    return [
        Box((*box.start, column), (*box.size, cols))
        for box, _ in flat_range_boxes(shape[:-1], first, first + rows)
    ]


def _side_by_side(matrix: Tensor, shape: tuple[int, ...]) -> tuple[Box, ...] | None:
    """Boxes that are some columns of the matrix each; None where it is not made of such."""
    cols = matrix.shape[1]
    breaks = (matrix[0].diff() != 1).nonzero().flatten() + 1
    cuts = [0, *breaks.tolist(), cols]
    boxes = []
    for begin, end in pairwise(cuts):
        found = _stacked(matrix[:, begin:end], shape)
        if found is None or len(found) != 1:
            return None
        boxes.append(found[0])
    return tuple(boxes)


__all__ = ["Split"]
