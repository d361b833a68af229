"""Views of memory as rows of equal length, which is how the fused kernels walk them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """``rows`` runs of ``cols`` elements, ``stride`` apart, from ``offset`` on.

    One run has ``rows == 1`` and ``cols == stride``.
    """

    offset: int
    rows: int
    cols: int
    stride: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols


def rows_of(view: Tensor) -> Rows | None:
    """A view's elements in row-major order as rows; None where one stride does not do.

    Args:
        view: Any strides. ``offset`` counts from the start of its storage.
    """
    offset = int(view.storage_offset())
    dims: list[tuple[int, int]] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:  # continues the dim before
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if not dims:
        return Rows(offset, 1, view.numel(), view.numel())
    if len(dims) == 1 and dims[0][1] == 1:
        return Rows(offset, 1, dims[0][0], dims[0][0])
    if len(dims) == 2 and dims[1][1] == 1:
        return Rows(offset, dims[0][0], dims[1][0], dims[0][1])
    return None


def matched(one: Rows, other: Rows) -> tuple[Rows, Rows] | None:
    """Both with the same number of rows; None where they are cut differently."""
    if one.cols == other.cols:
        return one, other
    if one.rows == 1 and one.cols == other.numel:
        return Rows(one.offset, other.rows, other.cols, other.cols), other
    if other.rows == 1 and other.cols == one.numel:
        return one, Rows(other.offset, one.rows, one.cols, one.cols)
    return None
