"""Fused small operations, for the backends that run Triton; the callers have the torch versions."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Kernels

_HALF = (torch.float16, torch.bfloat16)
BLOCK = 64
"""Columns that a program of ``shrink_factors`` multiplies at a time."""
TILE = 128
"""Rows and columns of a program that sums the squares of a symmetric matrix."""


def runs_triton(kernels: Kernels, t: Tensor) -> bool:
    """Whether Triton kernels may be launched on ``t``: the backend uses them, and ``t`` is half."""
    if kernels.name not in ("auto", "triton") or t.dtype not in _HALF:
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    if t.is_cuda:
        return torch.cuda.get_device_capability(t.device)[0] >= 8
    from flashns_dist.orthogonalize.kernels.triton_interpreter import interpreting

    return interpreting()


def shrink_factors(
    image: Tensor,  # (8, 64, 1024)
    signs: Tensor,  # (64, 1024)
    size: float,
    dtype: torch.dtype,
    margin: float,
    basis_row: tuple[float, ...],
    shrink_row: tuple[float, ...],
    weight: float,
) -> tuple[Tensor, Tensor]:
    """``deflation.shrink_factors`` in two kernels; see there. ``k`` is a power of 2."""
    batch, k, n = image.shape
    image, signs = image.contiguous(), signs.contiguous()
    a, weights = torch.empty_like(image), torch.empty_like(image, dtype=dtype)
    # At most two programs per SM: more would read what they share more often.
    blocks = -(-n // BLOCK)
    chunks = -(-blocks // max(1, 2 * _num_sms(image) // batch))
    grid = (batch, -(-blocks // chunks))
    constants = {"K": k, "BLOCK": BLOCK, "PRECISION": _precision(image)}
    options = {"num_warps": 4, "num_stages": 4}
    basis, shrink = {"ROW": basis_row}, {"ROW": shrink_row, "WEIGHT": weight}
    _launch(
        "shrink_basis_kernel",
        grid,
        (image, signs, a),
        (n, chunks, size),
        basis | constants,
        options,
    )
    numbers = (n, chunks, size, margin)
    _launch("shrink_weights_kernel", grid, (a, weights), numbers, shrink | constants, options)
    return a, weights


def symmetric_norms(
    matrix: Tensor,  # (8, 1024, 1024)
) -> tuple[Tensor, Tensor]:
    """Frobenius norm and one over it, ``(batch,)`` fp32, of symmetric matrices.

    Reads the lower triangle; the inverse of less than ``1e-12`` is one over that.
    """
    sums = _sums_of_squares(matrix)
    batch, tiles = sums.shape
    norm, inverse = sums.new_empty(batch), sums.new_empty(batch)
    _launch("norm_kernel", (batch,), (sums, norm, inverse), (tiles,), {"BLOCK": _block(tiles)})
    return norm, inverse


def bound_scalars(norm: Tensor, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``bound.bound_scalars``, from ``R^2 / ||R||_F`` itself instead of its norm; see there."""
    sums = _sums_of_squares(square)
    batch, tiles = sums.shape
    scale, weight, root = (torch.empty_like(norm) for _ in range(3))
    _launch(
        "bound_scalars_kernel",
        (batch,),
        (norm, sums, scale, weight, root),
        (square.shape[-1], tiles),
        {"BLOCK": _block(tiles)},
    )
    return scale, weight, root


def _sums_of_squares(matrix: Tensor) -> Tensor:
    """Sums of squares of the lower triangle's tiles and their mirror images, ``(batch, tiles)``."""
    matrix = matrix.contiguous()
    batch, n, _ = matrix.shape
    blocks = -(-n // TILE)
    tiles = blocks * (blocks + 1) // 2
    sums = torch.empty((batch, tiles), dtype=torch.float32, device=matrix.device)
    grid, options = (tiles, batch), {"num_warps": 8}
    _launch("squares_kernel", grid, (matrix, sums), (n,), {"TILE": TILE}, options)
    return sums


def _num_sms(t: Tensor) -> int:
    from flashns_dist.orthogonalize.kernels.triton_passes import device_facts

    return device_facts(t.get_device())[2] if t.is_cuda else 2


def _block(tiles: int) -> int:
    """Partial sums that a program adds at a time."""
    return min(1024, max(32, 1 << (tiles - 1).bit_length()))


def _launch(
    name: str,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, int] | None = None,
) -> None:
    """Launches a kernel of ``small_triton`` that takes ``tensors``, ``numbers``, ``constants``."""
    from flashns_dist.orthogonalize.kernels import small_triton
    from flashns_dist.orthogonalize.kernels.triton_operators import on_device_of
    from flashns_dist.orthogonalize.kernels.triton_passes import run
    from flashns_dist.orthogonalize.kernels.triton_prepared import Launch

    def launch() -> Launch:
        kernel = getattr(small_triton, name)
        return Launch(kernel, grid, tensors, numbers, constants, options or {"num_warps": 4})

    with on_device_of(tensors[0]):
        run(launch, tensors, (), name, grid, numbers, *constants.values())


def _precision(t: Tensor) -> Any:
    """fp32 products in three tf32 passes where there are tensor cores: ``phi`` needs the digits."""
    return "tf32x3" if t.is_cuda and torch.cuda.get_device_capability(t.device)[0] >= 8 else "ieee"
