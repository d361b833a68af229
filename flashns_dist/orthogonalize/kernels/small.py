"""Fused small operations, for the backends that run Triton; the callers have the torch versions."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Kernels

_HALF = (torch.float16, torch.bfloat16)
BLOCK = 64
"""Columns of a program of ``shrink_factors``."""


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
    margin: float,
    basis_row: tuple[float, ...],
    shrink_row: tuple[float, ...],
    weight: float,
) -> tuple[Tensor, Tensor]:
    """``deflation.shrink_factors`` in two kernels; see there. ``k`` is a power of 2."""
    from flashns_dist.orthogonalize.kernels.small_triton import (
        shrink_basis_kernel,
        shrink_weights_kernel,
    )

    batch, k, n = image.shape
    image = image.contiguous()
    a, weights = torch.empty_like(image), torch.empty_like(image)
    grid = (batch, -(-n // BLOCK))
    constants = {"K": k, "BLOCK": BLOCK, "PRECISION": _precision(image)}
    options = {"num_warps": 4, "num_stages": 4}
    shrink_basis_kernel[grid](
        image, signs.contiguous(), a, n, size, ROW=basis_row, **constants, **options
    )
    shrink_weights_kernel[grid](
        a, weights, n, size, margin, ROW=shrink_row, WEIGHT=weight, **constants, **options
    )
    return a, weights


def bound_scalars(norm: Tensor, square_norm: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``bound.bound_scalars`` in one kernel; see there."""
    from flashns_dist.orthogonalize.kernels.small_triton import bound_scalars_kernel

    batch = norm.shape[0]
    scale, weight = torch.empty_like(norm), torch.empty_like(norm)
    block = min(1024, max(32, 1 << (batch - 1).bit_length()))
    bound_scalars_kernel[(math.ceil(batch / block),)](
        norm, square_norm, scale, weight, batch, n, BLOCK=block, num_warps=1
    )
    return scale, weight


def _precision(t: Tensor) -> Any:
    """fp32 products in three tf32 passes where there are tensor cores: ``phi`` needs the digits."""
    return "tf32x3" if t.is_cuda and torch.cuda.get_device_capability(t.device)[0] >= 8 else "ieee"
