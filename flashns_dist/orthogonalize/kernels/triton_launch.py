"""Launches of the Triton products: operands to descriptors or pointers, compile-time choices."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashns_dist.orthogonalize.kernels.strides import described
from flashns_dist.orthogonalize.kernels.triton_configs import TileConfig
from flashns_dist.orthogonalize.kernels.triton_prepared import Launch
from flashns_dist.orthogonalize.kernels.triton_product import product_kernel
from flashns_dist.orthogonalize.kernels.triton_symmetric import symmetric_kernel

TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# No multiplication fused with an addition but where the kernel says so: compilers would fuse in one
# configuration what they do not in another, and bits would differ.
UNFUSED = {"enable_fp_fusion": False}


def precision(dtype: torch.dtype, tensor_cores: bool) -> str:
    """Triton's ``input_precision``: fp32 in three tf32 passes where there are tensor cores."""
    return "tf32x3" if dtype == torch.float32 and tensor_cores else "ieee"


def descriptor(t: Tensor, swapped: bool, rows: int, cols: int) -> Any:
    """A host descriptor of ``t`` that loads blocks of ``rows x cols`` of it.

    Built without the class's own checks, which ``described`` has made: they cost more than the rest
    of the launch.
    """
    batch, n, m = t.shape
    batch_stride, row, col = t.stride()
    if swapped:
        n, m, row, rows, cols = m, n, col, cols, rows
    if batch == 1:
        batch_stride = n * row
    result = object.__new__(TensorDescriptor)
    result.base = t
    result.shape = [batch, n, m]
    result.strides = [batch_stride, row, 1]
    result.block_shape = [1, rows, cols]
    result.padding = "zero"
    return result


def symmetric_launch(
    a: Tensor,  # (batch, n, k)
    b: Tensor,  # (batch, n, k), the second factor's transpose
    c: Tensor | None,
    out: Tensor,
    scalars: tuple[float | Tensor, ...],
    *,
    config: TileConfig,
    tma: bool,
    input_precision: str,
    num_sms: int,
) -> Launch:
    """Writes ``alpha * a b^T + beta * c + gamma * I`` to ``out``; see ``symmetric_kernel``.

    ``scalars`` are ``triton_prepared.arguments`` of the three.
    """
    batch, n, k = a.shape
    block, depth = config.rows, config.depth
    blocks = -(-n // block)
    grid = batch * (blocks * (blocks + 1) // 2)
    wide = config.cols > config.rows
    if wide:
        half = (blocks + 1) // 2
        tiles = batch * (half * (half + 1) - blocks % 2 * half)
        grid = min(tiles, num_sms)
    third = out if c is None else c
    a_swapped = b_swapped = False
    operands: tuple[Any, ...] = (a, b, third, out)
    if tma:
        a_swapped, b_swapped = bool(described(a)), bool(described(b))
        operands = (
            descriptor(a, a_swapped, block, depth),
            descriptor(b, b_swapped, config.cols, depth),
            descriptor(third, False, block, block),
            descriptor(out, False, block, block),
        )
    constants = {
        "HAS_C": c is not None,
        "ALPHA_EACH": isinstance(scalars[0], Tensor),
        "BETA_EACH": isinstance(scalars[1], Tensor),
        "GAMMA_EACH": isinstance(scalars[2], Tensor),
        "A_SWAPPED": a_swapped,
        "B_SWAPPED": b_swapped,
        "BLOCK": block,
        "BLOCK_K": depth,
        "WIDE": wide,
        "GROUP": config.group,
        "TMA": tma,
        "DTYPE": TL_DTYPES[out.dtype],
        "PRECISION": input_precision,
    }
    return Launch(
        symmetric_kernel,
        (grid,),
        (*operands, *scalars),
        (n, k, batch, *_strides(tma, a, b, third, out)),
        constants,
        {"num_warps": config.warps, "num_stages": config.stages} | UNFUSED,
    )


def product_launch(
    a: Tensor,  # (batch, n, k)
    x: Tensor,  # (batch, k, m)
    c: Tensor | None,  # (batch, n, m)
    out: Tensor,  # (batch, n, m), or (batch, m, n) with transpose
    scalars: tuple[float | Tensor, ...],
    transpose: bool,
    *,
    config: TileConfig,
    tma: bool,
    input_precision: str,
) -> Launch:
    """Writes ``alpha * a (x + shift I) + beta * c`` to ``out``; see ``product_kernel``.

    ``scalars`` are ``triton_prepared.arguments`` of ``alpha`` and ``beta``, and ``shift``.
    """
    batch, n, k = a.shape
    m = x.shape[2]
    grid = batch * -(-n // config.rows) * -(-m // config.cols)
    third = out if c is None else c
    shifted = scalars[-1] != 0.0
    fourth = a if shifted else out
    a_swapped = x_swapped = c_swapped = False
    operands: tuple[Any, ...] = (a, x, third, fourth, out)
    if tma:
        rows, cols, depth = config.rows, config.cols, config.depth
        a_swapped, x_swapped = bool(described(a)), bool(described(x))
        c_swapped = c is not None and bool(described(c))
        out_block = (cols, rows) if transpose else (rows, cols)
        out_descriptor = descriptor(out, False, *out_block)
        operands = (
            descriptor(a, a_swapped, rows, depth),
            descriptor(x, x_swapped, depth, cols),
            out_descriptor if c is None else descriptor(c, c_swapped, rows, cols),
            descriptor(a, a_swapped, rows, cols) if shifted else out_descriptor,
            out_descriptor,
        )
    constants = {
        "HAS_C": c is not None,
        "SHIFTED": shifted,
        "ALPHA_EACH": isinstance(scalars[0], Tensor),
        "BETA_EACH": isinstance(scalars[1], Tensor),
        "A_SWAPPED": a_swapped,
        "X_SWAPPED": x_swapped,
        "C_SWAPPED": c_swapped,
        "TRANSPOSE": transpose,
        "BACKWARDS": config.backwards,
        "BLOCK_N": config.rows,
        "BLOCK_M": config.cols,
        "BLOCK_K": config.depth,
        "GROUP": config.group,
        "TMA": tma,
        "DTYPE": TL_DTYPES[out.dtype],
        "PRECISION": input_precision,
    }
    return Launch(
        product_kernel,
        (grid,),
        (*operands, *scalars),
        (n, m, k, *_strides(tma, a, x, third, out)),
        constants,
        {"num_warps": config.warps, "num_stages": config.stages},
    )


def _strides(tma: bool, *operands: Tensor) -> tuple[int, ...]:
    """Strides for pointers. Descriptors hold their own: zeros, so that none compiles a variant."""
    if tma:
        return (0,) * 3 * len(operands)
    return tuple(stride for operand in operands for stride in operand.stride())
