# mypy: ignore-errors
"""Triton kernels of what is too small to be many operations.

Launched on the current stream; usable in CUDA graphs and under torch.compile.
"""

import triton
import triton.language as tl

from flashns_dist.orthogonalize.kernels.triton_tiles import triangle_row


@triton.jit
def _chain(m, square, identity, ROW: tl.constexpr, PRECISION: tl.constexpr):
    """``h(m)`` of a nine-number row (see ``chain.py``), in fp32, given the square of ``m``."""
    u = ROW[0] * square + ROW[1] * m + ROW[2] * identity
    w = ROW[3] * tl.dot(u, u, input_precision=PRECISION) + ROW[4] * m + ROW[5] * identity
    return ROW[6] * tl.dot(w, w, input_precision=PRECISION) + ROW[7] * m + ROW[8] * identity


@triton.jit
def _shrink(m, identity, ROW: tl.constexpr, WEIGHT: tl.constexpr, PRECISION: tl.constexpr):
    """``phi(m)`` as ``deflation.shrink_weights`` computes it, in fp32."""
    first = ROW[0] * m + ROW[1] * identity
    half = tl.dot(m, first, input_precision=PRECISION) + 2.0 * ROW[2] * identity
    second = ROW[3] * tl.dot(first, half, input_precision=PRECISION) + ROW[4] * identity
    start: tl.constexpr = ROW[3] * ROW[2] * ROW[2] + ROW[5]
    half = tl.dot(m, second, input_precision=PRECISION) + 2.0 * start * identity
    third = ROW[6] * tl.dot(second, half, input_precision=PRECISION) + ROW[7] * identity
    return third * WEIGHT


@triton.jit
def _relative_bound(fourth, rows):
    """``bound.bound_scalars``' bound on the largest eigenvalue, for a Frobenius norm of one."""
    variance = fourth / rows - 1.0 / (rows * rows)
    variance = tl.where(variance < 0.0, 0.0, variance)  # no maximum: it would drop a NaN
    return tl.sqrt(1.0 / rows + tl.sqrt((rows - 1.0) * variance))


