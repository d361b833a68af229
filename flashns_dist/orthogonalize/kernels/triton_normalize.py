# mypy: ignore-errors
"""Triton kernels of the fused normalization: fp32 Frobenius norm, scale, cast, transpose.

A partial sum of squares is kept at one of three scales, so that no finite fp32 input overflows or
underflows it (Blue's algorithm): the number stored is ``sum * 2^-160`` for huge entries, ``sum``
itself, or ``sum * 2^200`` for tiny ones. The level is -1, 0 or 1 in that order.
"""

import triton
import triton.language as tl

BIG = tl.constexpr(2.0**-80)
SMALL = tl.constexpr(2.0**100)


@triton.jit
def choose(plain, big, small):
    """The partial sum that neither overflowed nor underflowed, and its level."""
    level = tl.where(plain < 2.0**-80, 1, 0)
    level = tl.where(plain < 2.0**100, level, -1)  # also for inf and nan
    total = tl.where(level == 1, small, tl.where(level == 0, plain, big))
    return total, level


@triton.jit
def factors(total, level, scale):
    """``(pre, post, norm)``: ``x * pre * post`` is ``x * scale / norm``."""
    pre = tl.where(level == 1, SMALL, tl.where(level == 0, 1.0, BIG))
    back = tl.where(level == 1, 2.0**-100, tl.where(level == 0, 1.0, 2.0**80))
    root = tl.sqrt_rn(total)
    post = tl.where(total == 0.0, 0.0, tl.div_rn(scale, root))
    return pre, post, root * back


