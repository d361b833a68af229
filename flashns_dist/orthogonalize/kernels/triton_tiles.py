# mypy: ignore-errors
"""Device functions shared by the Triton products: which tile, loading it, finishing it.

Every product here accumulates along K in ascending order into one fp32 accumulator per element and
finishes with the same explicit sequence of operations, whatever the tile shape, the number of warps
or the way operands are loaded. That is what makes all configurations of one problem bitwise equal.
"""

import triton
import triton.language as tl


@triton.jit
def triangle_row(t):
    """Row of entry ``t`` of a lower triangle listed row by row (exact below 2^22 entries)."""
    r = ((tl.sqrt_rn((8 * t + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    r = tl.where(r * (r + 1) // 2 > t, r - 1, r)
    return tl.where((r + 1) * (r + 2) // 2 <= t, r + 1, r)


@triton.jit
def triangle_tile(t, num_blocks, GROUP: tl.constexpr):
    """Block row and column of entry ``t`` of the lower triangle, ``GROUP`` block rows at a time.

    Inside a group the block column changes slowest, so that tiles that run together read few
    different panels.
    """
    first = (triangle_row(t) // GROUP) * GROUP
    height = tl.minimum(GROUP, num_blocks - first)
    local = t - first * (first + 1) // 2
    rest = local - height * first
    corner_row = triangle_row(tl.maximum(rest, 0))
    corner_col = rest - corner_row * (corner_row + 1) // 2
    in_corner = rest >= 0
    row = first + tl.where(in_corner, corner_row, local % height)
    col = tl.where(in_corner, first + corner_col, local // height)
    return row, col


@triton.jit
def triangle_wide(t, num_blocks):
    """Block row and column of tile ``t``, where tiles are one block high and two wide.

    Block row ``i`` holds ``i // 2 + 1`` tiles; in even rows the last one ends one block beyond the
    diagonal. Two rows run together.
    """
    g = ((tl.sqrt_rn((4 * t + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    g = tl.where(g * (g + 1) > t, g - 1, g)
    g = tl.where((g + 1) * (g + 2) <= t, g + 1, g)
    local = t - g * (g + 1)
    two_rows = 2 * g + 1 < num_blocks
    row = 2 * g + tl.where(two_rows, local % 2, 0)
    col = tl.where(two_rows, local // 2, local)
    return row, col


@triton.jit
def load_block(
    src,  # tensor descriptor (batch, rows, cols), or pointer
    batch,
    row0,
    col0,
    shape,  # (rows, cols) of the matrix
    strides,  # (batch, row, column), for pointers
    R: tl.constexpr,
    C: tl.constexpr,
    TMA: tl.constexpr,
    SWAPPED: tl.constexpr,  # the descriptor describes the transposed matrix
):
    """One ``(R, C)`` block, zero beyond the matrix."""
    if TMA:
        if SWAPPED:
            block = src.load([batch, col0, row0]).reshape(C, R).T
        else:
            block = src.load([batch, row0, col0]).reshape(R, C)
    else:
        r = row0 + tl.arange(0, R)
        c = col0 + tl.arange(0, C)
        offsets = r[:, None].to(tl.int64) * strides[1] + c[None, :].to(tl.int64) * strides[2]
        mask = (r[:, None] < shape[0]) & (c[None, :] < shape[1])
        block = tl.load(src + batch.to(tl.int64) * strides[0] + offsets, mask=mask, other=0.0)
    return block


@triton.jit
def store_block(
    dst,
    block,
    batch,
    row0,
    col0,
    shape,  # (rows, cols) of the matrix
    strides,  # (batch, row, column), for pointers
    R: tl.constexpr,
    C: tl.constexpr,
    TMA: tl.constexpr,
):
    """Writes what of an ``(R, C)`` block lies in the matrix."""
    if TMA:
        dst.store([batch, row0, col0], block.reshape(1, R, C))
    else:
        r = row0 + tl.arange(0, R)
        c = col0 + tl.arange(0, C)
        offsets = r[:, None].to(tl.int64) * strides[1] + c[None, :].to(tl.int64) * strides[2]
        mask = (r[:, None] < shape[0]) & (c[None, :] < shape[1])
        tl.store(dst + batch.to(tl.int64) * strides[0] + offsets, block, mask=mask)


@triton.jit
def scalar(value, factor, batch, PER_MATRIX: tl.constexpr):
    """A scalar argument: a float, or one fp32 value per matrix times a factor."""
    return tl.load(value + batch) * factor if PER_MATRIX else value
