"""Layouts: coverage, replicas, digests, flat ranges."""

from __future__ import annotations

import random
from itertools import pairwise
from math import prod

import pytest
import torch

from flashns_dist.layout import (
    Box,
    Fragment,
    Layout,
    even_flat_layout,
    flat_layout,
    replicated_layout,
)
from flashns_dist.testing.pool import RankPool


def of_boxes(shape: tuple[int, ...], *by_rank: list[Box]) -> Layout:
    """A layout with these boxes on each rank, at whatever offset."""
    zero = (0,) * len(shape)
    return Layout(shape, tuple(tuple(Fragment(b, zero, flat=False) for b in r) for r in by_rank))


def rows(start: int, stop: int, cols: int = 4) -> Box:
    return Box((start, 0), (stop - start, cols))


def test_missing_elements_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(6, 4\) hold 20 elements instead of 24"):
        of_boxes((6, 4), [rows(0, 3)], [rows(4, 6)])


def test_boxes_that_overlap_in_part_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hold 32 elements instead of 24.*overlap in part"):
        of_boxes((6, 4), [rows(0, 4)], [rows(2, 6)])


def test_an_overlap_that_makes_up_for_missing_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap in part or lie outside"):
        of_boxes((6, 4), [rows(0, 4)], [rows(3, 5)])


@pytest.mark.parametrize("outside", [rows(4, 7), rows(-1, 2)])
def test_a_box_outside_the_array_is_refused(outside: Box) -> None:
    with pytest.raises(ValueError, match="overlap in part or lie outside"):
        of_boxes((6, 4), [rows(0, 3)], [outside])


def test_a_rank_that_stores_a_box_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group ranks \(1, 1\) store .* at most once"):
        of_boxes((6, 4), [rows(0, 3)], [rows(3, 6), rows(3, 6)])


def split(box: Box, rng: random.Random, pieces: int) -> list[Box]:
    """Cut a box into disjoint ones at random places."""
    boxes = [box]
    for _ in range(pieces):
        chosen = rng.choice(boxes)
        dims = [d for d, size in enumerate(chosen.size) if size > 1]
        if not dims:
            continue
        dim = rng.choice(dims)
        at = rng.randrange(1, chosen.size[dim])
        boxes.remove(chosen)
        size, start = list(chosen.size), list(chosen.start)
        size[dim] = at
        boxes.append(Box(chosen.start, tuple(size)))
        size[dim], start[dim] = chosen.size[dim] - at, start[dim] + at
        boxes.append(Box(tuple(start), tuple(size)))
    return boxes


@pytest.mark.parametrize("seed", range(30))
def test_exact_tilings_are_accepted_and_displaced_boxes_refused(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(2, 9) for _ in range(rng.randint(1, 4)))
    boxes = split(Box((0,) * len(shape), shape), rng, rng.randint(1, 12))
    num_ranks = rng.randint(1, 5)
    by_rank: list[list[Box]] = [[] for _ in range(num_ranks)]
    for box in boxes:
        for rank in rng.sample(range(num_ranks), rng.randint(1, num_ranks)):
            by_rank[rank].append(box)
    layout = of_boxes(shape, *by_rank)
    assert set(layout.holders) == set(boxes)
    assert layout.num_replicas == min(map(len, layout.holders.values()))
    displaced = boxes.copy()
    moved = displaced.pop(rng.randrange(len(displaced)))
    dim = rng.randrange(len(shape))
    shift = rng.choice([-1, 1])
    start = tuple(s + shift * (d == dim) for d, s in enumerate(moved.start))
    with pytest.raises(ValueError, match="overlap in part"):
        of_boxes(shape, [*displaced, Box(start, moved.size)])


def test_a_replicated_layout_stores_everything_on_every_rank() -> None:
    layout = replicated_layout((3, 5), 4)
    assert layout.group_size == layout.num_replicas == 4
    assert [layout.local_numel(rank) for rank in range(4)] == [15] * 4
    assert layout.holders == {Box((0, 0), (3, 5)): (0, 1, 2, 3)}


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_an_empty_array_is_stored_by_nobody(shape: tuple[int, ...]) -> None:
    for layout in (replicated_layout(shape, 3), even_flat_layout(shape, 3)):
        assert layout.holders == {}
        assert layout.num_replicas == 1
        assert [layout.local_numel(rank) for rank in range(3)] == [0, 0, 0]


def test_a_scalar_has_one_element() -> None:
    layout = replicated_layout((), 2)
    assert layout.local_numel(1) == 1
    assert layout.fragments[1][0].view(torch.tensor(3.0)).item() == 3.0


@pytest.mark.parametrize("seed", range(30))
def test_flat_local_storage_puts_the_array_together(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3)))
    numel, num_ranks = prod(shape), rng.randint(1, 6)
    cuts = [0, *sorted(rng.randint(0, numel) for _ in range(num_ranks - 1)), numel]
    offsets = [rng.randint(0, 5) for _ in range(num_ranks)]
    ranges = tuple(((a, b, o),) for (a, b), o in zip(pairwise(cuts), offsets, strict=True))
    layout = flat_layout(shape, ranges)
    whole = torch.full(shape, -1)
    for rank, (a, b) in enumerate(pairwise(cuts)):
        local = torch.cat([torch.full((offsets[rank],), -2), torch.arange(a, b)])
        assert layout.local_numel(rank) == b - a
        for fragment in layout.fragments[rank]:
            index = fragment.box.slices_in(Box((0,) * len(shape), shape))
            assert whole[index].eq(-1).all(), "stored once"
            whole[index] = fragment.view(local)
    assert torch.equal(whole, torch.arange(numel).view(shape))


def test_a_rank_may_store_several_flat_ranges() -> None:
    layout = flat_layout((4, 3), (((0, 4, 0), (9, 12, 4)), ((4, 9, 2),)))
    local = torch.tensor([0, 1, 2, 3, 9, 10, 11])
    found = torch.cat([f.view(local).flatten() for f in layout.fragments[0]])
    assert sorted(found.tolist()) == local.tolist()
    assert [layout.local_numel(r) for r in range(2)] == [7, 5]


@pytest.mark.parametrize(("numel", "size"), [(10, 3), (2, 5), (12, 4), (1, 1), (7, 6)])
def test_an_even_flat_layout_cuts_into_equal_ranges_from_the_front(numel: int, size: int) -> None:
    chunk = -(-numel // size)
    expected = [max(0, min(chunk, numel - rank * chunk)) for rank in range(size)]
    layout = even_flat_layout((numel,), size)
    assert [layout.local_numel(rank) for rank in range(size)] == expected


def test_equal_layouts_have_equal_digests_and_others_do_not() -> None:
    one = of_boxes((6, 4), [rows(0, 3)], [rows(3, 6)])
    same = of_boxes((6, 4), [rows(0, 3)], [rows(3, 6)])
    swapped = of_boxes((6, 4), [rows(3, 6)], [rows(0, 3)])
    uneven = of_boxes((6, 4), [rows(0, 2)], [rows(2, 6)])
    flat = flat_layout((6, 4), (((0, 12, 0),), ((12, 24, 0),)))
    shifted = flat_layout((6, 4), (((0, 12, 0),), ((12, 24, 7),)))
    assert one is not same
    assert one.digest == same.digest
    different = [one, swapped, uneven, flat, shifted, replicated_layout((6, 4), 2)]
    assert len({layout.digest for layout in different}) == len(different)


def digest_here() -> str:
    return even_flat_layout((7, 11), 4).digest


def test_digests_do_not_depend_on_the_process(ranks: RankPool) -> None:
    assert set(ranks.run(2, digest_here)) == {digest_here()}
