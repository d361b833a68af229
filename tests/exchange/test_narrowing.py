"""Exchanging some rows or columns of matrices: they arrive, and nothing else travels."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from flashns_dist.exchange import Exchange, Selection, borders, matrix_box
from flashns_dist.layout import Block, Box, Layout, flat_layout, leading_blocks, placements_layout
from flashns_dist.plan import Matrix, make_plan
from flashns_dist.testing.pool import RankPool, rank_device


def some_layout(shape: tuple[int, ...], size: int, rng: random.Random) -> Layout:
    kind = rng.choice(["flat", "rows", "columns", "copies"])
    if kind == "flat":
        numel = shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
        cuts = [0, *sorted(rng.randint(0, numel) for _ in range(size - 1)), numel]
        return flat_layout(shape, tuple(((a, b, 0),) for a, b in pairwise(cuts)))
    placement = {"rows": Shard(len(shape) - 2), "columns": Shard(len(shape) - 1)}
    return placements_layout(shape, [placement.get(kind, Replicate())], (size,))


def chosen(matrix: Matrix, dim: int, seed: int) -> list[int]:
    count = matrix.work_shape[dim]
    return sorted(random.Random(seed).sample(range(matrix.block.shape[dim]), count))


def exchange_selections(seed: int) -> tuple[int, int]:
    """Elements that this rank sends, with selections and without."""
    rng, size, rank = random.Random(seed), dist.get_world_size(), dist.get_rank()
    matrices, dims = [], []
    for tensor in range(6):
        shape = tuple(rng.randint(2, 9) for _ in range(rng.choice([2, 2, 3])))
        layout = some_layout(shape, size, rng)
        for block in leading_blocks(shape):
            dim, work = rng.randint(0, 1), list(block.shape)
            work[dim] = rng.randint(1, work[dim])
            selects = rng.random() < 0.8
            matrices.append(
                Matrix(f"w{tensor}", tensor, layout, block, "", tuple(work) if selects else None)
            )
            dims.append(dim)
    plan = make_plan(matrices, size, wire_itemsize=4, bucket_bytes=rng.choice([128, 2**20]))
    exchange = Exchange(plan, dist.group.WORLD, rank, rank_device(), torch.float32)
    whole = [torch.rand(m.block.shape, device=rank_device()) for m in matrices]
    for other in whole:
        dist.broadcast(other, 0)
    full_bytes = exchange.sent_bytes
    for step in range(3):
        selections, wanted = {}, {}
        for index, (matrix, dim) in enumerate(zip(matrices, dims, strict=True)):
            wanted[index] = whole[index]
            if matrix.work is not None:
                kept = chosen(matrix, dim, 1000 * step + index)
                below = {
                    border: sum(k < border for k in kept) for border in borders(plan, index, dim)
                }
                selections[index] = Selection(dim, matrix.work, below)
                wanted[index] = whole[index].index_select(
                    dim, torch.tensor(kept, device=rank_device())
                )
        exchange.narrow(selections)
        for bucket, schedule in enumerate(exchange.schedules):
            pieces = [
                inside(wanted[i], matrices[i], selections.get(i), p.part, p.box)
                for i, p in schedule.held
            ]
            into = {
                i: torch.full(matrices[i].work_shape, -1.0, device=rank_device())
                for i in schedule.owned
            }
            transfer = exchange.start_gather(bucket, pieces, into)
            exchange.finish_gather(bucket, transfer, into)
            assert all(torch.equal(into[i], wanted[i]) for i in schedule.owned)
            results = {i: into[i] + 1 for i in schedule.owned}
            updates = exchange.finish_scatter(bucket, exchange.start_scatter(bucket, results))
            for piece, update in zip(pieces, updates, strict=True):
                assert torch.equal(update, piece + 1)
    return exchange.sent_bytes, full_bytes


def inside(
    value: torch.Tensor, matrix: Matrix, selection: Selection | None, part: int, box: Box
) -> torch.Tensor:
    if selection is None:
        return matrix.block.view(value, part, box)
    narrow = selection.narrow(matrix_box(matrix, part, box))
    return value[narrow.slices_in(Box((0, 0), selection.shape))]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_selected_rows_and_columns_arrive(ranks: RankPool, world_size: int) -> None:
    sent = [ranks.run(world_size, exchange_selections, seed) for seed in range(4)]
    narrow, full = (sum(s[i] for answers in sent for s in answers) for i in range(2))
    assert narrow < full or world_size == 1


def test_a_piece_that_is_no_rectangle_is_refused_by_name() -> None:
    # Each row of the parameter is two rows of the matrix.
    block = Block((Box((0, 0), (4, 6)),), 8, 3)
    matrix = Matrix("experts.w", 0, flat_layout((4, 6), (((0, 24, 0),),)), block)
    with pytest.raises(NotImplementedError, match=r"experts\.w: .* is no rectangle"):
        matrix_box(matrix, 0, Box((0, 1), (4, 3)))
    assert matrix_box(matrix, 0, Box((1, 0), (2, 6))) == Box((2, 0), (4, 3))
