"""Runs the Gluon kernels in Python: a thread per partition, and torch tensors for memory.

What the hardware does asynchronously (loads, stores and products) happens as early as it may or as
late as it may, so that memory that is read before it is filled, or filled before it is read, shows
in the result. A stage that is given back although no fence followed what was read of it into
registers is an error, since the device may still be reading it then; so is a store of what was
written to shared memory with no fence after it. Layouts, the fence of the barriers and the compiler
are not simulated.
"""

import builtins
import threading
from types import FunctionType, SimpleNamespace

import torch

from flashns_dist.orthogonalize.kernels import gluon_pipeline, gluon_tiles

TIMEOUT = 30.0
"""Seconds after which a wait is taken for a deadlock."""

BLOCK, HALF = 32, 16
"""Rows of a tile, a quarter of the device's; and of a square, columns of a step."""

THREAD = threading.local()
"""Of a partition: stores under way; whether it read, or wrote, with no fence after it."""


class Tile(torch.Tensor):
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def split(self):
        """The two halves of the last dimension, which has two entries."""
        return self[..., 0], self[..., 1]


def tile(value):
    return value.as_subclass(Tile)


class Shared:
    """Shared memory, whose rows are cut into chunks as wide as a swizzled row."""

    layout = None

    def __init__(self, flat, shape, chunk, window=None, turned=False):
        self.flat, self.shape, self.chunk = flat, shape, chunk
        self.window, self.turned, self.dtype = window, turned, flat.dtype

    def index(self, i):
        size = self.flat.numel() // self.shape[0]
        assert 0 <= int(i) < self.shape[0]
        flat = self.flat[int(i) * size : (int(i) + 1) * size]
        return Shared(flat, self.shape[1:], self.chunk)

    def _reinterpret(self, dtype, shape, layout):
        assert dtype.itemsize == self.dtype.itemsize
        assert torch.Size(shape).numel() == self.flat.numel()
        return Shared(self.flat.view(dtype), list(shape), self.chunk)

    def slice(self, start, size, dim):
        return Shared(self.flat, self.shape, self.chunk, (dim, start, size), self.turned)

    def permute(self, order):
        assert order == (1, 0)
        return Shared(self.flat, self.shape, self.chunk, self.window, not self.turned)

    def _matrix(self):
        rows, cols = self.shape
        chunks = self.flat.view(cols // self.chunk, rows, self.chunk)
        return chunks.permute(1, 0, 2).reshape(rows, cols)

    def value(self):
        value = self._matrix()
        if self.window is not None:
            value = value.narrow(*self.window)
        return tile((value.mT if self.turned else value).clone())

    def load(self, layout):
        THREAD.reading = True
        return self.value()

    def store(self, value):
        THREAD.writing = True
        self.fill(value)

    def fill(self, value):
        assert self.window is None
        rows, cols = self.shape
        value = value.mT if self.turned else value
        assert value.shape == (rows, cols)
        assert value.dtype == self.dtype
        chunks = value.reshape(rows, cols // self.chunk, self.chunk).permute(1, 0, 2)
        self.flat.copy_(chunks.reshape(-1))


class Barrier:
    """An mbarrier, and the loads that have to complete it."""

    def __init__(self, condition):
        self.condition, self.loads = condition, []

    def start(self, count):
        self.count = self.missing = count
        self.phase, self.bytes = 0, 0

    def arrive(self, count, size=0):
        with self.condition:
            self.missing -= count
            self.bytes += size
            assert self.missing >= 0, "a barrier got more arrivals than it counts"
            self.settle()

    def load(self, run, size, late):
        with self.condition:
            if late:
                self.loads.append((run, size))
                self.condition.notify_all()  # who waits already runs it
            else:
                run()
                self.bytes -= size
                self.settle()

    def settle(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count
            self.condition.notify_all()

    def wait(self, parity):
        with self.condition:
            if self.phase % 2 != parity:
                return
            done = self.condition.wait_for(lambda: self._complete(parity), TIMEOUT)
            assert done, "deadlock"
            assert not self.condition.errors, "another partition failed"

    def _complete(self, parity):
        loads, self.loads = self.loads, []
        for run, size in loads:
            run()
            self.bytes -= size
        if loads:
            self.settle()
        return self.phase % 2 != parity or bool(self.condition.errors)


class Descriptor:
    """A matrix in global memory that is read and written by blocks."""

    def __init__(self, matrix, block):
        self.matrix, self.dtype, self.layout = matrix, matrix.dtype, None
        self.block_type = SimpleNamespace(shape=list(block))

    def block(self, at):
        rows, cols = self.block_type.shape
        row, col = (int(i) for i in at)
        assert 0 <= row <= self.matrix.shape[0] - rows
        assert 0 <= col <= self.matrix.shape[1] - cols
        return self.matrix[row : row + rows, col : col + cols]


class Pointer:
    def __init__(self, values, at=0):
        self.values, self.at = values, at

    def __add__(self, other):
        return Pointer(self.values, self.at + int(other))


class Sum:
    """Products that are under way."""

    def __init__(self, value):
        self.value, self.shape, self.waiting = value, value.shape, []

    def finish(self, left):
        while len(self.waiting) > left:
            first, second, use = self.waiting.pop(0)
            product = first.value().float() @ second.value().float()
            assert product.shape == self.shape
            self.value = product + self.value if use else product


def simulate_symmetric(module, a, b, c, out, scalars, *, stages, programs, late, swapped=(0, 0)):
    """``symmetric_kernel`` of ``gluon_symmetric`` for stacks of matrices; fills ``out``.

    Args:
        module: Of the kernel.
        a: ``(batch, n, k)``.
        b: The second factor's transpose, likewise.
        c: ``(batch, n, n)``, or None.
        out: The same.
        scalars: ``alpha, beta, gamma``: numbers, or ``(batch,)`` tensors.
        stages: ``STAGES``.
        programs: How many.
        late: Whether loads, products and stores happen late, a flag each.
        swapped: Whether ``a`` and ``b`` lie in memory transposed.
    """
    batch, n, k = a.shape
    target = square(out)
    each = [isinstance(scalar, torch.Tensor) for scalar in scalars]
    _simulate(
        module,
        "symmetric_kernel",
        (
            factor(a, swapped[0], HALF), factor(b, swapped[1], BLOCK),
            target if c is None else square(c), target, *map(pointer, scalars), 1.0, 1.0, 1.0,
            n, k, batch, c is not None, *each, a is b, *map(bool, swapped), BLOCK, HALF, stages, 2,
        ),
        programs,
        late,
    )  # fmt: skip


def simulate_product(module, a, x, c, out, scalars, *, transpose, programs, late, swapped=(0, 0)):
    """``product_kernel`` of ``gluon_product`` with four stages; see ``simulate_symmetric``.

    ``x`` is ``(batch, k, m)``, ``scalars`` are ``alpha, beta, shift``, and ``swapped`` is of ``a``
    and of ``x^T``.
    """
    batch, n, k = a.shape
    alpha, beta, shift = scalars
    target = square(out)
    _simulate(
        module,
        "product_kernel",
        (
            factor(a, swapped[0], HALF), factor(x.mT, swapped[1], BLOCK),
            target if c is None else square(c), square(a) if shift else target, target,
            pointer(alpha), pointer(beta), 1.0, 1.0, shift, n, x.shape[2], k, batch,
            c is not None, shift != 0, isinstance(alpha, torch.Tensor),
            isinstance(beta, torch.Tensor), *map(bool, swapped), transpose, BLOCK, HALF, 4, 2,
        ),
        programs,
        late,
    )  # fmt: skip


def factor(t, is_swapped, rows):
    t, box = (t.mT, (HALF, rows)) if is_swapped else (t, (rows, HALF))
    return Descriptor(t.reshape(-1, t.shape[-1]), box)


def square(t):
    assert t.is_contiguous()
    return Descriptor(t.view(-1, t.shape[-1]), (HALF, HALF))


def pointer(scalar):
    return Pointer(scalar) if isinstance(scalar, torch.Tensor) else scalar


def _simulate(module, kernel_name, arguments, programs, late):
    late_loads, late_products, late_stores = late
    lock = threading.Condition()
    lock.errors = []

    def load(source, at, barrier, destination):
        assert program.waited, "read before the kernel before has ended"
        value = source.block(at)
        assert list(destination.shape) == source.block_type.shape
        size = value.numel() * value.element_size()
        barrier.load(lambda: destination.fill(value), size, late_loads)

    def store(target, at, source):
        assert not getattr(THREAD, "writing", False), "stored before a fence"
        place = target.block(at)
        THREAD.stores = getattr(THREAD, "stores", [])
        THREAD.stores.append(lambda: place.copy_(source.value()))
        if not late_stores:
            store_wait(0)

    def store_wait(left):
        stores = getattr(THREAD, "stores", [])
        while len(stores) > left:
            stores.pop(0)()

    def fence():
        THREAD.reading = THREAD.writing = False

    def arrive(barrier, count, pred=True):
        assert not getattr(THREAD, "reading", False), "given back while it may still be read"
        if pred:
            barrier.arrive(count)

    def multiply(first, second, acc, use_acc, is_async):
        acc = acc if isinstance(acc, Sum) else Sum(acc)
        acc.waiting.append((first, second, bool(use_acc)))
        if not late_products:
            acc.finish(0)
        return acc

    def multiplied(left, deps):
        (acc,) = deps
        acc.finish(left)
        return acc if left else tile(acc.value)

    def allocate(dtype, shape, layout):
        if dtype is Barrier:
            barriers = [Barrier(lock) for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: barriers[int(i)])
        flat = torch.full((torch.Size(shape).numel(),), torch.nan, dtype=dtype)
        return Shared(flat, list(shape), HALF)

    def specialize(partitions, warps, registers):
        def run(function, arguments):
            try:
                function(*arguments)
            except BaseException as error:
                with lock:
                    lock.errors.append(error)
                    lock.notify_all()

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if lock.errors:
            raise lock.errors[0]

    def choose(condition, first, second):
        if isinstance(first, Tile) or isinstance(second, Tile):
            return torch.where(condition, first, second)
        return first if condition else second

    program = SimpleNamespace(now=0, waited=False)
    gl = SimpleNamespace(
        float32=torch.float32, int32=torch.int32, int64=Barrier, sqrt_rn=torch.sqrt,
        where=choose, static_range=range, full_like=torch.full_like,
        minimum=lambda x, y: torch.as_tensor(min(x, y)),
        maximum=lambda x, y: torch.as_tensor(max(x, y)),
        num_programs=lambda axis: programs, program_id=lambda axis: program.now,
        zeros=lambda shape, dtype, layout: tile(torch.zeros(shape, dtype=dtype)),
        arange=lambda start, stop, layout: tile(torch.arange(start, stop)),
        expand_dims=lambda value, dim: value.unsqueeze(dim),
        convert_layout=lambda value, layout, assert_trivial: value,
        fma=lambda x, y, z: x * y + z, load=lambda pointer: pointer.values[pointer.at].item(),
        NVMMADistributedLayout=lambda *_: None, SliceLayout=lambda *_: None,
        allocate_shared_memory=allocate, warp_specialize=specialize,
    )  # fmt: skip
    names = {
        "__builtins__": builtins,
        "gl": gl,
        "range": lambda *ends: map(torch.tensor, range(*map(int, ends))),
        "fence_async_shared": fence,
        "gdc_wait": lambda: setattr(program, "waited", True),
        "gdc_launch_dependents": lambda: None,
        "warpgroup_mma": multiply,
        "warpgroup_mma_wait": multiplied,
        "tma": SimpleNamespace(
            async_copy_global_to_shared=load,
            async_copy_shared_to_global=store,
            store_wait=store_wait,
        ),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: barrier.start(count),
            wait=lambda barrier, parity: barrier.wait(int(parity)),
            expect=lambda barrier, size: barrier.arrive(1, size),
            arrive=arrive,
        ),
    }
    for name, kernel in (vars(gluon_tiles) | vars(gluon_pipeline) | vars(module)).items():
        if hasattr(kernel, "fn"):
            names[name] = FunctionType(kernel.fn.__code__, names, name)

    for program.now in range(programs):
        program.waited = False
        names[kernel_name](*arguments)
