# mypy: ignore-errors
"""Triton kernel of the general products: ``alpha * a (x + shift I) + beta * c``."""

import triton
import triton.language as tl

from flashns_dist.orthogonalize.kernels.triton_tiles import (
    load_block,
    scalar,
    store_block,
    triangle_tile,
)


@triton.jit
def product_kernel(
    a,  # (batch, n, k): descriptor or pointer
    x,  # (batch, k, m)
    c,  # (batch, n, m)
    d,  # a itself, whose descriptor has blocks as those of out: for SHIFTED
    out,  # (batch, n, m), or (batch, m, n) with TRANSPOSE
    alpha,  # fp32, or pointer to one per matrix
    beta,
    alpha_factor,  # fp32: of what a pointer points to
    beta_factor,
    shift,  # fp32
    n,
    m,
    k,
    stride_ab,
    stride_ar,
    stride_ac,
    stride_xb,
    stride_xr,
    stride_xc,
    stride_cb,
    stride_cr,
    stride_cc,
    stride_ob,
    stride_or,
    stride_oc,
    HAS_C: tl.constexpr,
    SHIFTED: tl.constexpr,
    ALPHA_EACH: tl.constexpr,
    BETA_EACH: tl.constexpr,
    A_SWAPPED: tl.constexpr,
    X_SWAPPED: tl.constexpr,
    C_SWAPPED: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BACKWARDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes one ``BLOCK_N x BLOCK_M`` tile; ``GROUP`` block rows run together."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0) if BACKWARDS else tl.program_id(0)
    a_strides = (stride_ab, stride_ar, stride_ac)
    x_strides = (stride_xb, stride_xr, stride_xc)
    c_strides = (stride_cb, stride_cr, stride_cc)
    out_strides = (stride_ob, stride_or, stride_oc)
    blocks_n = tl.cdiv(n, BLOCK_N)
    blocks_m = tl.cdiv(m, BLOCK_M)
    batch = pid // (blocks_n * blocks_m)
    t = pid % (blocks_n * blocks_m)
    first = t // (GROUP * blocks_m) * GROUP
    height = tl.minimum(GROUP, blocks_n - first)
    local = t % (GROUP * blocks_m)
    row0 = (first + local % height) * BLOCK_N
    col0 = (local // height) * BLOCK_M
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k0 in tl.range(0, k, BLOCK_K):
        left = load_block(
            a, batch, row0, k0, (n, k), a_strides, BLOCK_N, BLOCK_K, TMA, A_SWAPPED
        )  # fmt: skip
        right = load_block(
            x, batch, k0, col0, (k, m), x_strides, BLOCK_K, BLOCK_M, TMA, X_SWAPPED
        )  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    factor = scalar(alpha, alpha_factor, batch, ALPHA_EACH)
    result = acc * factor
    if SHIFTED:
        old = load_block(
            d, batch, row0, col0, (n, k), a_strides, BLOCK_N, BLOCK_M, TMA, A_SWAPPED
        )  # fmt: skip
        result = tl.fma(old.to(tl.float32), factor * shift, result)
    if HAS_C:
        old = load_block(
            c, batch, row0, col0, (n, m), c_strides, BLOCK_N, BLOCK_M, TMA, C_SWAPPED
        )  # fmt: skip
        result = tl.fma(old.to(tl.float32), scalar(beta, beta_factor, batch, BETA_EACH), result)
    result = result.to(DTYPE)
    if TRANSPOSE:
        store_block(
            out, result.T, batch, col0, row0, (m, n), out_strides, BLOCK_M, BLOCK_N, TMA
        )  # fmt: skip
    else:
        store_block(
            out, result, batch, row0, col0, (n, m), out_strides, BLOCK_N, BLOCK_M, TMA
        )  # fmt: skip


@triton.jit
def scale_columns_kernel(
    a,  # (batch, n, n)
    scale,  # (batch, n) fp32
    out,  # (batch, n, n), contiguous
    n,
    stride_ab,
    stride_ar,
    stride_ac,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``a diag(scale)``, multiplied in fp32 and rounded once."""
    batch = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (r[:, None] < n) & (s[None, :] < n)
    offsets = r[:, None].to(tl.int64) * stride_ar + s[None, :].to(tl.int64) * stride_ac
    values = tl.load(a + batch * stride_ab + offsets, mask=mask, other=0.0)
    factors = tl.load(scale + batch * n + s, mask=s < n, other=0.0)
    result = values.to(tl.float32) * factors[None, :]
    target = out + batch * n * n + r[:, None].to(tl.int64) * n + s[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    a,  # (batch, n, n) contiguous, as b and out; of both the lower triangle is read
    b,
    out,
    alpha,  # fp32, or pointer to one per matrix
    beta,
    gamma,
    alpha_factor,  # fp32: of what a pointer points to
    beta_factor,
    gamma_factor,
    n,
    ALPHA_EACH: tl.constexpr,
    BETA_EACH: tl.constexpr,
    GAMMA_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``alpha * a + beta * b + gamma * I``, symmetric, in fp32 and rounded once.

    One program reads one block of the lower triangle and writes it and its mirror image.
    """
    num_blocks = tl.cdiv(n, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    row, col = triangle_tile(tl.program_id(0), num_blocks, 1)
    r = row * BLOCK + tl.arange(0, BLOCK)
    s = col * BLOCK + tl.arange(0, BLOCK)
    base = batch * n * n
    offsets = base + r[:, None].to(tl.int64) * n + s[None, :]
    mask = (r[:, None] < n) & (s[None, :] < n)
    first = tl.load(a + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(b + offsets, mask=mask, other=0.0).to(tl.float32)
    result = first * scalar(alpha, alpha_factor, batch, ALPHA_EACH)
    # Explicitly, or the compiler chooses for every element which product it fuses.
    result = tl.fma(second, scalar(beta, beta_factor, batch, BETA_EACH), result)
    added = result + scalar(gamma, gamma_factor, batch, GAMMA_EACH)
    result = tl.where(r[:, None] == s[None, :], added, result).to(out.dtype.element_ty)
    if row == col:
        result = tl.where(r[:, None] >= s[None, :], result, result.T)
    else:
        mirrored = base + s[:, None].to(tl.int64) * n + r[None, :]
        tl.store(out + mirrored, result.T, mask=(s[:, None] < n) & (r[None, :] < n))
    tl.store(out + offsets, result, mask=mask)


@triton.jit
def mirror_kernel(
    matrix,  # (batch, n, n)
    n,
    stride_b,
    stride_r,
    stride_c,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the lower triangle of each square on the diagonal over its upper one, in place.

    One program reads one block of a square's lower triangle and writes its mirror image.
    """
    BLOCKS: tl.constexpr = SQUARE // BLOCK
    TRIANGLE: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    square = tl.program_id(0) // TRIANGLE * SQUARE
    batch = tl.program_id(1).to(tl.int64)
    row, col = triangle_tile(tl.program_id(0) % TRIANGLE, BLOCKS, 1)
    r = square + row * BLOCK + tl.arange(0, BLOCK)
    s = square + col * BLOCK + tl.arange(0, BLOCK)
    lower = (r[:, None] > s[None, :]) & (r[:, None] < n)
    base = matrix + batch * stride_b
    source = base + r[:, None].to(tl.int64) * stride_r + s[None, :].to(tl.int64) * stride_c
    target = base + s[None, :].to(tl.int64) * stride_r + r[:, None].to(tl.int64) * stride_c
    tl.store(target, tl.load(source, mask=lower), mask=lower)
