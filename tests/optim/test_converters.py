"""State of torch.optim.Muon, AdamW and dion's optimizers, read into FlashMuon."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flashns_dist import FlashMuon
from flashns_dist.optim.converters import load_foreign_state
from flashns_dist.testing.pool import RankPool, rank_device

MATRICES = {"layers.0.w": (12, 20), "layers.1.w": (9, 5)}
OTHERS = {"embed": (7, 6), "norm": (5,)}
SHAPES = {**MATRICES, **OTHERS}
STEPS = 4


def gradient(name: str, step: int) -> Tensor:
    seed = 100 * step + list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def start(name: str) -> nn.Parameter:
    return nn.Parameter(gradient(name, 99))


def train(params: dict[str, nn.Parameter], optimizers: list[Any], steps: range) -> None:
    for step in steps:
        for name, param in params.items():
            param.grad = gradient(name, step)
        for optimizer in optimizers:
            optimizer.step()


def torch_optimizers() -> tuple[dict[str, nn.Parameter], list[torch.optim.Optimizer]]:
    """What a model trained by torch.optim.Muon and AdamW has after some steps."""
    params = {name: start(name) for name in SHAPES}
    muon = torch.optim.Muon([params[name] for name in MATRICES], lr=0.03, momentum=0.8)
    adamw = torch.optim.AdamW([(name, params[name]) for name in OTHERS], lr=0.01, betas=(0.9, 0.95))
    train(params, [muon, adamw], range(STEPS))
    return params, [muon, adamw]


def flash_muon(params: dict[str, Tensor], **matrices: Any) -> FlashMuon:
    return FlashMuon(
        [
            {"params": [(n, params[n]) for n in MATRICES], **matrices},
            {"params": [(n, params[n]) for n in OTHERS], "update_rule": "adamw"},
        ],
        momentum=0.8,
        lr=0.03,
        aux_lr=0.01,
        aux_weight_decay=0.01,
        method="standard",
        ns_coefficients=(3.4445, -4.775, 2.0315),
        ns_dtype=torch.bfloat16,
    )


def sources(optimizers: list[torch.optim.Optimizer]) -> list[Any]:
    muon, adamw = (copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers)
    return [(muon, list(MATRICES)), adamw]


def test_training_goes_on_after_torch_muon_and_adamw() -> None:
    params, optimizers = torch_optimizers()
    ours = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    optimizer = flash_muon(ours)
    load_foreign_state(optimizer, *sources(optimizers))
    for name in MATRICES:
        expected = optimizers[0].state[params[name]]["momentum_buffer"]
        assert torch.equal(optimizer.state[ours[name]]["momentum_buffer"], expected)
    before = {name: param.detach().clone() for name, param in params.items()}
    train(params, optimizers, range(STEPS, STEPS + 2))
    train(ours, [optimizer], range(STEPS, STEPS + 2))
    for name in MATRICES:  # two bf16 iterations; without the momentum it would be 50 percent
        moved = (params[name] - before[name]).norm()
        assert (ours[name] - params[name]).norm() < 0.1 * moved
    for name in OTHERS:
        torch.testing.assert_close(ours[name], params[name])


def convert_into_shards() -> None:
    params, optimizers = torch_optimizers()
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    sharded: dict[str, Tensor] = {
        name: nn.Parameter(
            distribute_tensor(
                param.detach().to(rank_device()), mesh, [Shard(0)], src_data_rank=None
            )
        )
        for name, param in params.items()
    }
    optimizer = flash_muon(sharded)
    load_foreign_state(optimizer, *sources(optimizers))
    for name, param in sharded.items():
        theirs = optimizers[name in OTHERS].state[params[name]]
        for key, value in optimizer.state[param].items():
            if isinstance(value, DTensor):
                assert torch.equal(value.full_tensor().cpu(), theirs[key]), f"{key} of {name}"
            elif name in OTHERS:
                assert float(value) == STEPS
    # And from one sharded optimizer to another, by DTensors keyed by name.
    by_name = {
        "state": {
            n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in sharded.items()
        },
        "param_groups": [
            {"params": list(MATRICES), "ns_coefficients": None},
            {"params": list(OTHERS)},
        ],
    }
    again = flash_muon(sharded)
    load_foreign_state(again, by_name)
    for param in sharded.values():
        for key, value in again.state[param].items():
            other = optimizer.state[param][key]
            local, expected = (
                v.to_local() if isinstance(v, DTensor) else v for v in (value, other)
            )
            assert torch.equal(local, expected)


def test_whole_tensors_and_shards_become_shards(ranks: RankPool) -> None:
    ranks.run(3, convert_into_shards)


def dion_state(algorithm: str, mu: float, dtype: torch.dtype) -> dict[str, Any]:
    """The state dict of dion's optimizers: momentum is a sum, counters are in the groups."""
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(SHAPES):
        sums = torch.zeros(SHAPES[name])
        first, second = torch.zeros(SHAPES[name]), torch.zeros(SHAPES[name])
        for step in range(STEPS):
            sums = mu * sums + gradient(name, step)
            first = 0.9 * first + 0.1 * gradient(name, step)
            second = 0.95 * second + 0.05 * gradient(name, step).square()
        if name in MATRICES:
            state[index] = {"momentum": sums.to(dtype)}
        else:
            steps = torch.tensor(float(STEPS))
            state[index] = {"momentum": first, "variance": second, "step_dev": steps}
    groups = [
        {"params": [0, 1], "algorithm": algorithm, "mu": mu, "step": STEPS},
        {"params": [2, 3], "algorithm": "adamw", "mu": mu, "step": STEPS},
    ]
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dions_sum_becomes_the_average(dtype: torch.dtype) -> None:
    """The same as having trained with this optimizer from the start."""
    params = {name: start(name) for name in SHAPES}
    trained = flash_muon(params)
    train(params, [trained], range(STEPS))
    loaded = flash_muon(params)
    load_foreign_state(loaded, (dion_state("muon", 0.8, dtype), list(SHAPES)))
    for name, param in params.items():
        for key, value in loaded.state[param].items():
            expected = trained.state[param][key]
            tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
            assert (value - expected).norm() <= tolerance * expected.norm(), f"{key} of {name}"


