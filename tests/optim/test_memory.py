"""What a step holds on to is what its plan predicts."""

from __future__ import annotations

import weakref
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.exchange import Exchange
from flashns_dist.optim import footprint
from flashns_dist.optim.rules.muon import Muon
from flashns_dist.testing.pool import RankPool, rank_device
from tests.optim.test_invariance import SLOW_WIRE


class Held:
    """Bytes of tensors that are still referred to, and their peak."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def add(self, tensor: Tensor) -> Tensor:
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._free, tensor.nbytes)
        return tensor

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def result_only(method: str, rows: int, cols: int, *_: object) -> int:
    return 2 * rows * cols


def held_by_a_step(options: dict[str, int]) -> tuple[int, int, int]:
    """How many buckets are under way; bytes of batches and results, and as predicted."""
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    named = []
    for i in range(20):
        value = torch.randn(12 + i % 5, 20 + i % 3, device=rank_device())
        param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        param.grad = torch.ones_like(param)
        named.append((f"w{i}", param))
    optimizer = FlashMuon(named, exchange=ExchangeOptions(cost=SLOW_WIRE, **options))
    held = Held()
    new_batch, on_owner = Exchange.new_batch, Muon.on_owner
    with (
        patch.object(Exchange, "new_batch", lambda *a: held.add(new_batch(*a))),
        patch.object(Muon, "on_owner", lambda *a: held.add(on_owner(*a))),
        patch.object(footprint, "workspace_bytes", result_only),
    ):
        optimizer.step()
    (made,) = optimizer._steps.values()
    plan, rank = made.exchange.plan, dist.get_rank()
    assert held.live == 0
    predicted = plan.prediction
    assert predicted.buffer_bytes[rank] == made.exchange.buffer_bytes
    return plan.depth, held.peak, predicted.memory_bytes[rank] - predicted.buffer_bytes[rank]


def held_under_caps() -> set[int]:
    with pytest.raises(ValueError, match="too little") as error:
        held_by_a_step({"memory_bytes": 1})
    least = int(str(error.value).split("memory_bytes to at least ")[1].split(",")[0])
    depths = set()
    for options in ({}, *({"memory_bytes": least + least * n // 4} for n in range(9))):
        depth, held, predicted = held_by_a_step(options)
        assert held == predicted, (options, depth)
        depths.add(depth)
    return depths


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_holds_what_its_plan_predicts(ranks: RankPool, size: int) -> None:
    """Buffers, and the batches and results of the buckets under way."""
    found = ranks.run(size, held_under_caps)
    assert all(depths == found[0] for depths in found)
    assert {1, 3} <= found[0]
