"""Steps from CUDA graphs equal eager ones in every bit, with live settings and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.optim import flash_muon
from flashns_dist.testing.gpus import has_gpus
from flashns_dist.testing.pool import RankPool, rank_device

SHAPES = ((96, 160), (160, 96), (96, 160), (64, 64), (4, 32, 48), (96, 160))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def train(cuda_graph: bool, settings: dict[str, object]) -> list[torch.Tensor]:
    mesh = init_device_mesh(rank_device().type, (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(0)

    def sharded(shape: tuple[int, ...], index: int) -> torch.Tensor:
        value = torch.randn(shape, generator=generator).to(rank_device())
        placement = [Replicate(), Shard(0), Shard(0), Shard(1), Shard(0), Shard(1)][index]
        return distribute_tensor(value, mesh, [placement], src_data_rank=None)

    params = [nn.Parameter(sharded(shape, i)) for i, shape in enumerate(SHAPES)]
    exchange = ExchangeOptions(bucket_bytes=16384)
    optimizer = FlashMuon(params, lr=0.02, exchange=exchange, cuda_graph=cuda_graph, **settings)  # type: ignore[arg-type]
    kept = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.param_groups[0]["momentum"] = 0.9 + 0.01 * step
        for index, (param, shape) in enumerate(zip(params, SHAPES, strict=True)):
            # A second parameter without a gradient: another plan, another graph.
            param.grad = None if (step, index) == (4, 1) else sharded(shape, index)
            kept.append(param.grad)  # so that every step's gradients lie elsewhere
        if step == 3:
            for state in optimizer.state.values():
                kept += state.values()
                state.update({name: value.clone() for name, value in state.items()})
        optimizer.step()
    found = [p.detach().full_tensor() for p in params]
    found += [optimizer.state[p]["momentum_buffer"].full_tensor() for p in params]
    optimizer.release_graphs()
    return found


def compare(settings: dict[str, object]) -> None:
    for eager, graphed in zip(train(False, settings), train(True, settings), strict=True):
        assert torch.equal(eager, graphed)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"update_rule": "normuon", "cautious": True}])
def test_replayed_steps_equal_eager_ones(ranks: RankPool, settings: dict[str, object]) -> None:
    for size in filter(has_gpus, (1, 2, 4)):
        ranks.run(size, compare, settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"update_rule": "dion2"}, "select"), ({"rounding": "stochastic"}, "fused"), ({}, "cpu")],
)
def test_what_cannot_be_captured_is_refused(settings: dict[str, object], reason: str) -> None:
    device = "cpu" if reason == "cpu" or not torch.cuda.is_available() else "cuda"
    param = nn.Parameter(torch.ones(8, 12, device=device, dtype=torch.bfloat16))
    exchange = ExchangeOptions(replica_group=None)
    optimizer = FlashMuon([param], cuda_graph=True, exchange=exchange, **settings)  # type: ignore[arg-type]
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=f"cuda_graph=True cannot be.*({reason}|cpu)"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
    assert float(optimizer.state[param]["step"]) == 0


def refused_in_the_second_group() -> None:
    mesh = init_device_mesh(rank_device().type, (2, 1), mesh_dim_names=("all", "own"))
    value = torch.eye(6, 8, device=rank_device())
    own, shared = (
        nn.Parameter(distribute_tensor(value, mesh[name], [placement], src_data_rank=None))
        for name, placement in (("own", Replicate()), ("all", Shard(0)))
    )
    groups = [{"params": [own]}, {"params": [shared], "update_rule": "dion"}]
    optimizer = FlashMuon(groups, cuda_graph=True)
    for param in (own, shared):
        param.grad = torch.ones_like(param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            flash_muon, "capture_problem", lambda step, _: None if step.is_static else "dion"
        )
        with pytest.raises(ValueError, match="dion"):
            optimizer.step()
    assert torch.equal(own.detach().to_local(), torch.eye(6, 8, device=rank_device()))
    assert float(optimizer.state[own]["step"]) == 0


def test_a_refusal_in_one_process_group_changes_nothing_in_others(ranks: RankPool) -> None:
    ranks.run(2, refused_in_the_second_group)
