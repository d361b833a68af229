"""Where the weights of the transformer lie on each mesh."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from flashns_dist.testing.pool import rank_device
from launch.mesh import parse_mesh
from launch.model import ModelConfig, Transformer
from launch.parallelize import parallelize

CONFIG = ModelConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, hidden_dim=24)


def local_shapes(mesh: str, world_size: int) -> dict[str, tuple[int, ...]]:
    _clear_sharding_prop_cache()
    spec, device = parse_mesh(mesh, world_size), rank_device()
    model = Transformer(CONFIG).to(device)
    parallelize(model, spec, spec.build(device.type), torch.float32)
    return {
        name: tuple(p.to_local().shape if isinstance(p, DTensor) else p.shape)
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("mesh", "world_size", "w_gate", "w_down", "norm"),
    [
        ("ddp", 2, (24, 16), (16, 24), (16,)),
        ("fsdp", 2, (12, 16), (8, 24), (8,)),
        ("replicate=2", 2, (24, 16), (16, 24), (16,)),
        ("tp=2", 2, (12, 16), (16, 12), (16,)),
        ("replicate=2,fsdp=2", 4, (12, 16), (8, 24), (8,)),
        ("fsdp=2,tp=2", 4, (6, 16), (8, 12), (8,)),
    ],
)
def test_each_rank_stores_its_part(ranks, mesh, world_size, w_gate, w_down, norm):
    for shapes in ranks.run(world_size, local_shapes, mesh, world_size):
        assert shapes["blocks.0.feed_forward.w_gate.weight"] == w_gate
        assert shapes["blocks.0.feed_forward.w_down.weight"] == w_down
        assert shapes["norm.weight"] == norm


def uneven_split() -> str:
    spec = parse_mesh("tp=2", 2)
    model = Transformer(ModelConfig(dim=16, num_heads=4, num_kv_heads=1, hidden_dim=24))
    with pytest.raises(ValueError) as error:
        parallelize(model, spec, spec.build("cpu"), torch.float32)
    return str(error.value)


def test_heads_that_tensor_parallelism_cannot_split_are_refused(ranks):
    for message in ranks.run(2, uneven_split):
        assert "tp=2 does not divide kv-heads 1" in message
