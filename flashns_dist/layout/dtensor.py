"""DTensor placements on a mesh, as a layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from math import prod
from typing import TypeAlias

from flashns_dist.layout.fragment import Box, Fragment
from flashns_dist.layout.layout import Layout

Intervals: TypeAlias = "tuple[tuple[int, int], ...]"  # (start, length) pieces of one dim, in order


def placements_layout(
    shape: Sequence[int],
    placements: Sequence[object],
    mesh_shape: Sequence[int],
    coordinates: Sequence[Sequence[int]] | None = None,
    *,
    name: str = "tensor",
) -> Layout:
    """The layout of a DTensor: placements are applied from the first mesh axis to the last.

    Uneven shards follow ``torch.chunk``. ``_StridedShard`` gives a rank several runs of a dim,
    stored one after the other. Where it says that FSDP2 has sharded a tensor-parallel shard once
    more, the axes are applied in FSDP2's order, the tensor-parallel ones first: that is what the
    ranks store, also for sizes that divide so badly that the placements, read in order, would cut
    elsewhere (7 rows over 3 x 2 ranks).

    Args:
        shape: Global shape.
        placements: One per mesh axis: Shard(dim), Replicate or _StridedShard(dim, split_factor).
        mesh_shape: Sizes of the mesh axes.
        coordinates: For each group rank, its coordinate in the mesh (default: row-major order).
        name: What to call the tensor in errors.

    Raises:
        NotImplementedError: A placement is Partial or unknown: the tensor is not a parameter's.
    """
    mesh = tuple(int(size) for size in mesh_shape)
    coords = (
        tuple(product(*(range(size) for size in mesh)))
        if coordinates is None
        else tuple(tuple(int(c) for c in coordinate) for coordinate in coordinates)
    )
    kinds = tuple(_placement_kind(placement, name) for placement in placements)
    return _placements_layout(tuple(int(s) for s in shape), kinds, mesh, coords)


def _placement_kind(placement: object, name: str) -> tuple[int, int] | None:
    """(dim, split factor) of a shard, None of a replica."""
    if getattr(placement, "is_replicate", lambda: False)():
        return None
    kind = type(placement).__name__
    dim = getattr(placement, "dim", None)
    if kind not in ("Shard", "_StridedShard") or dim is None:
        raise NotImplementedError(
            f"{name}: placement {placement!r} is not supported; parameters must be Shard, "
            "Replicate or FSDP2's strided Shard on every mesh axis. Redistribute the tensor first."
        )
    return int(dim), int(getattr(placement, "split_factor", 1))


@cache
def _placements_layout(
    shape: tuple[int, ...],
    kinds: tuple[tuple[int, int] | None, ...],
    mesh: tuple[int, ...],
    coordinates: tuple[tuple[int, ...], ...],
) -> Layout:
    return Layout(
        shape, tuple(_fragments(shape, kinds, mesh, coordinate) for coordinate in coordinates)
    )


def _fragments(
    shape: tuple[int, ...],
    kinds: tuple[tuple[int, int] | None, ...],
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> tuple[Fragment, ...]:
    dims: list[Intervals] = [((0, size),) if size else () for size in shape]
    for axis, dim, split_factor in _cuts(kinds, mesh):
        dims[dim] = _shard(dims[dim], mesh[axis], coordinate[axis], split_factor)
    return tuple(
        Fragment(
            Box(tuple(run[0] for run in runs), tuple(run[1] for run in runs)),
            tuple(run[2] for run in runs),
            flat=False,
        )
        for runs in product(*(_with_offsets(intervals) for intervals in dims))
    )


def _cuts(
    kinds: tuple[tuple[int, int] | None, ...], mesh: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """(axis, dim, split factor) of each cut, in the order in which they are made."""
    cuts, last = [], []
    for axis, kind in enumerate(kinds):
        if kind is None:
            continue
        dim, split_factor = kind
        later = zip(kinds[axis + 1 :], mesh[axis + 1 :], strict=True)
        inner = prod(size for other, size in later if other is not None and other[0] == dim)
        if split_factor == inner > 1:
            last.append((axis, dim, 1))
        else:
            cuts.append((axis, dim, split_factor))
    return cuts + last[::-1]


def _shard(intervals: Intervals, num_shards: int, index: int, split_factor: int) -> Intervals:
    """Shard ``index`` of ``num_shards`` of each of ``split_factor`` chunks, joined."""
    kept: list[tuple[int, int]] = []
    for part in range(split_factor):
        kept += _chunk(_chunk(intervals, split_factor, part), num_shards, index)
    return _joined(kept)


def _chunk(intervals: Intervals, num_chunks: int, index: int) -> Intervals:
    """Chunk ``index`` as ``torch.chunk`` cuts it; empty past the last one."""
    total = sum(length for _, length in intervals)
    size = -(-total // num_chunks)
    begin, end = min(index * size, total), min((index + 1) * size, total)
    kept, position = [], 0
    for start, length in intervals:
        low, high = max(begin - position, 0), min(end - position, length)
        if low < high:
            kept.append((start + low, high - low))
        position += length
    return tuple(kept)


def _joined(intervals: Sequence[tuple[int, int]]) -> Intervals:
    """Neighbouring runs merged: two ranks that store the same elements then have the same boxes."""
    merged: list[tuple[int, int]] = []
    for start, length in intervals:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return tuple(merged)


def _with_offsets(intervals: Intervals) -> list[tuple[int, int, int]]:
    """(start, length, offset in the local dim) of each run."""
    offsets, position = [], 0
    for start, length in intervals:
        offsets.append((start, length, position))
        position += length
    return offsets