@triton.jit
def partial_norms_kernel(
    x,  # (batch, size), rows of a fixed stride
    sums,  # (batch, chunks) fp32
    levels,  # (batch, chunks) int32
    size,
    stride_b,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Sum of squares of one chunk of ``BLOCK * STEPS`` entries."""
    chunk = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    start = chunk.to(tl.int64) * (BLOCK * STEPS)
    plain = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in tl.range(0, STEPS):
        offsets = start + step * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + batch * stride_b + offsets, mask=offsets < size, other=0.0)
        values = values.to(tl.float32)
        plain += values * values
    total = tl.sum(plain)
    level = 0
    # Rarely, and also for inf and nan: once more at the other scales.
    if (total >= 2.0**-80) & (total < 2.0**100):
        pass
    else:
        big = tl.zeros((BLOCK,), dtype=tl.float32)
        small = tl.zeros((BLOCK,), dtype=tl.float32)
        for step in tl.range(0, STEPS):
            offsets = start + step * BLOCK + tl.arange(0, BLOCK)
            values = tl.load(x + batch * stride_b + offsets, mask=offsets < size, other=0.0)
            values = values.to(tl.float32)
            down = values * BIG
            up = values * SMALL
            big += down * down
            small += up * up
        total, level = choose(total, tl.sum(big), tl.sum(small))
    tl.store(sums + batch * tl.num_programs(0) + chunk, total)
    tl.store(levels + batch * tl.num_programs(0) + chunk, level)


@triton.jit
def combine(sums, levels, batch, num_chunks, CHUNKS: tl.constexpr):
    """All partial sums of one matrix, at the highest level that occurs."""
    index = tl.arange(0, CHUNKS)
    mask = index < num_chunks
    s = tl.load(sums + batch * num_chunks + index, mask=mask, other=0.0)
    level = tl.load(levels + batch * num_chunks + index, mask=mask, other=1)
    # A chunk of zeros sits at the tiny level and adds nothing anywhere.
    big = tl.sum(tl.where(level == -1, s, 0.0))
    plain = tl.sum(tl.where(level == 0, s, 0.0))
    small = tl.sum(tl.where(level == 1, s, 0.0))
    has_big = tl.sum(tl.where(level == -1, 1, 0)) > 0
    has_plain = tl.sum(tl.where(level == 0, 1, 0)) > 0
    from_small = (small * 2.0**-100) * 2.0**-100
    from_plain = (plain * BIG) * BIG
    total = tl.where(has_big, big + from_plain, tl.where(has_plain, plain + from_small, small))
    return total, tl.where(has_big, -1, tl.where(has_plain, 0, 1))


@triton.jit
def inverse_norms_kernel(
    sums,  # (batch, chunks) fp32
    levels,  # (batch, chunks) int32
    out,  # (batch,) fp32
    scale,
    num_chunks,
    CHUNKS: tl.constexpr,
):
    """``scale / norm`` of one matrix from its partial sums; zero for a zero matrix."""
    batch = tl.program_id(0)
    total, level = combine(sums, levels, batch.to(tl.int64), num_chunks, CHUNKS)
    pre, post, _ = factors(total, level, scale)
    tl.store(out + batch, post * pre)


@triton.jit
def scale_kernel(
    x,  # (batch, rows * cols), rows of a fixed stride
    sums,
    levels,
    out,  # (batch, rows, cols) contiguous
    norms,  # (batch,) fp32
    scale,  # fp32, or pointer to one per matrix
    size,
    num_chunks,
    num_matrices,
    stride_b,
    SCALE_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """``x * scale / norm``, cast. Starts with what the pass before read last: it is still in L2."""
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (num_matrices - 1 - tl.program_id(1)).to(tl.int64)
    total, level = combine(sums, levels, batch, num_chunks, CHUNKS)
    factor = tl.load(scale + batch) if SCALE_EACH else scale
    pre, post, norm = factors(total, level, factor)
    if chunk == 0:
        tl.store(norms + batch, norm)
    start = chunk.to(tl.int64) * (BLOCK * STEPS)
    for step in tl.range(0, STEPS):
        offsets = start + step * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        values = tl.load(x + batch * stride_b + offsets, mask=mask, other=0.0).to(tl.float32)
        result = (values * pre) * post
        tl.store(out + batch * size + offsets, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def scale_transpose_kernel(
    x,  # (batch, rows, cols), contiguous rows
    sums,
    levels,
    out,  # (batch, cols, rows) contiguous
    norms,
    scale,
    rows,
    cols,
    num_chunks,
    num_matrices,
    stride_b,
    SCALE_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """``scale_kernel``, written transposed: one column of ``STEPS`` square tiles per program."""
    batch = (num_matrices - 1 - tl.program_id(2)).to(tl.int64)
    block_row = tl.num_programs(1) - 1 - tl.program_id(1)
    block_col = tl.num_programs(0) - 1 - tl.program_id(0)
    total, level = combine(sums, levels, batch, num_chunks, CHUNKS)
    factor = tl.load(scale + batch) if SCALE_EACH else scale
    pre, post, norm = factors(total, level, factor)
    if (block_row == 0) & (block_col == 0):
        tl.store(norms + batch, norm)
    c = block_col * BLOCK + tl.arange(0, BLOCK)
    for step in tl.range(0, STEPS):
        r = (block_row * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        mask = (r[:, None] < rows) & (c[None, :] < cols)
        source = batch * stride_b + r[:, None].to(tl.int64) * cols + c[None, :]
        values = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
        result = ((values * pre) * post).to(out.dtype.element_ty)
        target = batch * rows * cols + c[:, None].to(tl.int64) * rows + r[None, :]
        tl.store(out + target, result.T, mask=(c[:, None] < cols) & (r[None, :] < rows))


@triton.jit
def normalize_once_kernel(
    x,  # (batch, rows, cols), contiguous rows
    out,  # contiguous
    norms,
    scale,
    rows,
    cols,
    stride_b,
    SCALE_EACH: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Everything in one program per matrix, which it holds in registers: reads ``x`` once."""
    batch = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    mask = (r[:, None] < rows) & (c[None, :] < cols)
    source = batch * stride_b + r[:, None] * cols + c[None, :]
    values = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    down = values * BIG
    up = values * SMALL
    total, level = choose(
        tl.sum(tl.sum(values * values, axis=1)),
        tl.sum(tl.sum(down * down, axis=1)),
        tl.sum(tl.sum(up * up, axis=1)),
    )
    factor = tl.load(scale + batch) if SCALE_EACH else scale
    pre, post, norm = factors(total, level, factor)
    tl.store(norms + batch, norm)
    result = ((values * pre) * post).to(out.dtype.element_ty)
    base = batch * rows * cols
    if TRANSPOSE:
        target = base + c[:, None] * rows + r[None, :]
        tl.store(out + target, result.T, mask=(c[:, None] < cols) & (r[None, :] < rows))
    else:
        tl.store(out + base + r[:, None] * cols + c[None, :], result, mask=mask)
