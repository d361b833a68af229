# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102 (Triton's compiler reads this file)
"""Gluon kernel of the products with a symmetric result, for Hopper's own tensor cores.

It computes what ``triton_symmetric`` computes, bit for bit, for matrices that whole tiles cover.
There, nothing hides the two stores of a wide tile, and the next tile's loads begin after them. Here
one warp loads ahead whatever the others do, and stores leave shared memory while the next tile is
being multiplied.
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


@gluon.jit
def _wide_in_order(t, num_blocks):
    """Block row and pair of block columns of wide tile ``t``, two block rows at a time.

    Block rows ``2 g`` and ``2 g + 1`` hold ``g`` and ``g + 1`` wide tiles, hence those before them
    ``g^2``. (Exact below 2^22 tiles.)
    """
    g = gl.sqrt_rn(t.to(gl.float32)).to(gl.int32)
    local = t - g * g
    both = 2 * g + 1 < num_blocks
    row = 2 * g + gl.where(both, 1 - local % 2, 0)
    return row, gl.where(both, local // 2, local)


@gluon.jit
def wide_tile(t, num_blocks, GROUP: gl.constexpr):
    """The same in an order in which tiles that run together read few different panels.

    ``GROUP`` block rows at a time (an even number), and inside a group columns change slowest.
    """
    first = gl.sqrt_rn(t.to(gl.float32)).to(gl.int32) // (GROUP // 2) * (GROUP // 2)
    height = gl.minimum(GROUP, num_blocks - 2 * first)
    local = t - first * first
    rest = local - height * first
    corner_row, corner_col = _wide_in_order(gl.maximum(rest, 0), height)
    row = 2 * first + gl.where(rest >= 0, corner_row, local % height)
    return row, gl.where(rest >= 0, first + corner_col, local // height)


@gluon.jit
def _tile(turn, j, num_blocks, num_matrices, GROUP: gl.constexpr):
    """Tile ``j`` of a program's turn: how many there are, whether it is wide, and where it is.

    First come wide tiles, ``BLOCK x 2 BLOCK``, of which the last in an odd block row ends on the
    diagonal; then the squares on the diagonal of even block rows. Programs that get one wide tile
    less than others take two squares instead, as long as there are squares.
    """
    pairs = num_blocks // 2
    wide_each = pairs * (pairs + num_blocks % 2)
    squares_each = (num_blocks + 1) // 2
    num_wide = wide_each * num_matrices
    num_squares = squares_each * num_matrices
    programs = gl.num_programs(0)
    doubled = (programs - num_wide % programs) % programs
    doubled = gl.minimum(doubled, (num_squares + 1) // 2)
    late = turn - num_wide
    square = gl.where(late < doubled, 2 * late, late + doubled)
    count = gl.where(late < doubled, gl.minimum(2, num_squares - square), 1)
    wide = late < 0
    t = gl.where(wide, turn, square + j)
    each = gl.where(wide, wide_each, squares_each)
    batch = t // each
    t = t % each
    row, col = wide_tile(t, num_blocks, GROUP)
    row = gl.where(wide, row, 2 * t)
    col = gl.where(wide, col, t)
    turns = num_wide + doubled + gl.maximum(num_squares - 2 * doubled, 0)
    return turns, gl.where(wide, 1, count), wide, batch, row, 2 * col


@gluon.jit
def _load(source, batch, row0, k0, n, k, barrier, destination, SWAPPED: gl.constexpr):
    if SWAPPED:
        tma.async_copy_global_to_shared(source, [batch * k + k0, row0], barrier, destination)
    else:
        tma.async_copy_global_to_shared(source, [batch * n + row0, k0], barrier, destination)


@gluon.jit
def _loader(
    a,
    b,
    buffers,
    sizes,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One warp: fills stage after stage as the multipliers free them."""
    left, right, _, ready, free, _ = buffers
    n, k, num_matrices = sizes
    num_blocks = n // BLOCK
    BYTES: gl.constexpr = BLOCK * BLOCK_K * 2
    turns, _, _, _, _, _ = _tile(0, 0, num_blocks, num_matrices, GROUP)
    step = 0
    for turn in range(gl.program_id(0), turns, gl.num_programs(0)):
        _, count, _, _, _, _ = _tile(turn, 0, num_blocks, num_matrices, GROUP)
        for j in range(count):
            _, _, wide, batch, row, col = _tile(turn, j, num_blocks, num_matrices, GROUP)
            for k0 in range(0, k, BLOCK_K):
                stage = step % STAGES
                barrier = ready.index(stage)
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                if wide:
                    mbarrier.expect(barrier, 3 * BYTES)
                else:
                    mbarrier.expect(barrier, 2 * BYTES)
                _load(a, batch, row * BLOCK, k0, n, k, barrier, left.index(stage), A_SWAPPED)
                _load(b, batch, col * BLOCK, k0, n, k, barrier, right.index(2 * stage), B_SWAPPED)
                if wide:
                    _load(
                        b, batch, (col + 1) * BLOCK, k0, n, k, barrier, right.index(2 * stage + 1),
                        B_SWAPPED,
                    )  # fmt: skip
                step += 1


