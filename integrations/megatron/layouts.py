"""Flat ranges of tensor-parallel shards as layouts over both kinds of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from flashns_dist.layout import Box, Fragment, Layout
from flashns_dist.layout.fragment import flat_range_boxes

Holding = tuple[int, int, int]
"""What a rank stores: its tensor-parallel index, and the elements ``[start, stop)`` of that shard,
flattened."""


@cache
def shard_layout(
    local_shape: tuple[int, ...], dim: int, num_shards: int, holdings: tuple[Holding, ...]
) -> Layout:
    """The layout of a parameter that is cut into equal shards along one dim, then into ranges.

    Args:
        local_shape: Of one tensor-parallel shard.
        dim: The dim that tensor parallelism cuts; -1 where each shard is the whole parameter.
        num_shards: Number of tensor-parallel shards.
        holdings: For each group rank; equal start and stop where it stores nothing.

    Returns:
        The layout of the whole parameter; a rank's local storage is one-dimensional and begins with
        the range's first element.
    """
    return Layout(
        global_shape(local_shape, dim, num_shards),
        tuple(
            tuple(
                Fragment(_moved(box, dim, index * local_shape[dim]), (offset,), flat=True)
                for box, offset in flat_range_boxes(local_shape, start, stop)
            )
            for index, start, stop in holdings
        ),
    )


def global_shape(local_shape: tuple[int, ...], dim: int, num_shards: int) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(
        size * num_shards if axis == dim else size for axis, size in enumerate(local_shape)
    )


def buffer_ranges(
    start: int, stop: int, bucket_start: int, bucket_numel: int, num_ranks: int
) -> list[tuple[int, int]]:
    """Which elements of a parameter each data-parallel rank stores.

    Megatron's distributed optimizer cuts every bucket of a buffer into equal ranges, whatever lies
    there.

    Args:
        start, stop: Where the parameter lies in the buffer.
        bucket_start, bucket_numel: Where its bucket lies, padding included.
        num_ranks: Data-parallel ranks.

    Returns:
        ``(first, last + 1)`` in the parameter by data-parallel rank; (0, 0) for nothing.
    """
    length = bucket_numel // num_ranks
    ranges = []
    for rank in range(num_ranks):
        low = max(start, bucket_start + rank * length)
        high = min(stop, bucket_start + (rank + 1) * length)
        ranges.append((low - start, high - start) if low < high else (0, 0))
    return ranges


def holdings_of(
    members: Sequence[tuple[int, int]], ranges: Sequence[tuple[int, int]]
) -> tuple[Holding, ...]:
    """Holdings by group rank, from (tensor-parallel, data-parallel) indices of the members."""
    return tuple((shard, *ranges[replica]) for shard, replica in members)


def _moved(box: Box, dim: int, distance: int) -> Box:
    if dim < 0:
        return box
    start = tuple(s + distance if axis == dim else s for axis, s in enumerate(box.start))
    return Box(start, box.size)
