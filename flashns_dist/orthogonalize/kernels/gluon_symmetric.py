# mypy: ignore-errors
"""Gluon kernel of the products with a symmetric result, for Hopper's own tensor cores.

It computes what ``triton_symmetric`` computes, bit for bit, for matrices that whole tiles cover.
There, nothing hides the two stores of a wide tile, and the next tile's loads begin after them; here
see ``gluon_pipeline``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashns_dist.orthogonalize.kernels.gluon_pipeline import (
    add_one,
    add_two,
    add_wide,
    halves,
    load_addend,
    load_factors,
    multiply_half,
    new_ring,
    scalar,
    store,
)
from flashns_dist.orthogonalize.kernels.gluon_tiles import square_at, squares_at, turns, wide_at


@gluon.jit
def _load_tile(
    a,
    b,
    c,
    ring,
    sizes,
    slot,
    batch,
    row,
    col,
    WIDE: gl.constexpr,
    HAS_C: gl.constexpr,
    SAME: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    n, k, _ = sizes
    row0 = row * BLOCK
    col0 = col * BLOCK
    slot = load_factors(
        a, b, ring, (n, n, k), slot, batch, row0, col0, WIDE, SAME and not WIDE, A_SWAPPED,
        B_SWAPPED, BLOCK, BLOCK_K, STAGES,
    )  # fmt: skip
    if HAS_C:
        slot = load_addend(c, ring, slot, batch * n + row0, col0, WIDE, BLOCK, STAGES)
    return slot


@gluon.jit
def _loader(
    a,
    b,
    c,
    ring,
    sizes,
    HAS_C: gl.constexpr,
    SAME: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One warp: fills stage after stage as both multipliers free them."""
    n, _, num_matrices = sizes
    num_blocks = n // BLOCK
    wide, squares, doubled, start, stop = turns(num_blocks, num_matrices)
    slot = 0
    for turn in range(gl.program_id(0), wide, gl.num_programs(0)):
        batch, row, col = wide_at(turn, num_blocks, GROUP)
        slot = _load_tile(
            a, b, c, ring, sizes, slot, batch, row, col, True, HAS_C, SAME, A_SWAPPED, B_SWAPPED,
            BLOCK, BLOCK_K, STAGES,
        )  # fmt: skip
    for turn in range(start, stop, gl.num_programs(0)):
        first, last = squares_at(turn, wide, squares, doubled)
        for square in range(first, last):
            batch, row = square_at(square, num_blocks)
            slot = _load_tile(
                a, b, c, ring, sizes, slot, batch, row, row, False, HAS_C, SAME, A_SWAPPED,
                B_SWAPPED, BLOCK, BLOCK_K, STAGES,
            )  # fmt: skip


@gluon.jit
def _finish(out, result, gamma, blocks, base, row0, col0):
    """Adds to the diagonal and rounds; written twice, or on the diagonal mirrored in place.

    Above the diagonal it is another's mirror image. Stores read the two blocks of shared memory in
    turn, and the second last.
    """
    if col0 <= row0:
        DTYPE: gl.constexpr = out.dtype
        LAYOUT: gl.constexpr = result.type.layout
        SIZE: gl.constexpr = result.shape[0]
        if row0 == col0:
            r = gl.expand_dims(gl.arange(0, SIZE, layout=gl.SliceLayout(1, LAYOUT)), 1)
            s = gl.expand_dims(gl.arange(0, SIZE, layout=gl.SliceLayout(0, LAYOUT)), 0)
            value = gl.where(r == s, result + gamma, result).to(DTYPE)
            block = blocks[1]
            tma.store_wait(0)
            block.store(value)
            value = gl.where(r >= s, value, block.permute((1, 0)).load(LAYOUT))
            block.store(value)
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [base + row0, col0], block)
        else:
            value = result.to(DTYPE)
            store(out, base + row0, col0, value, blocks[0], False)
            store(out, base + col0, row0, value, blocks[1], True)


