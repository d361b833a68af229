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


@triton.jit
def _inner(left, right, base, right_base, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """``left right^T`` of two ``(K, n)`` matrices, in fp32."""
    rows = tl.arange(0, K)[:, None].to(tl.int64) * n
    total = tl.zeros((K, K), dtype=tl.float32)
    for start in tl.range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        offsets, mask = rows + cols[None, :], cols[None, :] < n
        block = tl.load(left + base + offsets, mask=mask, other=0.0)
        other = tl.load(right + right_base + offsets, mask=mask, other=0.0)
        total = tl.dot(block, other.T, total)
    return total


@triton.jit
def _multiply_chunks(
    factor,
    source,
    target,
    base,
    n,
    chunks,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's ``chunks`` blocks of columns of ``factor source``."""
    rows = tl.arange(0, K)[:, None].to(tl.int64) * n
    for chunk in tl.range(0, chunks):
        cols = (tl.program_id(1) * chunks + chunk) * BLOCK + tl.arange(0, BLOCK)
        offsets, mask = rows + cols[None, :], cols[None, :] < n
        block = tl.load(source + base + offsets, mask=mask, other=0.0).to(tl.float32)
        block = tl.dot(factor, block, input_precision=PRECISION)
        tl.store(target + base + offsets, block.to(target.dtype.element_ty), mask=mask)


# Both kernels below run one program per matrix and ``chunks`` blocks of columns. Each program
# computes the K x K matrices anew, which takes less time than waiting for another that does.
# ``chunks`` depends on the batch: compiled once for all, so that bits do not.


@triton.jit(do_not_specialize=["chunks"])
def shrink_basis_kernel(
    image,  # (batch, K, n), contiguous
    signs,  # (K, n), contiguous
    a,  # (batch, K, n), contiguous
    n,
    chunks,
    size,
    ROW: tl.constexpr,  # nine numbers
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first result of ``deflation.shrink_factors``."""
    base = tl.program_id(0).to(tl.int64) * K * n
    r = tl.arange(0, K)
    identity = (r[:, None] == r[None, :]).to(tl.float32)
    inner = _inner(image, signs, base, 0, n, K, BLOCK)
    inner = (inner + inner.T) * (0.5 * size)
    norm = tl.sqrt(tl.sum(tl.sum(inner * inner, axis=1), axis=0))
    norm = tl.where(norm < 1e-12, 1e-12, norm)
    inner = inner / norm
    square = tl.dot(inner, inner, input_precision=PRECISION)
    fourth = tl.sum(tl.sum(square * square, axis=1), axis=0)
    scale = 1.0 / _relative_bound(fourth, K)
    factor = _chain(inner * scale, square * (scale * scale), identity, ROW, PRECISION)
    factor = factor * (size * tl.sqrt(scale / norm))
    _multiply_chunks(factor, image, a, base, n, chunks, K, BLOCK, PRECISION)


@triton.jit(do_not_specialize=["chunks"])
def shrink_weights_kernel(
    a,  # (batch, K, n), contiguous
    weights,  # (batch, K, n), contiguous
    n,
    chunks,
    size,
    margin,
    ROW: tl.constexpr,
    WEIGHT: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The second result of ``deflation.shrink_factors``, from the first."""
    base = tl.program_id(0).to(tl.int64) * K * n
    r = tl.arange(0, K)
    identity = (r[:, None] == r[None, :]).to(tl.float32)
    inner = _inner(a, a, base, base, n, K, BLOCK) * (1.0 / (margin * size * size))
    phi = _shrink(inner, identity, ROW, WEIGHT, PRECISION) * (1.0 / (margin * size))
    _multiply_chunks(phi, a, weights, base, n, chunks, K, BLOCK, PRECISION)


@triton.jit
def squares_kernel(
    matrix,  # (batch, n, n), contiguous and symmetric
    sums,  # (batch, tiles) fp32
    n,
    TILE: tl.constexpr,
):
    """The sum of squares of one tile of the lower triangle, and of its mirror image.

    Starts with what was written last: it is still in L2.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    row = triangle_row(tile)
    col = tile - row * (row + 1) // 2
    r = row * TILE + tl.arange(0, TILE)
    c = col * TILE + tl.arange(0, TILE)
    mask = (r[:, None] < n) & (c[None, :] < n)
    offsets = batch * n * n + r[:, None].to(tl.int64) * n + c[None, :]
    values = tl.load(matrix + offsets, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(tl.sum(values * values, axis=1), axis=0)
    total = tl.where(row == col, total, 2.0 * total)
    tl.store(sums + batch * tl.num_programs(0) + tile, total)


@triton.jit
def _norm(sums, tiles, BLOCK: tl.constexpr):
    """The root of the sum of this program's row of partial sums."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, tiles, BLOCK):
        index = start + tl.arange(0, BLOCK)
        row = tl.program_id(0).to(tl.int64) * tiles
        total += tl.load(sums + row + index, mask=index < tiles, other=0.0)
    return tl.sqrt(tl.sum(total, axis=0))


@triton.jit
def norm_kernel(
    sums,  # (batch, tiles) fp32
    norm,  # (batch,) fp32
    inverse,  # (batch,) fp32
    tiles,
    BLOCK: tl.constexpr,
):
    """``small.symmetric_norms`` from sums of squares."""
    batch = tl.program_id(0)
    f = _norm(sums, tiles, BLOCK)
    tl.store(norm + batch, f)
    # No maximum: it would drop a NaN.
    tl.store(inverse + batch, 1.0 / tl.where(f < 1e-12, 1e-12, f))


@triton.jit
def bound_scalars_kernel(
    norm,  # (batch,) fp32
    sums,  # (batch, tiles) fp32
    scale,  # (batch,) fp32
    weight,  # (batch,) fp32
    root,  # (batch,) fp32
    n,
    tiles,
    BLOCK: tl.constexpr,
):
    """``bound.bound_scalars`` of one matrix."""
    batch = tl.program_id(0)
    f = tl.load(norm + batch)
    # No maximum here either.
    f = tl.where(f < 1e-12, 1e-12, f)
    ratio = _norm(sums, tiles, BLOCK) / f
    # The compiler makes a constant of 1, an integer.
    inverse = 1.0 / (f * _relative_bound(ratio * ratio, n * 1.0))
    tl.store(scale + batch, inverse)
    tl.store(weight + batch, inverse * inverse * f)
    tl.store(root + batch, tl.sqrt_rn(inverse))
