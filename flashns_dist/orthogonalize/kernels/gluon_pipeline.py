# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton's compiler reads this file)
"""What the Gluon kernels have in common: a ring of stages that one warp fills and others multiply.

A kernel's program computes tiles of ``BLOCK x 2 BLOCK`` (wide) or ``BLOCK x BLOCK`` of ``a b^T``.
One warp loads ahead whatever the others do, two warpgroups multiply and finish half a tile each,
which need not keep step with each other, and stores leave shared memory during the next tile. What
is added to a tile comes through the same stages.

The ring is ``(left, right, ready, free)``. A stage has two boxes of ``BLOCK/2 x BLOCK_K`` of ``a``
and two of ``BLOCK x BLOCK_K`` of ``b``, or as many squares of ``BLOCK/2`` of an addend (``BLOCK_K``
is ``BLOCK / 2``); a barrier that is completed when it is full, and one when both warpgroups have
given it back. Slots count the stages filled since the start.
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
def new_ring(a, b, STAGES: gl.constexpr):
    """Stages and barriers for descriptors ``a`` and ``b``."""
    left = gl.allocate_shared_memory(a.dtype, [2 * STAGES] + a.block_type.shape, a.layout)
    right = gl.allocate_shared_memory(b.dtype, [2 * STAGES] + b.block_type.shape, b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    return left, right, ready, free


@gluon.jit
def _load(source, batch, row0, k0, rows, k, barrier, destination, SWAPPED: gl.constexpr):
    if SWAPPED:
        tma.async_copy_global_to_shared(source, [batch * k + k0, row0], barrier, destination)
    else:
        tma.async_copy_global_to_shared(source, [batch * rows + row0, k0], barrier, destination)


@gluon.jit
def _slot(slot, ready, free, STAGES: gl.constexpr):
    """The stage that the loader fills next, once it is free, and the barrier to complete."""
    stage = slot % STAGES
    mbarrier.wait(free.index(stage), ((slot // STAGES) & 1) ^ 1)
    return stage, ready.index(stage)


@gluon.jit
def load_factors(
    a,
    b,
    ring,
    sizes,  # rows of a, of b, and what is summed over, for each matrix
    slot,
    batch,
    row0,
    col0,
    WIDE: gl.constexpr,
    ONCE: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills stages with what a tile is the product of; the next slot.

    ``ONCE`` if both factors are the same blocks: those of ``b`` alone.
    """
    left, right, ready, free = ring
    n, m, k = sizes
    HALF: gl.constexpr = BLOCK // 2
    BYTES: gl.constexpr = BLOCK * BLOCK_K * 2
    BOXES: gl.constexpr = (0 if ONCE else 1) + (2 if WIDE else 1)
    for k0 in range(0, k, BLOCK_K):
        stage, barrier = _slot(slot, ready, free, STAGES)
        mbarrier.expect(barrier, BOXES * BYTES)
        for half in gl.static_range(0 if ONCE else 2):
            _load(
                a, batch, row0 + half * HALF, k0, n, k, barrier, left.index(2 * stage + half),
                A_SWAPPED,
            )  # fmt: skip
        for half in gl.static_range(2 if WIDE else 1):
            _load(
                b, batch, col0 + half * BLOCK, k0, m, k, barrier, right.index(2 * stage + half),
                B_SWAPPED,
            )  # fmt: skip
        slot += 1
    return slot


@gluon.jit
def _squares(c, ring, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """The stages as squares of an addend: two and four of each."""
    left, right, _, _ = ring
    HALF: gl.constexpr = BLOCK // 2
    left_c = left._reinterpret(c.dtype, [2 * STAGES, HALF, HALF], c.layout)
    right_c = right._reinterpret(c.dtype, [4 * STAGES, HALF, HALF], c.layout)
    return left_c, right_c


@gluon.jit
def load_addend(
    c, ring, slot, row0, col0, WIDE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr
):
    """Fills one stage, or two if the tile is wide, with its part of ``c``; the next slot.

    Of a tile that is not wide, but for the square above the diagonal.
    """
    _, _, ready, free = ring
    left_c, right_c = _squares(c, ring, BLOCK, STAGES)
    HALF: gl.constexpr = BLOCK // 2
    BOX: gl.constexpr = HALF * HALF * 2
    stage, barrier = _slot(slot, ready, free, STAGES)
    mbarrier.expect(barrier, 6 * BOX if WIDE else 3 * BOX)
    for half in gl.static_range(2):
        for i in gl.static_range(2 if WIDE else 1 + half):
            tma.async_copy_global_to_shared(
                c, [row0 + half * HALF, col0 + i * HALF], barrier,
                right_c.index(4 * stage + 2 * half + i),
            )  # fmt: skip
        if WIDE:
            tma.async_copy_global_to_shared(
                c, [row0 + half * HALF, col0 + 2 * HALF], barrier, left_c.index(2 * stage + half)
            )
    slot += 1
    if WIDE:
        stage, barrier = _slot(slot, ready, free, STAGES)
        mbarrier.expect(barrier, 2 * BOX)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                c, [row0 + half * HALF, col0 + 3 * HALF], barrier, left_c.index(2 * stage + half)
            )
        slot += 1
    return slot


