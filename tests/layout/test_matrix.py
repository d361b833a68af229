"""Blocks: the matrices of a parameter, cut out of it and put together from its fragments."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from math import prod

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from flashns_dist.layout import (
    QKV,
    Block,
    Box,
    Layout,
    PackedExperts,
    Sections,
    Split,
    block_holders,
    flat_layout,
    leading_blocks,
    placements_layout,
    rank_pieces,
    replicated_layout,
)


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(prod(shape), dtype=torch.int64).view(shape)


def local_arrays(layout: Layout) -> list[Tensor]:
    """What each rank stores of the numbered array."""
    full = numbered(layout.shape)
    whole = Box((0,) * full.ndim, layout.shape)
    arrays = []
    for fragments in layout.fragments:
        if not fragments:
            arrays.append(torch.empty(0, dtype=torch.int64))
        elif fragments[0].flat:
            local = torch.full((max(f.offset[0] + f.box.numel for f in fragments),), -1)
            for fragment in fragments:
                fragment.view(local).copy_(full[fragment.box.slices_in(whole)])
            arrays.append(local)
        else:
            size = [max(f.offset[d] + f.box.size[d] for f in fragments) for d in range(full.ndim)]
            local = torch.full(size, -1)
            for fragment in fragments:
                fragment.view(local).copy_(full[fragment.box.slices_in(whole)])
            arrays.append(local)
    return arrays


def fused_qkv(num_groups: int, per_group: int, head: int, cols: int) -> dict[str, Block]:
    """Blocks of a fused weight that is ordered by query group: its queries, its key, its value."""
    rows = (per_group + 2) * head
    parts: dict[str, list[Box]] = {"q": [], "k": [], "v": []}
    for group in range(num_groups):
        begin = group * rows
        parts["q"].append(Box((begin, 0), (per_group * head, cols)))
        parts["k"].append(Box((begin + per_group * head, 0), (head, cols)))
        parts["v"].append(Box((begin + (per_group + 1) * head, 0), (head, cols)))
    return {
        name: Block(tuple(boxes), sum(box.size[0] for box in boxes), cols)
        for name, boxes in parts.items()
    }


def expected_matrix(block: Block, shape: tuple[int, ...]) -> Tensor:
    whole = Box((0,) * len(shape), shape)
    parts = [numbered(shape)[part.slices_in(whole)] for part in block.parts]
    if block.axis == 1:
        return torch.cat([part.reshape(block.rows, -1) for part in parts], dim=1)
    return torch.cat([part.reshape(-1, block.cols) for part in parts])


def gathered(layout: Layout, block: Block, locals_: list[Tensor], replica: int) -> Tensor:
    """The block put together from one holder of each box."""
    matrix = torch.full(block.shape, -1, dtype=torch.int64)
    for part, box, holders in block_holders(layout, block):
        holder = holders[replica % len(holders)]
        (piece,) = [p for p in rank_pieces(layout, block, holder) if (p.part, p.box) == (part, box)]
        target = block.view(matrix, part, box)
        assert target.eq(-1).all(), "an element is stored in two boxes"
        target.copy_(piece.view(locals_[holder]))
    return matrix


def test_a_matrix_is_one_block() -> None:
    (block,) = leading_blocks((6, 4))
    assert block == Block((Box((0, 0), (6, 4)),), 6, 4)
    assert block.shape == (6, 4)


def test_a_stack_is_one_block_per_index_of_its_leading_dims() -> None:
    blocks = leading_blocks((2, 3, 6, 4))
    assert len(blocks) == 6
    assert blocks[4].parts == (Box((1, 1, 0, 0), (1, 1, 6, 4)),)
    assert {block.shape for block in blocks} == {(6, 4)}


def test_an_empty_array_has_no_blocks() -> None:
    assert leading_blocks((0, 6, 4)) == ()
    assert leading_blocks((6, 0)) == ()


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_vector_has_no_blocks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least two dims, got shape \("):
        leading_blocks(shape)


@pytest.mark.parametrize(
    ("parts", "rows", "cols"),
    [
        ((Box((0, 0), (3, 4)),), 3, 5),
        ((Box((0, 0), (3, 4)),), 2, 4),
        ((Box((0, 0), (3, 3)), Box((3, 0), (1, 3))), 3, 4),
        ((Box((0, 0), (2, 3)), Box((0, 3), (2, 1))), 2, 4),
    ],
)
def test_parts_that_do_not_stack_to_the_matrix_are_refused(
    parts: tuple[Box, ...], rows: int, cols: int
) -> None:
    with pytest.raises(ValueError, match=rf"do not stack to a \({rows}, {cols}\) matrix"):
        Block(parts, rows, cols)


def test_a_view_of_a_whole_part_is_shaped_like_its_box() -> None:
    queries = fused_qkv(num_groups=2, per_group=3, head=2, cols=5)["q"]
    matrix = torch.arange(60).view(12, 5)
    second = queries.view(matrix, 1, queries.parts[1])
    assert torch.equal(second, matrix[6:])
    second.fill_(-1)
    assert matrix[:6].ge(0).all()
    assert matrix[6:].eq(-1).all()


def test_a_view_of_a_box_inside_a_part_finds_its_rows() -> None:
    queries = fused_qkv(num_groups=2, per_group=3, head=2, cols=5)["q"]
    matrix = torch.arange(60).view(12, 5)
    # The second group's queries begin at row 10 of the parameter and row 6 of the matrix.
    inside = queries.view(matrix, 1, Box((12, 1), (3, 2)))
    assert torch.equal(inside, matrix[8:11, 1:3])


def test_a_convolution_is_a_matrix_of_its_output_channels() -> None:
    shape = (6, 3, 2, 2)
    block = Block((Box((0, 0, 0, 0), shape),), 6, 12)
    layout = placements_layout(shape, (Shard(0),), (4,))
    found = gathered(layout, block, local_arrays(layout), 0)
    assert torch.equal(found, numbered(shape).view(6, 12))


CASES = {
    "matrix": ((9, 7), leading_blocks((9, 7))),
    "experts": ((3, 5, 4), leading_blocks((3, 5, 4))),
    "stacked twice": ((2, 2, 3, 4), leading_blocks((2, 2, 3, 4))),
    "fused QKV": ((24, 5), tuple(fused_qkv(num_groups=3, per_group=2, head=2, cols=5).values())),
    "gate and up": (
        (10, 6),
        (Block((Box((0, 0), (5, 6)),), 5, 6), Block((Box((5, 0), (5, 6)),), 5, 6)),
    ),
    "convolution": ((4, 3, 2, 2), (Block((Box((0, 0, 0, 0), (4, 3, 2, 2)),), 4, 12),)),
    "QKV in columns, by group": ((5, 24), QKV(6, 3, order="grouped", dim=1)((5, 24))),
    "columns of experts": ((2, 5, 9), Sections((2, 1), dim=1, repeats=3)((2, 5, 9))),
    "experts across rows": ((7, 12), PackedExperts(4, 7)((7, 12))),
    "transposed": ((6, 4), Split(lambda w: [w.T])((6, 4))),
}


def random_layout(shape: tuple[int, ...], rng: random.Random) -> Layout:
    """Any sharding: placements on one to three axes, or flat ranges that any ranks store."""
    if rng.random() < 0.5:
        mesh = tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 3)))
        choices = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        return placements_layout(shape, [rng.choice(choices) for _ in mesh], mesh)
    cuts = [0, *sorted(rng.randint(0, prod(shape)) for _ in range(rng.randint(0, 5))), prod(shape)]
    size = rng.randint(1, 4)
    held: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    for a, b in pairwise(cuts):
        for rank in rng.sample(range(size), rng.randint(1, size)) if a < b else ():
            held[rank].append((a, b))
    by_rank = []
    for ranges in held:
        rng.shuffle(ranges)  # every rank stores its ranges in its own order
        starts = accumulate((b - a for a, b in ranges), initial=rng.randint(0, 3))
        by_rank.append(tuple((a, b, start) for (a, b), start in zip(ranges, starts, strict=False)))
    return flat_layout(shape, tuple(by_rank))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_put_together_from_any_sharding(case: str, seed: int) -> None:
    rng = random.Random(seed)
    shape, blocks = CASES[case]
    layout = random_layout(shape, rng)
    locals_ = local_arrays(layout)
    for block in blocks:
        for replica in range(layout.num_replicas):
            found = gathered(layout, block, locals_, replica)
            assert torch.equal(found, expected_matrix(block, shape))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("case", CASES)
def test_pieces_are_in_the_order_of_the_boxes_on_every_rank(case: str, seed: int) -> None:
    """Both sides of a transfer pack in this order, each knowing only its own part of the list."""
    rng = random.Random(100 + seed)
    shape, blocks = CASES[case]
    layout = random_layout(shape, rng)
    for block in blocks:
        everything = block_holders(layout, block)
        for rank in range(layout.group_size):
            mine = [(part, box) for part, box, holders in everything if rank in holders]
            pieces = rank_pieces(layout, block, rank)
            assert [(piece.part, piece.box) for piece in pieces] == mine


def test_holders_are_ascending_and_complete() -> None:
    layout = placements_layout((8, 6), (Shard(0), Replicate()), (2, 3))
    (block,) = leading_blocks((8, 6))
    assert block_holders(layout, block) == (
        (0, Box((0, 0), (4, 6)), (0, 1, 2)),
        (0, Box((4, 0), (4, 6)), (3, 4, 5)),
    )
    assert replicated_layout((8, 6), 3).holders == {Box((0, 0), (8, 6)): (0, 1, 2)}
