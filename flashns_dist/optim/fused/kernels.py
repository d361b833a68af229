# mypy: ignore-errors
"""Triton kernels over a table of pieces of memory.

A row of the table is ``(elements, columns, number of the one memory, offset, row stride, number of
the other, offset, row stride)``; the memories' addresses are in tables of their own, which change
from step to step. Products and sums round one by one, as torch's separate operations do (launched
with ``enable_fp_fusion=False``), so that it does not matter which of the two a piece takes.
"""

import triton
import triton.language as tl


@triton.jit
def _locate(
    table, chunk_piece, chunk_start, FLAT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """The chunk's piece, and where its elements lie in both memories.

    What is known to be a multiple lets the compiler load 16 bytes at a time.
    """
    pid = tl.program_id(0)
    piece = tl.load(chunk_piece + pid).to(tl.int64)
    row = table + 8 * piece
    index = tl.multiple_of(tl.load(chunk_start + pid), BLOCK) + tl.arange(0, BLOCK)
    numel = tl.load(row).to(tl.int32)
    mask = index < (tl.multiple_of(numel, 16) if ALIGNED else numel)
    if FLAT:
        one = index
        other = index
    else:
        cols = tl.load(row + 1).to(tl.int32)
        r = (index // cols).to(tl.int64)
        c = index % cols
        one = r * tl.load(row + 4) + c
        other = r * tl.load(row + 7) + c
        if ALIGNED:
            one = tl.max_contiguous(tl.multiple_of(one, 8), 8)
            other = tl.max_contiguous(tl.multiple_of(other, 8), 8)
    return piece, row, one, other, mask


@triton.jit
def _pointer(address, offset, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE)) + offset
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def momentum_kernel(
    table,  # (pieces, 8) int64: parameters, then buffers (-1: nowhere)
    kinds,  # (pieces,) int32
    chunk_piece,  # (chunks,) int32
    chunk_start,  # (chunks,) int32
    parameters,  # (parameters, 3) int64 addresses: gradient (0: none), momentum, weight
    buffers,  # (buffers,) int64 addresses
    factors,  # (kinds, 7) fp32: mu, 1 - mu, nesterov, rate, decay, 1 - decay, cautious
    permission,  # (1,) int32: 0 where nothing is to change
    GRADIENT: tl.constexpr,
    WIRE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``muon.momentum_direction``, written in the wire dtype."""
    piece, row, local, target, mask = _locate(table, chunk_piece, chunk_start, FLAT, ALIGNED, BLOCK)
    mask = mask & (tl.load(permission) != 0)
    memory = parameters + 3 * tl.load(row + 2)
    offset = tl.load(row + 3)
    address = tl.load(memory)
    gradient = _pointer(address, offset, GRADIENT, ALIGNED)
    momentum = _pointer(tl.load(memory + 1), offset, tl.float32, ALIGNED)
    factor = factors + 7 * tl.load(kinds + piece)
    g = tl.load(gradient + local, mask=mask & (address != 0), other=0.0).to(tl.float32)
    m = tl.load(momentum + local, mask=mask, other=0.0)
    mu = tl.load(factor)
    scaled = g * tl.load(factor + 1)
    m = m * mu + scaled
    tl.store(momentum + local, m, mask=mask)
    d = tl.where(tl.load(factor + 2) != 0.0, m * mu + scaled, m)
    number = tl.load(row + 5)
    base = tl.load(buffers + tl.maximum(number, 0))
    direction = _pointer(base, tl.load(row + 6), WIRE, ALIGNED)
    tl.store(direction + target, d.to(WIRE), mask=mask & (number >= 0))


@triton.jit
def update_kernel(
    table,  # (pieces, 8) int64: parameters, then buffers
    kinds,
    chunk_piece,
    chunk_start,
    parameters,
    buffers,
    factors,
    permission,
    WEIGHT: tl.constexpr,
    WIRE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``muon.apply_update`` in fp32, rounded to the weights' dtype."""
    piece, row, local, source, mask = _locate(table, chunk_piece, chunk_start, FLAT, ALIGNED, BLOCK)
    mask = mask & (tl.load(permission) != 0)
    address = tl.load(parameters + 3 * tl.load(row + 2) + 2)
    weight = _pointer(address, tl.load(row + 3), WEIGHT, ALIGNED)
    update = _pointer(tl.load(buffers + tl.load(row + 5)), tl.load(row + 6), WIRE, ALIGNED)
    factor = factors + 7 * tl.load(kinds + piece)
    u = tl.load(update + source, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + local, mask=mask, other=0.0).to(tl.float32)
    change = u * tl.load(factor + 3)
    if tl.load(factor + 6) != 0.0:
        shrinks = (change * w > 0).to(tl.float32)
        w = w - (w * shrinks) * tl.load(factor + 4)
    else:
        w = w * tl.load(factor + 5)
    w = w - change
    tl.store(weight + local, w.to(WEIGHT), mask=mask)


@triton.jit
def copy_kernel(
    table,  # (pieces, 8) int64: buffers, then buffers
    chunk_piece,
    chunk_start,
    buffers,
    WIRE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the one memory to the other."""
    _, row, one, other, mask = _locate(table, chunk_piece, chunk_start, FLAT, ALIGNED, BLOCK)
    source = _pointer(tl.load(buffers + tl.load(row + 2)), tl.load(row + 3), WIRE, ALIGNED)
    target = _pointer(tl.load(buffers + tl.load(row + 5)), tl.load(row + 6), WIRE, ALIGNED)
    tl.store(target + other, tl.load(source + one, mask=mask), mask=mask)