@gluon.jit
def multiply_half(
    ring,
    slot,
    steps,
    half: gl.constexpr,
    WIDE: gl.constexpr,
    ONCE: gl.constexpr,
    A_SWAPPED: gl.constexpr,
    B_SWAPPED: gl.constexpr,
    BLOCK: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The upper or lower half of a tile of ``a b^T``, in fp32, and the next slot.

    Of a tile that is not wide, as far as the square on the diagonal.
    """
    left, right, ready, free = ring
    COLS: gl.constexpr = 2 * BLOCK if WIDE else (1 + half) * (BLOCK // 2)
    BOTH: gl.constexpr = [BLOCK_K, 2 * BLOCK] if B_SWAPPED else [2 * BLOCK, BLOCK_K]
    pairs = right._reinterpret(right.dtype, [STAGES] + BOTH, right.layout)
    if ONCE:  # each box of b as two of a
        boxes = right._reinterpret(right.dtype, [4 * STAGES, BLOCK_K, BLOCK_K], left.layout)
    else:
        boxes = left
    EACH: gl.constexpr = 4 if ONCE else 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    acc = gl.zeros((BLOCK // 2, COLS), gl.float32, LAYOUT)
    for i in range(steps):
        stage = (slot + i) % STAGES
        first = boxes.index(EACH * stage + half)
        if A_SWAPPED:
            first = first.permute((1, 0))
        second = pairs.index(stage)
        if not WIDE:
            second = second.slice(0, COLS, dim=1 if B_SWAPPED else 0)
        if not B_SWAPPED:
            second = second.permute((1, 0))
        mbarrier.wait(ready.index(stage), ((slot + i) // STAGES) & 1)
        acc = warpgroup_mma(first, second, acc, use_acc=i > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index((slot + i + STAGES - 1) % STAGES), count=1, pred=i > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index((slot + steps + STAGES - 1) % STAGES), count=1)
    return acc, slot + steps


@gluon.jit
def halves(value):
    """The left and the right half of the columns."""
    ROWS: gl.constexpr = value.shape[0]
    COLS: gl.constexpr = value.shape[1] // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    first, second = value.reshape((ROWS, 2, COLS)).permute((0, 2, 1)).split()
    first = gl.convert_layout(first, LAYOUT, assert_trivial=True)
    second = gl.convert_layout(second, LAYOUT, assert_trivial=True)
    return first, second


@gluon.jit
def _release(barrier):
    """Gives back a stage that was read into registers.

    Without the fence the loader may fill it while reads are still on their way: an arrival waits
    for the threads, not for their loads.
    """
    fence_async_shared()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def add_one(p0, c, factor, ring, slot, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """The first square of a tile plus ``factor`` times that of an addend, and the next slot."""
    _, _, ready, free = ring
    _, right_c = _squares(c, ring, BLOCK, STAGES)
    stage = slot % STAGES
    mbarrier.wait(ready.index(stage), (slot // STAGES) & 1)
    p0 = _add(p0, right_c.index(4 * stage), factor)
    _release(free.index(stage))
    return p0, slot + 1


@gluon.jit
def add_two(p0, p1, c, factor, ring, slot, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """The lower squares of a tile plus ``factor`` times those of an addend, and the next slot."""
    _, _, ready, free = ring
    _, right_c = _squares(c, ring, BLOCK, STAGES)
    stage = slot % STAGES
    mbarrier.wait(ready.index(stage), (slot // STAGES) & 1)
    p0 = _add(p0, right_c.index(4 * stage + 2), factor)
    p1 = _add(p1, right_c.index(4 * stage + 3), factor)
    _release(free.index(stage))
    return p0, p1, slot + 1


@gluon.jit
def add_wide(
    p0, p1, p2, p3, c, factor, ring, slot, half: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Four squares of a wide tile plus ``factor`` times theirs of an addend, and the next slot."""
    _, _, ready, free = ring
    left_c, right_c = _squares(c, ring, BLOCK, STAGES)
    stage = slot % STAGES
    mbarrier.wait(ready.index(stage), (slot // STAGES) & 1)
    p0 = _add(p0, right_c.index(4 * stage + 2 * half), factor)
    p1 = _add(p1, right_c.index(4 * stage + 2 * half + 1), factor)
    p2 = _add(p2, left_c.index(2 * stage + half), factor)
    _release(free.index(stage))
    slot += 1
    stage = slot % STAGES
    mbarrier.wait(ready.index(stage), (slot // STAGES) & 1)
    p3 = _add(p3, left_c.index(2 * stage + half), factor)
    _release(free.index(stage))
    return p0, p1, p2, p3, slot + 1


@gluon.jit
def _add(value, block, factor):
    addend = block.load(value.type.layout).to(gl.float32)
    return gl.fma(addend, gl.full_like(addend, factor), value)


@gluon.jit
def store(out, row0, col0, value, block, TURNED: gl.constexpr):
    """Begins to store ``value``, when at most one other store still reads shared memory."""
    tma.store_wait(1)
    if TURNED:
        block.permute((1, 0)).store(value)
    else:
        block.store(value)
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row0, col0], block)


@gluon.jit
def scalar(value, factor, batch, PER_MATRIX: gl.constexpr):
    """A scalar argument: a float, or one fp32 value per matrix times a factor."""
    if PER_MATRIX:
        return gl.load(value + batch) * factor
    else:
        return value
