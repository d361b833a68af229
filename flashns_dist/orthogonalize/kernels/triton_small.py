# mypy: ignore-errors
"""Triton kernel of the Gram iteration on small matrices: all steps of one matrix on one SM."""

import triton
import triton.language as tl

from flashns_dist.orthogonalize.kernels.triton_tiles import scalar


@triton.jit
def _symmetrized(value, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """``value`` rounded once, its lower triangle mirrored."""
    r = tl.arange(0, BLOCK)[:, None]
    s = tl.arange(0, BLOCK)[None, :]
    rounded = value.to(DTYPE)
    return tl.where(r >= s, rounded, rounded.T)


@triton.jit
def _eye(value, n, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)[:, None]
    s = tl.arange(0, BLOCK)[None, :]
    return tl.where((r == s) & (r < n), value, 0.0)


@triton.jit
def _multiply(a, b, alpha, c, beta, shift, BLOCK: tl.constexpr, DTYPE, PRECISION: tl.constexpr):
    """``alpha * a b + beta * c + shift``, symmetrized."""
    acc = tl.dot(a, b, input_precision=PRECISION) * alpha
    acc = tl.fma(c.to(tl.float32), beta, acc)
    return _symmetrized(acc + shift, BLOCK, DTYPE)


@triton.jit
def gram_space_kernel(
    x,  # (batch, n, m)
    out,  # (batch, n, n) contiguous
    alpha,  # fp32, or pointer to one per matrix: the Gram matrix is alpha * x x^T / scale
    scale,
    n,
    m,
    stride_xb,
    stride_xr,
    stride_xc,
    ROWS: tl.constexpr,  # the coefficients, a tuple of tuples
    ALPHA_EACH: tl.constexpr,
    SCALE_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The factor of ``gram.run_steps`` for one matrix, rounded where separate products round."""
    batch = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    base = x + batch * stride_xb + r[:, None].to(tl.int64) * stride_xr
    for m0 in tl.range(0, m, BLOCK_M):
        k = m0 + tl.arange(0, BLOCK_M)
        mask = (r[:, None] < n) & (k[None, :] < m)
        panel = tl.load(base + k[None, :].to(tl.int64) * stride_xc, mask=mask, other=0.0)
        acc = tl.dot(panel, panel.T, acc, input_precision=PRECISION)
    gram = _symmetrized(acc * scalar(alpha, 1.0, batch, ALPHA_EACH), BLOCK, DTYPE)
    weight = scalar(scale, 1.0, batch, SCALE_EACH)
    total = gram
    for step in tl.static_range(len(ROWS)):
        row = ROWS[step]
        if len(row) == 2:
            factor = _symmetrized(gram.to(tl.float32) * (row[1] * weight), BLOCK, DTYPE)
        elif len(row) == 3:
            factor = _multiply(
                gram, gram, row[2] * weight * weight, gram, row[1] * weight, 0.0,
                BLOCK, DTYPE, PRECISION,
            )  # fmt: skip
        else:
            p = row[3] / (2 * row[4])
            g = (row[2] / row[4] - p * p) / 2
            q = row[1] - 2 * row[4] * p * g
            y = _multiply(
                gram, gram, weight * weight, gram, p * weight, _eye(g, n, BLOCK),
                BLOCK, DTYPE, PRECISION,
            )  # fmt: skip
            factor = _multiply(
                y, y, row[4], gram, q * weight, _eye(-row[4] * g * g, n, BLOCK),
                BLOCK, DTYPE, PRECISION,
            )  # fmt: skip
        if step == 0:
            total = factor
        else:
            if step == 1:
                total = (total.to(tl.float32) + _eye(ROWS[0][0], n, BLOCK)).to(DTYPE)
            total = _multiply(total, factor, 1.0, total, row[0], 0.0, BLOCK, DTYPE, PRECISION)
        if step < len(ROWS) - 1:
            half = _multiply(
                gram, factor, weight, gram, row[0] * weight, 0.0, BLOCK, DTYPE, PRECISION
            )
            gram = _multiply(factor, half, 1.0, half, row[0], 0.0, BLOCK, DTYPE, PRECISION)
            weight = 1.0
    s = tl.arange(0, BLOCK)
    target = out + batch * n * n + r[:, None] * n + s[None, :]
    tl.store(target, total, mask=(r[:, None] < n) & (s[None, :] < n))
