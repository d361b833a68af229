# mypy: ignore-errors
"""Gluon kernel of the general products, for Hopper's own tensor cores.

It computes what ``triton_product`` computes, bit for bit, for matrices that whole tiles cover, with
what is added and stored hidden behind the next tile's products; see ``gluon_pipeline``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashns_dist.orthogonalize.kernels.gluon_pipeline import (
    add_wide,
    halves,
    load_addend,
    load_factors,
    multiply_half,
    new_ring,
    scalar,
    store,
)
from flashns_dist.orthogonalize.kernels.gluon_tiles import tile_at


@gluon.jit
def _loader(
    a,
    b,
    c,
    d,
    ring,
    sizes,
    num_tiles,
    HAS_C: gl.constexpr,
    SHIFTED: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One warp: fills stage after stage as both multipliers free them."""
    n, m, _ = sizes
    slot = 0
    for turn in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, row, col = tile_at(turn, n // BLOCK, m // (2 * BLOCK), GROUP)
        row0 = row * BLOCK
        col0 = col * (2 * BLOCK)
        slot = load_factors(
            a, b, ring, sizes, slot, batch, row0, col0, True, False, A_SWAPPED, B_SWAPPED, BLOCK,
            BLOCK_K, STAGES,
        )  # fmt: skip
        if SHIFTED:
            slot = load_addend(d, ring, slot, batch * n + row0, col0, True, BLOCK, STAGES)
        if HAS_C:
            slot = load_addend(c, ring, slot, batch * n + row0, col0, True, BLOCK, STAGES)


@gluon.jit
def _multiplier(
    out,
    c,
    d,
    scalars,
    ring,
    blocks,
    sizes,
    num_tiles,
    half: gl.constexpr,
    HAS_C: gl.constexpr,
    SHIFTED: gl.constexpr,
    ALPHA_EACH: gl.constexpr,
    BETA_EACH: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    TRANSPOSE: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One warpgroup: the upper or lower half of tile after tile."""
    n, m, k = sizes
    alphas, betas, alpha_factor, beta_factor, shift = scalars
    HALF: gl.constexpr = BLOCK // 2
    DTYPE: gl.constexpr = out.dtype
    even, odd = blocks.index(2 * half), blocks.index(2 * half + 1)
    slot = 0
    for turn in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, row, col = tile_at(turn, n // BLOCK, m // (2 * BLOCK), GROUP)
        row0 = row * BLOCK + half * HALF
        col0 = col * (2 * BLOCK)
        alpha = scalar(alphas, alpha_factor, batch, ALPHA_EACH)
        acc, slot = multiply_half(
            ring, slot, k // BLOCK_K, half, True, False, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K,
            STAGES,
        )  # fmt: skip
        first, second = halves(acc * alpha)
        p0, p1 = halves(first)
        p2, p3 = halves(second)
        if SHIFTED:
            p0, p1, p2, p3, slot = add_wide(
                p0, p1, p2, p3, d, alpha * shift, ring, slot, half, BLOCK, STAGES
            )
        if HAS_C:
            beta = scalar(betas, beta_factor, batch, BETA_EACH)
            p0, p1, p2, p3, slot = add_wide(
                p0, p1, p2, p3, c, beta, ring, slot, half, BLOCK, STAGES
            )
        if TRANSPOSE:
            below = batch * m + col0
            store(out, below, row0, p0.to(DTYPE), even, True)
            store(out, below + HALF, row0, p1.to(DTYPE), odd, True)
            store(out, below + 2 * HALF, row0, p2.to(DTYPE), even, True)
            store(out, below + 3 * HALF, row0, p3.to(DTYPE), odd, True)
        else:
            below = batch * n + row0
            store(out, below, col0, p0.to(DTYPE), even, False)
            store(out, below, col0 + HALF, p1.to(DTYPE), odd, False)
            store(out, below, col0 + 2 * HALF, p2.to(DTYPE), even, False)
            store(out, below, col0 + 3 * HALF, p3.to(DTYPE), odd, False)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_matrices"])
def product_kernel(
    a,  # (batch * n, k), or (batch * k, n) swapped: descriptor of blocks BLOCK/2 x BLOCK_K
    b,  # x^T: (batch * m, k), or (batch * k, m) swapped, of blocks BLOCK x BLOCK_K
    c,  # (batch * n, m): descriptor of blocks BLOCK/2 x BLOCK/2
    d,  # a itself, not swapped: for SHIFTED
    out,  # (batch * n, m), or (batch * m, n) with TRANSPOSE: of blocks BLOCK/2 x BLOCK/2
    alpha,  # fp32, or pointer to one per matrix
    beta,
    alpha_factor,  # fp32: of what a pointer points to
    beta_factor,
    shift,  # fp32
    n,  # a multiple of BLOCK
    m,  # a multiple of 2 * BLOCK
    k,  # a multiple of BLOCK_K
    num_matrices,
    HAS_C: gl.constexpr,
    SHIFTED: gl.constexpr,
    ALPHA_EACH: gl.constexpr,
    BETA_EACH: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    TRANSPOSE: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """``alpha * a (x + shift I) + beta * c``.

    To be launched as ``gluon_symmetric.symmetric_kernel`` is.
    """
    HALF: gl.constexpr = BLOCK // 2
    ring = new_ring(a, b, STAGES)
    blocks = gl.allocate_shared_memory(out.dtype, [4, HALF, HALF], out.layout)
    sizes = (n, m, k)
    num_tiles = n // BLOCK * (m // (2 * BLOCK)) * num_matrices
    scalars = (alpha, beta, alpha_factor, beta_factor, shift)
    gdc_wait()  # the kernel before has ended, and what it wrote is visible
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (
                _multiplier,
                (
                    out, c, d, scalars, ring, blocks, sizes, num_tiles, 0, HAS_C, SHIFTED,
                    ALPHA_EACH, BETA_EACH, A_SWAPPED, B_SWAPPED, TRANSPOSE, BLOCK, BLOCK_K, STAGES,
                    GROUP,
                ),
            ),
            (
                _multiplier,
                (
                    out, c, d, scalars, ring, blocks, sizes, num_tiles, 1, HAS_C, SHIFTED,
                    ALPHA_EACH, BETA_EACH, A_SWAPPED, B_SWAPPED, TRANSPOSE, BLOCK, BLOCK_K, STAGES,
                    GROUP,
                ),
            ),
            (
                _loader,
                (
                    a, b, c, d, ring, sizes, num_tiles, HAS_C, SHIFTED, A_SWAPPED, B_SWAPPED, BLOCK,
                    BLOCK_K, STAGES, GROUP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
