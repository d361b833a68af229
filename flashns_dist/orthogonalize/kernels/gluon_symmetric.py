# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton's compiler reads this file)
"""Gluon kernel of the products with a symmetric result, for Hopper's own tensor cores.

It computes what ``triton_symmetric`` computes, bit for bit, for matrices that whole tiles cover.
There, nothing hides the two stores of a wide tile, and the next tile's loads begin after them. Here
one warp loads ahead whatever the others do, two warpgroups multiply and finish half a tile each,
which need not keep step with each other, and stores leave shared memory during the next tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashns_dist.orthogonalize.kernels.gluon_tiles import square_at, squares_at, turns, wide_at


@gluon.jit
def _load(source, batch, row0, k0, n, k, barrier, destination, SWAPPED: gl.constexpr):
    if SWAPPED:
        tma.async_copy_global_to_shared(source, [batch * k + k0, row0], barrier, destination)
    else:
        tma.async_copy_global_to_shared(source, [batch * n + row0, k0], barrier, destination)


@gluon.jit
def _slot(slot, ready, free, STAGES: gl.constexpr):
    """The stage that the loader fills next, once it is free, and the barrier to complete."""
    stage = slot % STAGES
    mbarrier.wait(free.index(stage), ((slot // STAGES) & 1) ^ 1)
    return stage, ready.index(stage)


@gluon.jit
def _load_tile(
    a,
    b,
    c,
    buffers,
    sizes,
    slot,
    batch,
    row,
    col,
    WIDE: gl.constexpr,
    HAS_C: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills stages with what a tile is the product of, and one or two with its part of ``c``."""
    left, right, left_c, right_c, _, ready, free = buffers
    n, k, _ = sizes
    HALF: gl.constexpr = BLOCK // 2
    BYTES: gl.constexpr = BLOCK * BLOCK_K * 2
    BOX: gl.constexpr = HALF * HALF * 2
    row0 = row * BLOCK
    col0 = col * BLOCK
    for k0 in range(0, k, BLOCK_K):
        stage, barrier = _slot(slot, ready, free, STAGES)
        mbarrier.expect(barrier, 3 * BYTES if WIDE else 2 * BYTES)
        for half in gl.static_range(2):
            _load(
                a, batch, row0 + half * HALF, k0, n, k, barrier, left.index(2 * stage + half),
                A_SWAPPED,
            )  # fmt: skip
        for half in gl.static_range(2 if WIDE else 1):
            _load(
                b, batch, col0 + half * BLOCK, k0, n, k, barrier, right.index(2 * stage + half),
                B_SWAPPED,
            )  # fmt: skip
        slot += 1
    if HAS_C:
        row0 += batch * n
        stage, barrier = _slot(slot, ready, free, STAGES)
        mbarrier.expect(barrier, 6 * BOX if WIDE else 4 * BOX)
        for half in gl.static_range(2):
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    c, [row0 + half * HALF, col0 + i * HALF], barrier,
                    right_c.index(4 * stage + 2 * half + i),
                )  # fmt: skip
            if WIDE:
                tma.async_copy_global_to_shared(
                    c, [row0 + half * HALF, col0 + 2 * HALF], barrier,
                    left_c.index(2 * stage + half),
                )  # fmt: skip
        slot += 1
        if WIDE:
            stage, barrier = _slot(slot, ready, free, STAGES)
            mbarrier.expect(barrier, 2 * BOX)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    c, [row0 + half * HALF, col0 + 3 * HALF], barrier,
                    left_c.index(2 * stage + half),
                )  # fmt: skip
            slot += 1
    return slot


@gluon.jit
def _loader(
    a,
    b,
    c,
    buffers,
    sizes,
    HAS_C: gl.constexpr,
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
            a, b, c, buffers, sizes, slot, batch, row, col, True, HAS_C, A_SWAPPED, B_SWAPPED,
            BLOCK, BLOCK_K, STAGES,
        )  # fmt: skip
    for turn in range(start, stop, gl.num_programs(0)):
        first, last = squares_at(turn, wide, squares, doubled)
        for square in range(first, last):
            batch, row = square_at(square, num_blocks)
            slot = _load_tile(
                a, b, c, buffers, sizes, slot, batch, row, row, False, HAS_C, A_SWAPPED, B_SWAPPED,
                BLOCK, BLOCK_K, STAGES,
            )  # fmt: skip


