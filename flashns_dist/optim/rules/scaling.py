"""Scaling of whole matrices on their owner, before and after orthogonalization.

One matrix at a time: what a sum over a matrix rounds to must not depend on what else is in the
batch, which depends on the number of ranks.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

RENORMALIZE = ("none", "frobenius", "rows", "columns", "rows_columns", "columns_rows")


def equilibrate_(batch: Tensor) -> None:
    """Scale every row of each matrix to norm one, in place; zero rows stay zero.

    The row-normalized variant of MuonEq (arXiv 2603.28254).

    Args:
        batch: ``(batch, rows, cols)``, any float dtype and scale.
    """
    for matrix in batch:
        full = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        largest = full.abs().amax(dim=1, keepdim=True)
        full = full / torch.where(
            largest > 0, largest, 1.0
        )  # squares can neither over- nor underflow
        matrix.copy_(_unit(full, dim=1))


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
    dims = {"rows": 1, "columns": 0}
    for matrix in batch:
        full = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        for name in mode.split("_") if mode != "frobenius" else ():
            full = _unit(full, dims[name])
        matrix.copy_(with_norm(full, sqrt(min(full.shape))))


def with_norm(matrix: Tensor, norm: float | Tensor) -> Tensor:
    """The multiple of a matrix that has the given Frobenius norm; zero for zero."""
    found = torch.linalg.vector_norm(matrix)
    return matrix * (norm / torch.where(found > 0, found, 1.0))


def _unit(matrix: Tensor, dim: int) -> Tensor:
    norms = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
    return matrix / torch.where(norms > 0, norms, 1.0)


__all__ = ["RENORMALIZE", "equilibrate_", "renormalize_", "with_norm"]
