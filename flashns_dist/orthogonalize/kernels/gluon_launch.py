"""Launches of the Gluon kernels: where they can run, and their operands."""

from __future__ import annotations

from functools import cache
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
def gluon_kernels() -> tuple[Any, Any] | None:
    """The kernels of symmetric and of general products; None where they are not known to be right.

    That is with Triton 3.6 alone: Gluon is experimental, and only there have its results been
    compared on a GPU. (3.7 and 3.8 compile the kernels, 3.9 does not: before another version is let
    in here, ``test_gluon.py`` has to pass with it on a Hopper GPU.)
    """
    if interpreting() or tuple(map(int, triton.__version__.split(".")[:2])) != (3, 6):
        return None
    from flashns_dist.orthogonalize.kernels import gluon_product, gluon_symmetric

    return gluon_symmetric.symmetric_kernel, gluon_product.product_kernel


def fits_symmetric(
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
    if k < 2 * SPECIALIZED.depth:  # no method has such a sum, and no GPU has run one
        return False
    if c is not None and c.shape != out.shape:
        return False
    return _fits(a, (a, b), (c, out), n % SPECIALIZED.rows, capability)


def fits_product(
    a: Tensor,  # (batch, n, k)
    x: Tensor,  # (batch, k, m)
    c: Tensor | None,
    out: Tensor,
    *,
    transpose: bool,
    shifted: bool,
    capability: int,  # the major number
) -> bool:
    """Whether the Gluon kernel takes a general product; see ``fits_symmetric``."""
    batch, n, k = a.shape
    m = x.shape[2]
    if x.shape != (batch, k, m) or out.shape != ((batch, m, n) if transpose else (batch, n, m)):
        return False
    if c is not None and c.shape != (batch, n, m):
        return False
    if shifted and (k != m or described(a)):
        return False
    rest = n % SPECIALIZED.rows + m % SPECIALIZED.cols
    return _fits(a, (a, x), (c, out), rest, capability)


def _fits(
    a: Tensor,
    factors: tuple[Tensor, ...],
    others: tuple[Tensor | None, ...],  # what is added and what is written
    rest: int,  # rows and columns that whole tiles do not cover
    capability: int,
) -> bool:
    k = a.shape[2]
    if capability != 9 or rest or k % SPECIALIZED.depth:
        return False
    added = [t for t in others if t is not None]
    if any(t.dtype != a.dtype for t in factors) or any(t.itemsize != 2 for t in added):
        return False
    if not all(map(_stacked, (*factors, *added))) or any(map(described, added)):
        return False
    return gluon_kernels() is not None


def _stacked(t: Tensor) -> bool:
    """Whether the rows of all matrices, or all columns, are evenly spaced in memory."""
    batch_stride, row, col = t.stride()
    along = t.shape[2] * col if described(t) else t.shape[1] * row
    return t.shape[0] == 1 or batch_stride == along


def symmetric_launch(
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

    Arguments are those of ``triton_launch.symmetric_launch``, for which ``fits_symmetric`` holds.
    """
    block, depth = config.rows, config.depth
    batch, n, k = a.shape
    a_swapped, b_swapped = bool(described(a)), bool(described(b))
    constants = {
        "HAS_C": c is not None,
        "ALPHA_EACH": isinstance(scalars[0], Tensor),
        "BETA_EACH": isinstance(scalars[1], Tensor),
        "GAMMA_EACH": isinstance(scalars[2], Tensor),
        "SAME": a.data_ptr() == b.data_ptr() and a.stride() == b.stride(),
        "A_SWAPPED": a_swapped,
        "B_SWAPPED": b_swapped,
    }
    half = block // 2
    operands = (
        _descriptor(a, a_swapped, half, depth),
        _descriptor(b, b_swapped, block, depth),
        _descriptor(out if c is None else c, False, half, half),
        _descriptor(out, False, half, half),
    )
    return _launch(0, operands + scalars, (n, k, batch), constants, config, num_sms)


def product_launch(
    a: Tensor,  # (batch, n, k)
    x: Tensor,  # (batch, k, m)
    c: Tensor | None,
    out: Tensor,
    scalars: tuple[float | Tensor, ...],
    transpose: bool,
    *,
    config: TileConfig,
    num_sms: int,
) -> Launch:
    """Writes ``alpha * a (x + shift I) + beta * c`` to ``out``; see ``gluon_product``.

    Arguments are those of ``triton_launch.product_launch``, for which ``fits_product`` holds.
    """
    block, depth = config.rows, config.depth
    batch, n, k = a.shape
    shifted = scalars[-1] != 0.0
    a_swapped, b_swapped = bool(described(a)), bool(described(x.mT))
    constants = {
        "HAS_C": c is not None,
        "SHIFTED": shifted,
        "ALPHA_EACH": isinstance(scalars[0], Tensor),
        "BETA_EACH": isinstance(scalars[1], Tensor),
        "A_SWAPPED": a_swapped,
        "B_SWAPPED": b_swapped,
        "TRANSPOSE": transpose,
    }
    half = block // 2
    operands = (
        _descriptor(a, a_swapped, half, depth),
        _descriptor(x.mT, b_swapped, block, depth),
        _descriptor(out if c is None else c, False, half, half),
        _descriptor(a if shifted else out, False, half, half),
        _descriptor(out, False, half, half),
    )
    return _launch(1, operands + scalars, (n, x.shape[2], k, batch), constants, config, num_sms)


def _launch(
    which: int,
    changing: tuple[Any, ...],
    sizes: tuple[int, ...],
    constants: dict[str, Any],
    config: TileConfig,
    num_sms: int,
) -> Launch:
    kernels = gluon_kernels()
    assert kernels is not None
    tiles = {
        "BLOCK": config.rows,
        "BLOCK_K": config.depth,
        "STAGES": config.stages,
        "GROUP": config.group,
    }
    # Programs become resident as those of the kernel before leave their SMs, and wait for its end.
    options = {"num_warps": config.warps, "launch_pdl": True} | UNFUSED
    return Launch(kernels[which], (num_sms,), changing, sizes, constants | tiles, options)


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