# One program per matrix and ``chunks`` blocks of columns. Each program computes the K x K matrices
# anew, which takes less time than waiting for another that does. ``chunks`` depends on the batch:
# compiled once for all, so that bits do not.
@triton.jit(do_not_specialize=["chunks"])
def shrink_kernel(
    image,  # (batch, K, n), contiguous
    signs,  # (K, n), contiguous
    a,  # (batch, K, n), contiguous
    weights,  # (batch, K, n), contiguous
    n,
    chunks,
    size,
    margin,
    BASIS_ROW: tl.constexpr,  # nine numbers
    SHRINK_ROW: tl.constexpr,  # nine numbers
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``deflation.shrink_factors``."""
    base = tl.program_id(0).to(tl.int64) * K * n
    rows = tl.arange(0, K)[:, None].to(tl.int64) * n
    inner = tl.zeros((K, K), dtype=tl.float32)
    moments = tl.zeros((K, K), dtype=tl.float32)
    for start in tl.range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        offsets, mask = rows + cols[None, :], cols[None, :] < n
        block = tl.load(image + base + offsets, mask=mask, other=0.0)
        other = tl.load(signs + offsets, mask=mask, other=0.0)
        inner = tl.dot(block, other.T, inner)
        moments = tl.dot(block, block.T, moments)
    r = tl.arange(0, K)
    identity = (r[:, None] == r[None, :]).to(tl.float32)
    inner = (inner + inner.T) * (0.5 * size)
    norm = tl.sqrt(tl.sum(tl.sum(inner * inner, axis=1), axis=0))
    norm = tl.where(norm < 1e-12, 1e-12, norm)
    inner = inner / norm
    square = tl.dot(inner, inner, input_precision=PRECISION)
    fourth = tl.sum(tl.sum(square * square, axis=1), axis=0)
    scale = 1.0 / _relative_bound(fourth, K)
    basis = _chain(inner * scale, square * (scale * scale), identity, BASIS_ROW, PRECISION)
    basis = basis * (size * tl.sqrt(scale / norm))
    moments = tl.dot(basis, moments * (1.0 / (margin * size * size)), input_precision=PRECISION)
    moments = tl.dot(moments, basis, input_precision=PRECISION)
    phi = _shrink(moments, identity, SHRINK_ROW, WEIGHT, PRECISION)
    phi = tl.dot(phi, basis * (1.0 / (margin * size)), input_precision=PRECISION)
    for chunk in tl.range(0, chunks):
        cols = (tl.program_id(1) * chunks + chunk) * BLOCK + tl.arange(0, BLOCK)
        offsets, mask = rows + cols[None, :], cols[None, :] < n
        block = tl.load(image + base + offsets, mask=mask, other=0.0).to(tl.float32)
        first = tl.dot(basis, block, input_precision=PRECISION)
        second = tl.dot(phi, block, input_precision=PRECISION)
        tl.store(a + base + offsets, first.to(a.dtype.element_ty), mask=mask)
        tl.store(weights + base + offsets, second.to(weights.dtype.element_ty), mask=mask)


@triton.jit
def squares_kernel(
    matrix,  # (batch, n, n), contiguous and symmetric
    sums,  # (batch, 2, tiles) fp32
    n,
    TILE: tl.constexpr,
):
    """Sums of one tile of the lower triangle; see ``small._sums``.

    Starts with what was written last: it is still in L2.
    """
    tiles = tl.num_programs(0)
    tile = tiles - 1 - tl.program_id(0)
    batch = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    row = triangle_row(tile)
    col = tile - row * (row + 1) // 2
    r = row * TILE + tl.arange(0, TILE)
    c = col * TILE + tl.arange(0, TILE)
    mask = (r[:, None] < n) & (c[None, :] < n)
    offsets = batch * n * n + r[:, None].to(tl.int64) * n + c[None, :]
    values = tl.load(matrix + offsets, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(tl.sum(values * values, axis=1), axis=0)
    squares = tl.where(row == col, squares, 2.0 * squares)
    diagonal = tl.sum(tl.sum(tl.where(r[:, None] == c[None, :], values, 0.0), axis=1), axis=0)
    tl.store(sums + batch * 2 * tiles + tile, squares)
    tl.store(sums + (batch * 2 + 1) * tiles + tile, diagonal)


@triton.jit
def _total(sums, row, tiles, BLOCK: tl.constexpr):
    """The sum of a row of partial sums."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, tiles, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(sums + row.to(tl.int64) * tiles + index, mask=index < tiles, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def inverse_norm_kernel(
    sums,  # (batch, 2, tiles) fp32
    inverse,  # (batch,) fp32
    tiles,
    BLOCK: tl.constexpr,
):
    """``small.inverse_norms`` from the sums of ``squares_kernel``."""
    batch = tl.program_id(0)
    norm = tl.sqrt(_total(sums, 2 * batch, tiles, BLOCK))
    # No maximum: it would drop a NaN.
    tl.store(inverse + batch, 1.0 / tl.where(norm < 1e-12, 1e-12, norm))


@triton.jit
def bound_scalars_kernel(
    sums,  # (batch, 2, tiles) fp32
    scale,  # (batch,) fp32
    root,  # (batch,) fp32
    rest,  # (batch,) fp32
    weight,  # fp32, or pointer to one per matrix
    n,
    tiles,
    WEIGHT_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``bound.bound_scalars`` of one matrix."""
    batch = tl.program_id(0)
    factor = tl.load(weight + batch) if WEIGHT_EACH else weight
    trace = _total(sums, 2 * batch + 1, tiles, BLOCK)
    # No maximum here either.
    trace = tl.where(trace < 1e-12, 1e-12, trace)
    fourth = _total(sums, 2 * batch, tiles, BLOCK) / (trace * trace)
    # The compiler makes a constant of 1, an integer.
    inverse = tl.sqrt(factor / trace) / _relative_bound(fourth, n * 1.0)
    tl.store(scale + batch, inverse)
    tl.store(root + batch, tl.sqrt_rn(inverse))
    tl.store(rest + batch, inverse * inverse / factor)