@gluon.jit
def _multiply_tile(
    out,
    c,
    scalars,
    factors,
    ring,
    blocks,
    sizes,
    slot,
    batch,
    row,
    col,
    half: gl.constexpr,
    WIDE: gl.constexpr,
    HAS_C: gl.constexpr,
    ALPHA_EACH: gl.constexpr,
    BETA_EACH: gl.constexpr,
    GAMMA_EACH: gl.constexpr,
    SAME: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiplies and finishes half a tile, in squares of ``BLOCK / 2``."""
    n, k, _ = sizes
    HALF: gl.constexpr = BLOCK // 2
    row0 = row * BLOCK + half * HALF
    col0 = col * BLOCK
    base = batch * n
    alpha = scalar(scalars[0], factors[0], batch, ALPHA_EACH)
    beta = scalar(scalars[1], factors[1], batch, BETA_EACH)
    gamma = scalar(scalars[2], factors[2], batch, GAMMA_EACH)
    mine = (blocks.index(2 * half), blocks.index(2 * half + 1))
    acc, slot = multiply_half(
        ring, slot, k // BLOCK_K, half, WIDE, SAME and not WIDE, A_SWAPPED, B_SWAPPED, BLOCK,
        BLOCK_K, STAGES,
    )  # fmt: skip
    acc = acc * alpha
    if WIDE:
        first, second = halves(acc)
        p0, p1 = halves(first)
        p2, p3 = halves(second)
        if HAS_C:
            p0, p1, p2, p3, slot = add_wide(
                p0, p1, p2, p3, c, beta, ring, slot, half, BLOCK, STAGES
            )
        _finish(out, p0, gamma, mine, base, row0, col0)
        _finish(out, p1, gamma, mine, base, row0, col0 + HALF)
        _finish(out, p2, gamma, mine, base, row0, col0 + 2 * HALF)
        _finish(out, p3, gamma, mine, base, row0, col0 + 3 * HALF)
    elif half == 0:
        if HAS_C:
            acc, slot = add_one(acc, c, beta, ring, slot, BLOCK, STAGES)
        _finish(out, acc, gamma, mine, base, row0, col0)
    else:
        p0, p1 = halves(acc)
        if HAS_C:
            p0, p1, slot = add_two(p0, p1, c, beta, ring, slot, BLOCK, STAGES)
        _finish(out, p0, gamma, mine, base, row0, col0)
        _finish(out, p1, gamma, mine, base, row0, col0 + HALF)
    return slot


@gluon.jit
def _multiplier(
    out,
    c,
    scalars,
    factors,
    ring,
    blocks,
    sizes,
    half: gl.constexpr,
    HAS_C: gl.constexpr,
    ALPHA_EACH: gl.constexpr,
    BETA_EACH: gl.constexpr,
    GAMMA_EACH: gl.constexpr,
    SAME: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One warpgroup: the upper or lower half of tile after tile.

    Wide tiles and squares are loops of their own: in one, the compiler joins the ends of both, and
    has no registers left to keep more than one product in flight.
    """
    n, _, num_matrices = sizes
    num_blocks = n // BLOCK
    wide, squares, doubled, start, stop = turns(num_blocks, num_matrices)
    slot = 0
    for turn in range(gl.program_id(0), wide, gl.num_programs(0)):
        batch, row, col = wide_at(turn, num_blocks, GROUP)
        slot = _multiply_tile(
            out, c, scalars, factors, ring, blocks, sizes, slot, batch, row, col, half, True, HAS_C,
            ALPHA_EACH, BETA_EACH, GAMMA_EACH, SAME, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES,
        )  # fmt: skip
    for turn in range(start, stop, gl.num_programs(0)):
        first, last = squares_at(turn, wide, squares, doubled)
        for square in range(first, last):
            batch, row = square_at(square, num_blocks)
            slot = _multiply_tile(
                out, c, scalars, factors, ring, blocks, sizes, slot, batch, row, row, half, False,
                HAS_C, ALPHA_EACH, BETA_EACH, GAMMA_EACH, SAME, A_SWAPPED, B_SWAPPED, BLOCK,
                BLOCK_K, STAGES,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_matrices"])
def symmetric_kernel(
    a,  # (batch * n, k), or (batch * k, n) swapped: descriptor of blocks BLOCK/2 x BLOCK_K
    b,  # the second factor's transpose, likewise, of blocks BLOCK x BLOCK_K
    c,  # (batch * n, n): descriptor of blocks BLOCK/2 x BLOCK/2; upper triangles do not matter
    out,  # (batch * n, n): the same
    alpha,  # fp32, or pointer to one per matrix
    beta,
    gamma,
    alpha_factor,  # fp32: of what a pointer points to
    beta_factor,
    gamma_factor,
    n,  # a multiple of BLOCK
    k,  # a multiple of BLOCK_K, at least twice that
    num_matrices,
    HAS_C: gl.constexpr,
    ALPHA_EACH: gl.constexpr,
    BETA_EACH: gl.constexpr,
    GAMMA_EACH: gl.constexpr,
    SAME: gl.constexpr,  # whether b is a
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """``alpha * a b^T + beta * c + gamma * I``, of which the lower triangle is computed.

    To be launched with 4 warps and as many programs as there are SMs; ``BLOCK_K`` is ``BLOCK / 2``.
    A program takes ``STAGES * 3 * BLOCK * BLOCK_K + BLOCK^2`` elements of shared memory.
    """
    HALF: gl.constexpr = BLOCK // 2
    ring = new_ring(a, b, STAGES)
    blocks = gl.allocate_shared_memory(out.dtype, [4, HALF, HALF], out.layout)
    sizes = (n, k, num_matrices)
    scalars = (alpha, beta, gamma)
    factors = (alpha_factor, beta_factor, gamma_factor)
    gdc_wait()  # the kernel before has ended, and what it wrote is visible
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (
                _multiplier,
                (
                    out, c, scalars, factors, ring, blocks, sizes, 0, HAS_C, ALPHA_EACH, BETA_EACH,
                    GAMMA_EACH, SAME, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES, GROUP,
                ),
            ),
            (
                _multiplier,
                (
                    out, c, scalars, factors, ring, blocks, sizes, 1, HAS_C, ALPHA_EACH, BETA_EACH,
                    GAMMA_EACH, SAME, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES, GROUP,
                ),
            ),
            (
                _loader,
                (
                    a, b, c, ring, sizes, HAS_C, SAME, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES,
                    GROUP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
