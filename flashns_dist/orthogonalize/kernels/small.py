"""Fused small operations, for the backends that run Triton; the callers have the torch versions."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Kernels

_HALF = (torch.float16, torch.bfloat16)
BLOCK = 64
"""Columns that a program of ``shrink_factors`` multiplies at a time."""
TILE = 64
"""Rows and columns of a program that sums up a part of a symmetric matrix."""


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
    """``deflation.shrink_factors`` in one kernel; see there. ``k`` is a power of 2."""
    batch, k, n = image.shape
    image, signs = image.contiguous(), signs.contiguous()
    a, weights = torch.empty_like(image), torch.empty_like(image, dtype=dtype)
    # At most one program per SM: each computes the K x K matrices anew.
    blocks = -(-n // BLOCK)
    chunks = -(-blocks // max(1, _num_sms(image) // batch))
    _launch(
        "shrink_kernel",
        (batch, -(-blocks // chunks)),
        (image, signs, a, weights),
        (n, chunks, size, margin),
        {
            "BASIS_ROW": basis_row,
            "SHRINK_ROW": shrink_row,
            "WEIGHT": weight,
            "K": k,
            "BLOCK": BLOCK,
            "PRECISION": _precision(image),
        },
        {"num_warps": 4, "num_stages": 4},
    )
    return a, weights


def inverse_norms(
    matrix: Tensor,  # (8, 1024, 1024)
) -> Tensor:
    """One over the Frobenius norm, ``(batch,)`` fp32, of symmetric matrices.

    Reads the lower triangle; one over ``1e-12`` where the norm is less.
    """
    sums = _sums(matrix)
    batch, _, tiles = sums.shape
    inverse = sums.new_empty(batch)
    constants = {"BLOCK": _block(tiles)}
    _launch("inverse_norm_kernel", (batch,), (sums, inverse), (tiles,), constants)
    return inverse


def bound_scalars(square: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``bound.bound_scalars``, from ``weight * R^2`` itself; see there."""
    sums = _sums(square)
    batch, _, tiles = sums.shape
    scale, root, rest = (sums.new_empty(batch) for _ in range(3))
    tensors: tuple[Tensor, ...] = (sums, scale, root, rest)
    numbers: tuple[float, ...] = (square.shape[-1], tiles)
    if isinstance(weight, Tensor):
        tensors += (weight,)
    else:
        numbers = (weight, *numbers)
    constants = {"WEIGHT_EACH": isinstance(weight, Tensor), "BLOCK": _block(tiles)}
    _launch("bound_scalars_kernel", (batch,), tensors, numbers, constants)
    return scale, root, rest


def _sums(matrix: Tensor) -> Tensor:
    """``(batch, 2, tiles)``: for each tile of the lower triangle its sum of squares, mirror image
    included, and the sum of its part of the diagonal."""
    matrix = matrix.contiguous()
    batch, n, _ = matrix.shape
    blocks = -(-n // TILE)
    tiles = blocks * (blocks + 1) // 2
    sums = torch.empty((batch, 2, tiles), dtype=torch.float32, device=matrix.device)
    _launch("squares_kernel", (tiles, batch), (matrix, sums), (n,), {"TILE": TILE})
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


def _precision(t: Tensor) -> str:
    """fp32 products in three bfloat16 passes where there are tensor cores.

    They keep 16 bits: a singular value that is shrunk to a thirteenth is right to 0.2 %. In three
    tf32 passes, which earlier versions of Triton have, the kernel takes twice as long.
    """
    if not t.is_cuda or torch.cuda.get_device_capability(t.device)[0] < 8:
        return "ieee"
    return "bf16x3" if "bf16x3" in _precisions() else "tf32x3"


@cache
def _precisions() -> tuple[str, ...]:
    """What Triton offers for products of fp32 on NVIDIA GPUs."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return tuple(getattr(CUDAOptions, "allowed_dot_input_precisions", ()))
