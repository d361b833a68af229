# mypy: ignore-errors
"""Triton kernels of ``Kernels.sketch``: a matrix's sketch and its norm, from one pass over it."""

import triton
import triton.language as tl

from flashns_dist.orthogonalize.kernels.triton_normalize import BIG, SMALL, choose, combine, factors
from flashns_dist.orthogonalize.kernels.triton_tiles import load_block


@triton.jit
def sketch_kernel(
    signs,  # (1, ROWS, n): descriptor or pointer
    x,  # (batch, n, m)
    raw,  # (batch, ROWS, m), contiguous
    sums,  # (batch, blocks) fp32
    levels,  # (batch, blocks) int32
    n,
    m,
    stride_xb,
    stride_xr,
    stride_xc,
    X_SWAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """``signs x`` and the partial sum of squares of one block of columns."""
    col0 = tl.program_id(0) * BLOCK
    batch = tl.program_id(1)
    only = batch * 0  # the signs' batch
    x_strides = (stride_xb, stride_xr, stride_xc)
    acc = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    plain = tl.zeros((BLOCK_K, BLOCK), dtype=tl.float32)
    for k0 in tl.range(0, n, BLOCK_K):
        left = load_block(signs, only, 0, k0, (ROWS, n), (0, n, 1), ROWS, BLOCK_K, TMA, False)
        right = load_block(x, batch, k0, col0, (n, m), x_strides, BLOCK_K, BLOCK, TMA, X_SWAPPED)
        acc = tl.dot(left, right, acc)
        values = right.to(tl.float32)
        plain += values * values
    rows = tl.arange(0, ROWS)[:, None]
    cols = col0 + tl.arange(0, BLOCK)[None, :]
    base = batch.to(tl.int64) * ROWS * m
    place = raw + base + rows.to(tl.int64) * m + cols
    tl.store(place, acc.to(raw.dtype.element_ty), mask=cols < m)
    total = tl.sum(tl.sum(plain, axis=1), axis=0)
    level = 0
    # Rarely, and also for inf and nan: once more at the other scales.
    if (total >= 2.0**-80) & (total < 2.0**100):
        pass
    else:
        big = tl.zeros((BLOCK_K, BLOCK), dtype=tl.float32)
        small = tl.zeros((BLOCK_K, BLOCK), dtype=tl.float32)
        for k0 in tl.range(0, n, BLOCK_K, num_stages=1):
            block = load_block(
                x, batch, k0, col0, (n, m), x_strides, BLOCK_K, BLOCK, TMA, X_SWAPPED
            )
            values = block.to(tl.float32)
            down = values * BIG
            up = values * SMALL
            big += down * down
            small += up * up
        total, level = choose(
            total, tl.sum(tl.sum(big, axis=1), axis=0), tl.sum(tl.sum(small, axis=1), axis=0)
        )
    place = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + place, total)
    tl.store(levels + place, level)


@triton.jit
def scale_sketch_kernel(
    raw,  # (batch, rows, m), contiguous
    sums,  # (batch, chunks) fp32
    levels,  # (batch, chunks) int32
    out,  # (batch, rows, m), contiguous
    inverse,  # (batch,) fp32
    scale,
    size,  # rows * m
    num_chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """``scale / norm`` of one matrix, and a block of its sketch times that."""
    batch = tl.program_id(1)
    total, level = combine(sums, levels, batch.to(tl.int64), num_chunks, CHUNKS)
    pre, post, _ = factors(total, level, scale)
    factor = post * pre
    if tl.program_id(0) == 0:
        tl.store(inverse + batch, factor)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = batch.to(tl.int64) * size
    values = tl.load(raw + base + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    tl.store(out + base + offsets, (values * factor).to(out.dtype.element_ty), mask=offsets < size)
