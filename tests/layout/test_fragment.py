"""Boxes, flat ranges cut into boxes, and fragments as views of local storage."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from flashns_dist.layout import Box, Fragment
from flashns_dist.layout.fragment import flat_range_boxes

SEEDS = range(40)


def random_shape(rng: random.Random, max_dims: int = 4) -> tuple[int, ...]:
    return tuple(rng.randint(1, 6) for _ in range(rng.randint(1, max_dims)))


def random_box(rng: random.Random, shape: tuple[int, ...]) -> Box:
    start = tuple(rng.randrange(size) for size in shape)
    return Box(start, tuple(rng.randint(1, n - s) for n, s in zip(shape, start, strict=True)))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """Every element is its own row-major index."""
    return torch.arange(prod(shape)).view(shape)


def cut_out(array: torch.Tensor, box: Box) -> torch.Tensor:
    return array[box.slices_in(Box((0,) * array.ndim, tuple(array.shape)))]


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_of_a_flat_range_hold_its_elements_in_storage_order(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        shape = random_shape(rng)
        start, stop = sorted(rng.randint(0, prod(shape)) for _ in range(2))
        found, position = [], 0
        for box, offset in flat_range_boxes(shape, start, stop):
            assert offset == position, "boxes follow one another without gaps"
            assert box.numel > 0
            found += cut_out(numbered(shape), box).flatten().tolist()
            position += box.numel
        assert found == list(range(start, stop)), (shape, start, stop)


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_a_flat_range_has_at_most_two_partial_slices_per_dim(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        shape = random_shape(rng)
        start, stop = sorted(rng.randint(0, prod(shape)) for _ in range(2))
        assert len(list(flat_range_boxes(shape, start, stop))) <= 2 * len(shape) - 1


def test_an_empty_flat_range_has_no_boxes() -> None:
    assert list(flat_range_boxes((3, 4), 5, 5)) == []
    assert list(flat_range_boxes((0, 4), 0, 0)) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_the_intersection_of_boxes_holds_their_common_elements(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        shape = random_shape(rng)
        array = numbered(shape)
        a, b = random_box(rng, shape), random_box(rng, shape)
        common = set(cut_out(array, a).flatten().tolist()) & set(
            cut_out(array, b).flatten().tolist()
        )
        for found in (a.intersect(b), b.intersect(a)):
            elements = set() if found is None else set(cut_out(array, found).flatten().tolist())
            assert elements == common, (a, b)


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_slices_in_index_a_box_inside_an_array_that_holds_another(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        shape = random_shape(rng)
        array = numbered(shape)
        outer = random_box(rng, shape)
        inner = random_box(rng, shape).intersect(outer)
        if inner is not None:
            held = cut_out(array, outer)
            assert torch.equal(held[inner.slices_in(outer)], cut_out(array, inner))


def test_a_fragment_of_flat_storage_is_a_view_shaped_like_its_box() -> None:
    local = torch.arange(20)
    view = Fragment(Box((4, 1), (2, 3)), (5,), flat=True).view(local)
    assert view.tolist() == [[5, 6, 7], [8, 9, 10]]
    view.fill_(-1)
    assert local[5:11].eq(-1).all()
    assert local[:5].ge(0).all()
    assert local[11:].ge(0).all()


def test_a_fragment_of_a_local_array_is_a_view_shaped_like_its_box() -> None:
    local = torch.arange(20).view(4, 5)
    view = Fragment(Box((10, 0), (2, 3)), (1, 2), flat=False).view(local)
    assert view.tolist() == [[7, 8, 9], [12, 13, 14]]
    view.fill_(-1)
    assert int(local.eq(-1).sum()) == 6


def test_a_fragment_that_fills_its_local_array_is_that_array() -> None:
    local = torch.zeros(4, 5)
    assert Fragment(Box((8, 0), (4, 5)), (0, 0), flat=False).view(local) is local