def test_dion2s_sum_stays_a_sum() -> None:
    params = {name: start(name) for name in SHAPES}
    optimizer = flash_muon(params, update_rule="dion2")
    source = dion_state("dion2", 0.8, torch.float32)
    load_foreign_state(optimizer, (source, list(SHAPES)))
    found = optimizer.state[params["layers.0.w"]]["momentum_buffer"]
    assert torch.equal(found, source["state"][0]["momentum"])


def test_states_that_the_source_lacks_are_named() -> None:
    params = {name: start(name) for name in SHAPES}
    optimizer = flash_muon(params, update_rule="normuon")
    with pytest.warns(UserWarning, match="hold nothing for normuon's row_moment"):
        load_foreign_state(optimizer, (dion_state("muon", 0.8, torch.float32), list(SHAPES)))


def broken(change: str) -> tuple[Any, dict[str, Any]]:
    """A source with one thing wrong, and the settings of the matrices."""
    source = dion_state("muon", 0.8, torch.float32)
    names, settings = list(SHAPES), {}
    if change == "no names":
        return source, settings
    if change == "too few names":
        return (source, names[:-1]), settings
    if change == "another name":
        names[1] = "layers.7.w"
    if change == "another shape":
        source["state"][1]["momentum"] = torch.zeros(5, 9)
    if change == "another kind":
        names = [names[2], names[1], names[0], names[3]]
    if change == "unknown":
        source["state"][0] = {"Q": torch.zeros(3)}
    if change == "another rule":
        settings["update_rule"] = "dion2"
    return (source, names), settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no names", "names no parameters; pass (state_dict, names)"),
        ("too few names", "has 4 parameters, but 3 names"),
        ("another name", "layers.1.w and 1 in all are in no source"),
        ("another shape", "layers.1.w: momentum_buffer has shape (5, 9), the parameter (9, 5)"),
        ("another kind", "layers.0.w: its state is of adamw, but its group has update_rule='muon'"),
        ("unknown", "layers.0.w: cannot read a state with ['Q'] into 'muon'"),
        ("another rule", "of dion's 'muon', which cannot become that of 'dion2'"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change: str, message: str) -> None:
    source, settings = broken(change)
    params = {name: start(name) for name in SHAPES}
    optimizer = flash_muon(params, **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_foreign_state(optimizer, source)
    for state in optimizer.state.values():
        assert all(not value.any() for value in state.values())