@gluon.jit
def _sum(
    c,
    buffers,
    step,
    steps,
    c_row,
    c_col,
    COLS: gl.constexpr,
    HAS_C: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One ``(BLOCK, COLS)`` tile of ``a b^T`` in fp32; meanwhile ``c`` is loaded."""
    left, right, blocks, ready, free, c_ready = buffers
    BOTH: gl.constexpr = [BLOCK_K, 2 * BLOCK] if B_SWAPPED else [2 * BLOCK, BLOCK_K]
    pairs = right._reinterpret(right.dtype, [STAGES] + BOTH, right.layout)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLS, 16])
    acc = gl.zeros((BLOCK, COLS), gl.float32, LAYOUT)
    for i in range(steps):
        stage = (step + i) % STAGES
        first = left.index(stage)
        if A_SWAPPED:
            first = first.permute((1, 0))
        second = pairs.index(stage)
        if COLS == BLOCK:
            second = second.slice(0, BLOCK, dim=1 if B_SWAPPED else 0)
        if not B_SWAPPED:
            second = second.permute((1, 0))
        mbarrier.wait(ready.index(stage), ((step + i) // STAGES) & 1)
        acc = warpgroup_mma(first, second, acc, use_acc=i > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index((step + i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        if HAS_C:
            if i == 1:
                tma.store_wait(0)
                mbarrier.expect(c_ready, BLOCK * COLS * 2)
                tma.async_copy_global_to_shared(c, [c_row, c_col], c_ready, blocks.index(0))
                if COLS > BLOCK:
                    tma.async_copy_global_to_shared(
                        c, [c_row, c_col + BLOCK], c_ready, blocks.index(1)
                    )
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index((step + steps + STAGES - 1) % STAGES), count=1)
    return acc


@gluon.jit
def _scaled(acc, c_block, alpha, beta, HAS_C: gl.constexpr):
    result = acc * alpha
    if HAS_C:
        old = c_block.load(acc.type.layout).to(gl.float32)
        result = gl.fma(old, gl.zeros_like(old) + beta, result)
    return result


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
def _finish(out, result, blocks, gamma, base, row0, col0, DTYPE: gl.constexpr, BLOCK: gl.constexpr):
    """Adds ``gamma * I`` and rounds once; written twice, or mirrored in place.

    Stores read the two blocks of shared memory in turn, and the second last.
    """
    if row0 == col0:
        LAYOUT: gl.constexpr = result.type.layout
        r = gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT)), 1)
        s = gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT)), 0)
        value = gl.where(r == s, result + gamma, result).to(DTYPE)
        block = blocks.index(1)
        tma.store_wait(0)
        block.store(value)
        value = gl.where(r >= s, value, block.permute((1, 0)).load(LAYOUT))
        block.store(value)
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [base + row0, col0], block)
    else:
        value = result.to(DTYPE)
        _store(out, base + row0, col0, value, blocks.index(0), False)
        _store(out, base + col0, row0, value, blocks.index(1), True)


@gluon.jit
def _scalar(value, factor, batch, PER_MATRIX: gl.constexpr):
    if PER_MATRIX:
        return gl.load(value + batch) * factor
    else:
        return value


@gluon.jit
def _multipliers(
    c,
    out,
    scalars,
    factors,
    buffers,
    sizes,
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
    """Two warpgroups: multiply and finish tile after tile."""
    _, _, blocks, _, _, c_ready = buffers
    n, k, num_matrices = sizes
    num_blocks = n // BLOCK
    DTYPE: gl.constexpr = out.dtype
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK, 16])
    steps = k // BLOCK_K
    turns, _, _, _, _, _ = _tile(0, 0, num_blocks, num_matrices, GROUP)
    done = 0
    for turn in range(gl.program_id(0), turns, gl.num_programs(0)):
        _, count, _, _, _, _ = _tile(turn, 0, num_blocks, num_matrices, GROUP)
        for j in range(count):
            _, _, wide, batch, row, col = _tile(turn, j, num_blocks, num_matrices, GROUP)
            row0 = row * BLOCK
            col0 = col * BLOCK
            base = batch * n
            alpha = _scalar(scalars[0], factors[0], batch, ALPHA_EACH)
            beta = _scalar(scalars[1], factors[1], batch, BETA_EACH)
            gamma = _scalar(scalars[2], factors[2], batch, GAMMA_EACH)
            if wide:
                acc = _sum(
                    c, buffers, done * steps, steps, base + row0, col0, 2 * BLOCK, HAS_C,
                    A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES,
                )  # fmt: skip
                first, second = acc.reshape((BLOCK, 2, BLOCK)).permute((0, 2, 1)).split()
                first = gl.convert_layout(first, LAYOUT, assert_trivial=True)
                second = gl.convert_layout(second, LAYOUT, assert_trivial=True)
                if HAS_C:
                    mbarrier.wait(c_ready, done & 1)
                first = _scaled(first, blocks.index(0), alpha, beta, HAS_C)
                second = _scaled(second, blocks.index(1), alpha, beta, HAS_C)
                _finish(out, first, blocks, gamma, base, row0, col0, DTYPE, BLOCK)
                _finish(out, second, blocks, gamma, base, row0, col0 + BLOCK, DTYPE, BLOCK)
            else:
                square = _sum(
                    c, buffers, done * steps, steps, base + row0, col0, BLOCK, HAS_C,
                    A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES,
                )  # fmt: skip
                if HAS_C:
                    mbarrier.wait(c_ready, done & 1)
                square = _scaled(square, blocks.index(0), alpha, beta, HAS_C)
                _finish(out, square, blocks, gamma, base, row0, col0, DTYPE, BLOCK)
            done += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_matrices"])
def symmetric_kernel(
    a,  # (batch * n, k), or (batch * k, n) swapped: descriptor of blocks BLOCK x BLOCK_K
    b,  # the second factor's transpose, likewise
    c,  # (batch * n, n): descriptor of blocks BLOCK x BLOCK; only the lower triangle is read
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

    To be launched with 8 warps and as many programs as there are SMs. A program takes
    ``STAGES * 3 * BLOCK * BLOCK_K + 2 * BLOCK^2`` elements of shared memory.
    """
    left = gl.allocate_shared_memory(a.dtype, [STAGES] + a.block_type.shape, a.layout)
    right = gl.allocate_shared_memory(b.dtype, [2 * STAGES] + b.block_type.shape, b.layout)
    blocks = gl.allocate_shared_memory(out.dtype, [2, BLOCK, BLOCK], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    c_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    mbarrier.init(c_ready, count=1)
    fence_async_shared()
    buffers = (left, right, blocks, ready, free, c_ready)
    sizes = (n, k, num_matrices)
    scalars = (alpha, beta, gamma)
    factors = (alpha_factor, beta_factor, gamma_factor)
    gl.warp_specialize(
        [
            (
                _multipliers,
                (
                    c, out, scalars, factors, buffers, sizes, HAS_C, ALPHA_EACH, BETA_EACH,
                    GAMMA_EACH, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES, GROUP,
                ),
            ),
            (
                _loader,
                (
                    a, b, buffers, sizes, A_SWAPPED, B_SWAPPED, BLOCK, BLOCK_K, STAGES, GROUP,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
