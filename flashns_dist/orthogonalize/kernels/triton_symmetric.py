# mypy: ignore-errors
"""Triton kernel of the products with a symmetric result: half of the tiles, both halves written."""

import triton
import triton.language as tl

from flashns_dist.orthogonalize.kernels.triton_tiles import (
    load_block,
    scalar,
    store_block,
    triangle_tile,
    triangle_wide,
)


@triton.jit
def _finish(
    acc,
    c,
    out,
    scalars,
    batch,
    row0,
    col0,
    n,
    c_strides,
    out_strides,
    DIAGONAL: tl.constexpr,
    HAS_C: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``alpha * acc + beta * c + gamma * I``, rounded once; written twice, or mirrored in place."""
    result = acc * scalars[0]
    if HAS_C:
        old = load_block(c, batch, row0, col0, (n, n), c_strides, BLOCK, BLOCK, TMA, False)
        result = tl.fma(old.to(tl.float32), scalars[1], result)
    if DIAGONAL:
        r = tl.arange(0, BLOCK)[:, None]
        s = tl.arange(0, BLOCK)[None, :]
        result = tl.where(r == s, result + scalars[2], result).to(DTYPE)
        result = tl.where(r >= s, result, result.T)
    else:
        result = result.to(DTYPE)
        store_block(
            out, result.T, batch, col0, row0, (n, n), out_strides, BLOCK, BLOCK, TMA
        )  # fmt: skip
    store_block(out, result, batch, row0, col0, (n, n), out_strides, BLOCK, BLOCK, TMA)


@triton.jit
def _finish_any(
    acc,
    c,
    out,
    scalars,
    batch,
    row0,
    col0,
    n,
    c_strides,
    out_strides,
    HAS_C: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
):
    if row0 == col0:
        _finish(
            acc, c, out, scalars, batch, row0, col0, n, c_strides, out_strides,
            True, HAS_C, BLOCK, TMA, DTYPE,
        )  # fmt: skip
    else:
        _finish(
            acc, c, out, scalars, batch, row0, col0, n, c_strides, out_strides,
            False, HAS_C, BLOCK, TMA, DTYPE,
        )  # fmt: skip


@triton.jit
def _tile(
    a,
    b,
    batch,
    row0,
    col0,
    n,
    k,
    a_strides,
    b_strides,
    A_SWAPPED: tl.constexpr,
    B_SWAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One ``(BLOCK, COLS)`` tile of ``a b^T`` in fp32."""
    acc = tl.zeros((BLOCK, COLS), dtype=tl.float32)
    for k0 in tl.range(0, k, BLOCK_K):
        left = load_block(
            a, batch, row0, k0, (n, k), a_strides, BLOCK, BLOCK_K, TMA, A_SWAPPED
        )  # fmt: skip
        right = load_block(
            b, batch, col0, k0, (n, k), b_strides, COLS, BLOCK_K, TMA, B_SWAPPED
        )  # fmt: skip
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    return acc


# Compiling anew for batches that are one or a multiple of 16 would gain nothing.
@triton.jit(do_not_specialize=["num_matrices"])
def symmetric_kernel(
    a,  # (batch, n, k): descriptor or pointer
    b,  # (batch, n, k): the second factor's transpose
    c,  # (batch, n, n)
    out,  # (batch, n, n)
    alpha,  # fp32, or pointer to one per matrix
    beta,
    gamma,
    alpha_factor,  # fp32: of what a pointer points to
    beta_factor,
    gamma_factor,
    n,
    k,
    num_matrices,
    stride_ab,
    stride_ar,
    stride_ac,
    stride_bb,
    stride_br,
    stride_bc,
    stride_cb,
    stride_cr,
    stride_cc,
    stride_ob,
    stride_or,
    stride_oc,
    HAS_C: tl.constexpr,
    ALPHA_EACH: tl.constexpr,
    BETA_EACH: tl.constexpr,
    GAMMA_EACH: tl.constexpr,
    A_SWAPPED: tl.constexpr,
    B_SWAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``alpha * a b^T + beta * c + gamma * I``, of which the lower triangle is computed.

    One program computes one ``BLOCK x BLOCK`` tile. With ``WIDE``, programs stay and compute
    ``BLOCK x 2 BLOCK`` tiles in turn; in even block rows the last one reaches beyond the triangle.
    """
    num_blocks = tl.cdiv(n, BLOCK)
    a_strides = (stride_ab, stride_ar, stride_ac)
    b_strides = (stride_bb, stride_br, stride_bc)
    c_strides = (stride_cb, stride_cr, stride_cc)
    out_strides = (stride_ob, stride_or, stride_oc)
    if WIDE:
        rows2 = (num_blocks + 1) // 2
        num_tiles = rows2 * (rows2 + 1) - (num_blocks % 2) * rows2
        for tile in tl.range(tl.program_id(0), num_tiles * num_matrices, tl.num_programs(0)):
            batch = tile // num_tiles
            row, col = triangle_wide(tile % num_tiles, num_blocks)
            row0 = row * BLOCK
            col0 = 2 * col * BLOCK
            scalars = (
                scalar(alpha, alpha_factor, batch, ALPHA_EACH),
                scalar(beta, beta_factor, batch, BETA_EACH),
                scalar(gamma, gamma_factor, batch, GAMMA_EACH),
            )
            acc = _tile(
                a, b, batch, row0, col0, n, k, a_strides, b_strides, A_SWAPPED, B_SWAPPED,
                BLOCK, 2 * BLOCK, BLOCK_K, TMA, PRECISION,
            )  # fmt: skip
            first, second = acc.reshape(BLOCK, 2, BLOCK).permute(0, 2, 1).split()
            _finish_any(
                first, c, out, scalars, batch, row0, col0, n, c_strides, out_strides,
                HAS_C, BLOCK, TMA, DTYPE,
            )  # fmt: skip
            if col0 + BLOCK <= row0:
                _finish_any(
                    second, c, out, scalars, batch, row0, col0 + BLOCK, n, c_strides, out_strides,
                    HAS_C, BLOCK, TMA, DTYPE,
                )  # fmt: skip
    else:
        pid = tl.program_id(0)
        num_tiles = num_blocks * (num_blocks + 1) // 2
        batch = pid // num_tiles
        row, col = triangle_tile(pid % num_tiles, num_blocks, GROUP)
        row0 = row * BLOCK
        col0 = col * BLOCK
        scalars = (
            scalar(alpha, alpha_factor, batch, ALPHA_EACH),
            scalar(beta, beta_factor, batch, BETA_EACH),
            scalar(gamma, gamma_factor, batch, GAMMA_EACH),
        )
        acc = _tile(
            a, b, batch, row0, col0, n, k, a_strides, b_strides, A_SWAPPED, B_SWAPPED,
            BLOCK, BLOCK, BLOCK_K, TMA, PRECISION,
        )  # fmt: skip
        _finish_any(
            acc, c, out, scalars, batch, row0, col0, n, c_strides, out_strides,
            HAS_C, BLOCK, TMA, DTYPE,
        )  # fmt: skip
