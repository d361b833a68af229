"""What each rule sends and keeps, measured. ``-s`` prints the table of docs/optimizers.md."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.testing.pool import RankPool, rank_device

SHAPES = ((384, 128), (128, 128), (512, 128), (128, 512)) * 2
NUMEL = sum(rows * cols for rows, cols in SHAPES)
RANKS = 4


class Counter:
    """Counts the bytes that this rank sends: to others in an all-to-all, and all-reduced."""

    def __init__(self) -> None:
        self.exchanged = self.reduced = 0
        self._originals = (dist.all_to_all_single, dist.all_reduce)

    def __enter__(self) -> Counter:
        exchange, reduce = self._originals

        def all_to_all_single(output, sent, outputs, inputs, **kwargs):
            self.exchanged += (sum(inputs) - inputs[dist.get_rank()]) * sent.itemsize
            return exchange(output, sent, outputs, inputs, **kwargs)

        def all_reduce(values, **kwargs):
            self.reduced += values.numel() * values.itemsize
            return reduce(values, **kwargs)

        dist.all_to_all_single, dist.all_reduce = all_to_all_single, all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single, dist.all_reduce = self._originals


def measure(settings: dict[str, object]) -> tuple[int, int, int, int]:
    """Bytes of one rank: exchanged and all-reduced in a step, of state, and of buffers."""
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in SHAPES:
        value = torch.randn(shape, generator=generator).to(rank_device())
        params.append(nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)))
    optimizer = FlashMuon(params, lr=0.01, exchange=ExchangeOptions(), **settings)
    for _ in range(2):  # the first step compares the setup
        for param in params:
            value = torch.randn(param.shape, generator=generator).to(rank_device())
            param.grad = distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        with Counter() as counter:
            optimizer.step()
    state = sum(
        getattr(value, "_local_tensor", value).nbytes
        for entry in optimizer.state.values()
        for name, value in entry.items()
        if name != "step"
    )
    (step,) = optimizer._steps.values()
    assert step.exchange.sent_bytes == counter.exchanged
    return counter.exchanged, counter.reduced, state, step.exchange.buffer_bytes


RULES: dict[str, dict[str, object]] = {
    "muon": {},
    "normuon": {"update_rule": "normuon"},
    "adamuon": {"update_rule": "adamuon"},
    "dion2, 1/4": {"update_rule": "dion2"},
    "dion2, 1/4, normuon": {"update_rule": "dion2", "normuon": True},
    "dion2, 1/16": {"update_rule": "dion2", "fraction": 1 / 16},
    "dion, 1/4": {"update_rule": "dion"},
    "dion, 1/16": {"update_rule": "dion", "rank_fraction": 1 / 16},
}


@pytest.fixture(scope="module")
def costs(ranks: RankPool) -> dict[str, tuple[float, ...]]:
    """Of all ranks together, in units of the matrices' elements."""
    found = {}
    for name, settings in RULES.items():
        by_rank = ranks.run(RANKS, measure, settings)
        found[name] = tuple(sum(column) / NUMEL for column in zip(*by_rank, strict=True))
    print("\nbytes per matrix element, sum over 4 ranks: exchanged, all-reduced, state, buffers")
    for name, row in found.items():
        print(f"{name:22}" + "".join(f"{value:9.3f}" for value in row))
    return found


def test_muon_sends_each_element_twice(costs: dict[str, tuple[float, ...]]) -> None:
    exchanged, reduced, state, _ = costs["muon"]
    assert exchanged == 2 * 2 * (RANKS - 1) / RANKS  # bf16, both ways, but for the owner's part
    assert reduced < 0.01
    assert state == 4


def test_normuon_adds_a_number_per_row(costs: dict[str, tuple[float, ...]]) -> None:
    rows = sum(shape[0] for shape in SHAPES)
    assert costs["normuon"][0] == costs["muon"][0]
    assert costs["normuon"][1] - costs["muon"][1] == pytest.approx(RANKS * rows * 4 / NUMEL)
    assert costs["normuon"][2] == pytest.approx(4 + RANKS * rows * 4 / NUMEL)


def test_adamuon_adds_a_second_moment(costs: dict[str, tuple[float, ...]]) -> None:
    assert costs["adamuon"][0] == costs["muon"][0]
    assert costs["adamuon"][2] == 8


@pytest.mark.parametrize(("name", "fraction"), [("dion2, 1/4", 1 / 4), ("dion2, 1/16", 1 / 16)])
def test_dion2_sends_the_fraction(
    costs: dict[str, tuple[float, ...]], name: str, fraction: float
) -> None:
    exchanged, reduced, state, buffers = costs[name]
    assert exchanged == pytest.approx(fraction * costs["muon"][0], rel=0.1)
    assert buffers < 1.6 * fraction * costs["muon"][3]
    assert state == 4
    assert reduced < 0.2  # eight bytes per row or column


def test_dion_exchanges_nothing_and_reduces_its_factors(
    costs: dict[str, tuple[float, ...]],
) -> None:
    for name, fraction in (("dion, 1/4", 1 / 4), ("dion, 1/16", 1 / 16)):
        exchanged, reduced, state, buffers = costs[name]
        factors = [4 * fraction * min(shape) for shape in SHAPES]
        both = sum(f * sum(shape) for f, shape in zip(factors, SHAPES, strict=True))
        right = sum(f * shape[1] for f, shape in zip(factors, SHAPES, strict=True))
        assert exchanged == buffers == 0
        assert reduced - costs["muon"][1] == pytest.approx(RANKS * both / NUMEL)
        assert state == pytest.approx(4 + RANKS * right / NUMEL)
