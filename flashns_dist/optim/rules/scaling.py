"""Scaling of whole matrices on their owner, before and after orthogonalization.

What a sum over a matrix rounds to must not depend on what else is in the batch, which depends on
the number of ranks. torch's sums of floating-point numbers order their additions by the shape of
the whole tensor; those here are ``fold_sum_``. The largest magnitude is exact in any order.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

RENORMALIZE = ("none", "frobenius", "rows", "columns", "rows_columns", "columns_rows")

# Elements to take at once: of those, hooks make up to two copies in fp32, or one in int64 beside
# one in fp32. That is 192 MiB on a GPU, or three times the largest matrix in fp32 if that is more.
# On a CPU, where launches are cheap, they should stay in its cache.
_MOST_ELEMENTS = {"cpu": 2**18}
_MOST_ELEMENTS_ELSEWHERE = 2**24


def fold_sum_(x: Tensor, dim: int) -> Tensor:
    """Sums along a dim, which is kept at size one; overwrites ``x``.

    The second half is added to the first until one slice is left: additions of elements and nothing
    else, hence the same bits in any batch, in ``log2`` of the size launches. Rounds as a pairwise
    sum.

    Args:
        x: At least one slice along ``dim``; any float dtype.
    """
    size = x.shape[dim]
    while size > 1:
        half = (size + 1) // 2
        x.narrow(dim, 0, size - half).add_(x.narrow(dim, half, size - half))
        size = half
    return x.narrow(dim, 0, 1).clone()


def square_sums(x: Tensor, *dims: int) -> Tensor:
    """Sums of squares along some dims, which are kept at size one, in fp32 (fp64 for fp64)."""
    wide = _wide(x.dtype)
    squares = x.square() if x.dtype == wide else x.to(wide).square_()
    for dim in dims:
        squares = fold_sum_(squares, dim)
    return squares


def equilibrate_(batch: Tensor) -> None:
    """Scale every row of each matrix to norm one, in place; zero rows stay zero.

    The row-normalized variant of MuonEq (arXiv 2603.28254).

    Args:
        batch: ``(batch, rows, cols)``, any float dtype and scale.
    """
    for part in chunks(batch):
        largest = part.abs().amax(dim=2, keepdim=True).to(_wide(part.dtype))
        full = part / nonzero(largest)  # squares can neither over- nor underflow
        part.copy_(_unit_(full, dim=2))


def renormalize_(batch: Tensor, mode: str) -> None:
    """Scale each matrix to the Frobenius norm ``sqrt(min(rows, cols))``, in place.

    ``"frobenius"`` multiplies by a number. ``"rows"`` and ``"columns"`` give all rows, or columns,
    the same norm; ``"columns_rows"`` does columns first and then rows, ``"rows_columns"`` the other
    way round: Muon+ (arXiv 2602.21545), whose result is that times a factor for the shape. Zero
    rows, columns and matrices stay zero.

    Args:
        batch: ``(batch, rows, cols)``.
        mode: One of ``RENORMALIZE``.
    """
    if mode == "none":
        return
    dims = {"rows": 2, "columns": 1}
    wanted = sqrt(min(batch.shape[1:]))
    for part in chunks(batch):
        full = part.to(_wide(part.dtype))
        for name in mode.split("_") if mode != "frobenius" else ():
            full = _unit_(full, dims[name])
        part.copy_(full.mul_(wanted / nonzero(square_sums(full, 1, 2).sqrt_())))


def chunk_size(numel: int, device: torch.device) -> int:
    """How many tensors of ``numel`` elements to take at once; at least one."""
    most = _MOST_ELEMENTS.get(device.type, _MOST_ELEMENTS_ELSEWHERE)
    return max(1, most // max(1, numel))


def chunks(stack: Tensor) -> list[Tensor]:
    """A ``(batch, rows, cols)`` stack in parts of ``chunk_size`` matrices."""
    return list(stack.split(chunk_size(stack.shape[1] * stack.shape[2], stack.device)))


def nonzero(x: Tensor) -> Tensor:
    """Divisors: ``x`` where it is positive, else one."""
    return torch.where(x > 0, x, 1.0)


def _unit_(matrices: Tensor, dim: int) -> Tensor:
    return matrices.div_(nonzero(square_sums(matrices, dim).sqrt_()))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


__all__ = [
    "RENORMALIZE",
    "chunk_size",
    "chunks",
    "equilibrate_",
    "fold_sum_",
    "nonzero",
    "renormalize_",
    "square_sums",
]