@gluon.jit
def _sum(
    buffers,
    slot,
    steps,
    half: gl.constexpr,
    COLS: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The upper or lower ``(BLOCK / 2, COLS)`` of a tile of ``a b^T``, in fp32."""
    left, right, _, _, _, ready, free = buffers
    BOTH: gl.constexpr = [BLOCK_K, 2 * BLOCK] if B_SWAPPED else [2 * BLOCK, BLOCK_K]
    pairs = right._reinterpret(right.dtype, [STAGES] + BOTH, right.layout)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    acc = gl.zeros((BLOCK // 2, COLS), gl.float32, LAYOUT)
    for i in range(steps):
        stage = (slot + i) % STAGES
        first = left.index(2 * stage + half)
        if A_SWAPPED:
            first = first.permute((1, 0))
        second = pairs.index(stage)
        if COLS == BLOCK:
            second = second.slice(0, BLOCK, dim=1 if B_SWAPPED else 0)
        if not B_SWAPPED:
            second = second.permute((1, 0))
        mbarrier.wait(ready.index(stage), ((slot + i) // STAGES) & 1)
        acc = warpgroup_mma(first, second, acc, use_acc=i > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index((slot + i + STAGES - 1) % STAGES), count=1, pred=i > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index((slot + steps + STAGES - 1) % STAGES), count=1)
    return acc


@gluon.jit
def _halves(value):
    """The left and the right half of the columns."""
    ROWS: gl.constexpr = value.shape[0]
    COLS: gl.constexpr = value.shape[1] // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    first, second = value.reshape((ROWS, 2, COLS)).permute((0, 2, 1)).split()
    first = gl.convert_layout(first, LAYOUT, assert_trivial=True)
    second = gl.convert_layout(second, LAYOUT, assert_trivial=True)
    return first, second


@gluon.jit
def _store(out, row0, col0, value, block, TURNED: gl.constexpr):
    """Begins to store ``value``, when at most one other store still reads shared memory."""
    tma.store_wait(1)
    if TURNED:
        block.permute((1, 0)).store(value)
    else:
        block.store(value)
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row0, col0], block)


@gluon.jit
def _finish(out, acc, old, scalars, blocks, base, row0, col0, HAS_C: gl.constexpr):
    """Scales, adds and rounds once a square; written twice, or on the diagonal mirrored in place.

    Above the diagonal it is another's mirror image. Stores read the two blocks of shared memory in
    turn, and the second last.
    """
    if col0 <= row0:
        alpha, beta, gamma = scalars
        DTYPE: gl.constexpr = out.dtype
        LAYOUT: gl.constexpr = acc.type.layout
        SIZE: gl.constexpr = acc.shape[0]
        result = acc * alpha
        if HAS_C:
            addend = old.to(gl.float32)
            result = gl.fma(addend, gl.zeros_like(addend) + beta, result)
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
            _store(out, base + row0, col0, value, blocks[0], False)
            _store(out, base + col0, row0, value, blocks[1], True)


@gluon.jit
def _release(barrier):
    """Gives back a stage that was read into registers.

    Without the fence the loader may fill it while reads are still on their way: an arrival waits
    for the threads, not for their loads.
    """
    fence_async_shared()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _scalar(value, factor, batch, PER_MATRIX: gl.constexpr):
    if PER_MATRIX:
        return gl.load(value + batch) * factor
    else:
        return value


@gluon.jit
def _multiply_tile(
    out,
    scalars,
    factors,
    buffers,
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
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiplies and finishes half a tile, in squares of ``BLOCK / 2``."""
    _, _, left_c, right_c, blocks, ready, free = buffers
    n, k, _ = sizes
    HALF: gl.constexpr = BLOCK // 2
    COLS: gl.constexpr = 2 * BLOCK if WIDE else BLOCK
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    row0 = row * BLOCK + half * HALF
    col0 = col * BLOCK
    base = batch * n
    every = (
        _scalar(scalars[0], factors[0], batch, ALPHA_EACH),
        _scalar(scalars[1], factors[1], batch, BETA_EACH),
        _scalar(scalars[2], factors[2], batch, GAMMA_EACH),
    )
    blocks = (blocks.index(2 * half), blocks.index(2 * half + 1))
    acc = _sum(
        buffers, slot, k // BLOCK_K, half, COLS, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES
    )
    slot += k // BLOCK_K
    first, second = _halves(acc)
    if WIDE:
        p0, p1 = _halves(first)
        p2, p3 = _halves(second)
    else:
        p0, p1 = first, second
    if HAS_C:
        stage = slot % STAGES
        mbarrier.wait(ready.index(stage), (slot // STAGES) & 1)
        c0 = right_c.index(4 * stage + 2 * half).load(LAYOUT)
        c1 = right_c.index(4 * stage + 2 * half + 1).load(LAYOUT)
        if WIDE:
            c2 = left_c.index(2 * stage + half).load(LAYOUT)
        _release(free.index(stage))
        slot += 1
        if WIDE:
            stage = slot % STAGES
            mbarrier.wait(ready.index(stage), (slot // STAGES) & 1)
            c3 = left_c.index(2 * stage + half).load(LAYOUT)
            _release(free.index(stage))
            slot += 1
    else:
        c0, c1 = None, None
        if WIDE:
            c2, c3 = None, None
    _finish(out, p0, c0, every, blocks, base, row0, col0, HAS_C)
    _finish(out, p1, c1, every, blocks, base, row0, col0 + HALF, HAS_C)
    if WIDE:
        _finish(out, p2, c2, every, blocks, base, row0, col0 + 2 * HALF, HAS_C)
        _finish(out, p3, c3, every, blocks, base, row0, col0 + 3 * HALF, HAS_C)
    return slot


@gluon.jit
def _multiplier(
    out,
    scalars,
    factors,
    buffers,
    sizes,
    half: gl.constexpr,
    HAS_C: gl.constexpr,
    ALPHA_EACH: gl.constexpr,
    BETA_EACH: gl.constexpr,
    GAMMA_EACH: gl.constexpr,
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
            out, scalars, factors, buffers, sizes, slot, batch, row, col, half, True, HAS_C,
            ALPHA_EACH, BETA_EACH, GAMMA_EACH, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES,
        )  # fmt: skip
    for turn in range(start, stop, gl.num_programs(0)):
        first, last = squares_at(turn, wide, squares, doubled)
        for square in range(first, last):
            batch, row = square_at(square, num_blocks)
            slot = _multiply_tile(
                out, scalars, factors, buffers, sizes, slot, batch, row, row, half, False, HAS_C,
                ALPHA_EACH, BETA_EACH, GAMMA_EACH, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES,
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
    left = gl.allocate_shared_memory(a.dtype, [2 * STAGES] + a.block_type.shape, a.layout)
    right = gl.allocate_shared_memory(b.dtype, [2 * STAGES] + b.block_type.shape, b.layout)
    left_c = left._reinterpret(out.dtype, [2 * STAGES, HALF, HALF], out.layout)
    right_c = right._reinterpret(out.dtype, [4 * STAGES, HALF, HALF], out.layout)
    blocks = gl.allocate_shared_memory(out.dtype, [4, HALF, HALF], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    buffers = (left, right, left_c, right_c, blocks, ready, free)
    sizes = (n, k, num_matrices)
    scalars = (alpha, beta, gamma)
    factors = (alpha_factor, beta_factor, gamma_factor)
    gl.warp_specialize(
        [
            (
                _multiplier,
                (
                    out, scalars, factors, buffers, sizes, 0, HAS_C, ALPHA_EACH, BETA_EACH,
                    GAMMA_EACH, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES, GROUP,
                ),
            ),
            (
                _multiplier,
                (
                    out, scalars, factors, buffers, sizes, 1, HAS_C, ALPHA_EACH, BETA_EACH,
                    GAMMA_EACH, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES, GROUP,
                ),
            ),
            (
                _loader,
                (
                    a, b, c, buffers, sizes, HAS_C, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES,
                    GROUP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
