"""Launches of the Gluon kernel of symmetric products: where it can run, and its operands."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from flashns_dist.orthogonalize.kernels.strides import described
from flashns_dist.orthogonalize.kernels.triton_configs import SPECIALIZED, TileConfig
from flashns_dist.orthogonalize.kernels.triton_interpreter import interpreting
from flashns_dist.orthogonalize.kernels.triton_launch import UNFUSED
from flashns_dist.orthogonalize.kernels.triton_prepared import Launch


@cache
def gluon_kernels() -> ModuleType | None:
    """The module of Gluon kernels, or None where it is not known to be right.

    That is with Triton 3.6 alone: Gluon is experimental, and only there have its results been
    compared on a GPU. (3.7 and 3.8 compile the kernel, 3.9 does not: before another version is let
    in here, ``test_gluon.py`` has to pass with it on a Hopper GPU.)
    """
    if interpreting() or tuple(map(int, triton.__version__.split(".")[:2])) != (3, 6):
        return None
    from flashns_dist.orthogonalize.kernels import gluon_symmetric

    return gluon_symmetric


def fits_specialized(
    a: Tensor,  # (batch, n, k)
    b: Tensor,  # (batch, n, k), the second factor's transpose
    c: Tensor | None,
    out: Tensor,
    *,
    capability: int,  # the major number
) -> bool:
    """Whether the Gluon kernel takes a symmetric product whose operands descriptors can express.

    On Hopper, for matrices that whole tiles cover and that lie one after the other.
    """
    batch, n, k = a.shape
    if b.shape != a.shape or out.shape != (batch, n, n):
        return False
    if capability != 9 or n % SPECIALIZED.rows or k % SPECIALIZED.depth or k < 128:
        return False
    tensors = [t for t in (a, b, c, out) if t is not None]
    if any(t.dtype != a.dtype or not _stacked(t) for t in tensors):
        return False
    if described(out) or (c is not None and (described(c) or c.shape != out.shape)):
        return False
    return gluon_kernels() is not None


def _stacked(t: Tensor) -> bool:
    """Whether the rows of all matrices, or all columns, are evenly spaced in memory."""
    batch_stride, row, col = t.stride()
    along = t.shape[2] * col if described(t) else t.shape[1] * row
    return t.shape[0] == 1 or batch_stride == along


def specialized_launch(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    out: Tensor,
    scalars: tuple[float | Tensor, ...],
    *,
    config: TileConfig,
    num_sms: int,
) -> Launch:
    """Writes ``alpha * a b^T + beta * c + gamma * I`` to ``out``; see ``gluon_symmetric``.

    Arguments are those of ``triton_launch.symmetric_launch``, for which ``fits_specialized`` holds.
    """
    kernels = gluon_kernels()
    assert kernels is not None
    block, depth = config.rows, config.depth
    batch, n, k = a.shape
    a_swapped, b_swapped = bool(described(a)), bool(described(b))
    constants = {
        "HAS_C": c is not None,
        "ALPHA_EACH": isinstance(scalars[0], Tensor),
        "BETA_EACH": isinstance(scalars[1], Tensor),
        "GAMMA_EACH": isinstance(scalars[2], Tensor),
        "A_SWAPPED": a_swapped,
        "B_SWAPPED": b_swapped,
        "BLOCK": block,
        "BLOCK_K": depth,
        "STAGES": config.stages,
        "GROUP": config.group,
    }
    half = block // 2
    operands = (
        _descriptor(a, a_swapped, half, depth),
        _descriptor(b, b_swapped, block, depth),
        _descriptor(out if c is None else c, False, half, half),
        _descriptor(out, False, half, half),
    )
    return Launch(
        kernels.symmetric_kernel,
        (num_sms,),
        (*operands, *scalars),
        (n, k, batch),
        constants,
        {"num_warps": config.warps} | UNFUSED,
    )


def _descriptor(t: Tensor, swapped: bool, rows: int, cols: int) -> Any:
    """A host descriptor of all matrices of ``t`` as one, that loads blocks of ``rows x cols``."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    if swapped:
        t, rows, cols = t.mT, cols, rows
    batch, n, m = t.shape
    layout = _layout(rows, cols, t.dtype)
    return TensorDescriptor(t, [batch * n, m], [t.stride(1), 1], [rows, cols], layout)


@cache
def _layout(rows: int, cols: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, cols], element)
