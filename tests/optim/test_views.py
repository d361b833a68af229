"""A view's matrices get the updates of separate parameters, bit for bit, under every sharding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon, parameter_groups
from flashns_dist.layout import (
    QKV,
    Equal,
    Flattened,
    MatrixView,
    PackedExperts,
    Sections,
    Split,
    even_flat_layout,
)
from flashns_dist.optim import BoundParameter
from flashns_dist.optim.binding import parameter_blocks
from flashns_dist.optim.rules import MATRIX_RULES
from flashns_dist.testing.pool import RankPool, rank_device


def halves_of_columns(w: Tensor) -> list[Tensor]:
    return [w[:, 0::2], w[:, 1::2]]


def by_group(w: Tensor) -> list[Tensor]:
    """Queries, keys and values of 3 groups of 2 queries, heads of 4."""
    q, k, v = w.unflatten(0, (3, 16)).split([8, 4, 4], dim=1)
    return [part.flatten(0, 1) for part in (q, k, v)]


# Name -> shape, view, and the separate parameters, cut out of the whole one.
# Sizes that no number of ranks divides, so that borders of shards cut through blocks.
CASES: dict[str, tuple[tuple[int, ...], MatrixView, Callable[[Tensor], list[Tensor]]]] = {
    "qkv": ((50, 18), QKV(6, 2), lambda w: list(w.split([30, 10, 10]))),
    "qkv by group": ((48, 18), QKV(6, 3, order="grouped"), by_group),
    "gate and up": ((38, 21), Equal(2), lambda w: list(w.chunk(2))),
    "heads": ((35, 18), Equal(5), lambda w: list(w.split(7))),
    "heads in columns": ((18, 35), Equal(5, dim=1), lambda w: list(w.split(7, dim=1))),
    "mla": (
        (33, 13),
        Sections((7, 4), repeats=3, merged=False),
        lambda w: list(w.split([7, 4] * 3)),
    ),
    "qkv in columns by group": (
        (18, 48),
        QKV(6, 3, order="grouped", dim=1),
        lambda w: [part.T for part in by_group(w.T)],
    ),
    "experts with gate and up": (
        (3, 14, 9),
        Equal(2),
        lambda w: [half for expert in w for half in expert.chunk(2)],
    ),
    "convolution": ((10, 3, 3, 3), Flattened(), lambda w: [w.flatten(1)]),
    "grouped convolution": ((12, 5, 3), Flattened(2), lambda w: list(w.flatten(1).chunk(2))),
    "packed experts": ((11, 24), PackedExperts(4, 11), lambda w: list(w.reshape(4, 11, 6))),
    "split function": ((11, 14), Split(halves_of_columns), halves_of_columns),
}
SETTINGS = {"lr": 0.05, "adjust_lr_fn": "match_rms_adamw"}  # a scale that sees each shape
STEPS = 2
RECTANGLES = ("dion", "dion2")  # rules that need whole rows or columns of what a rank stores


def values(name: str, step: int) -> Tensor:
    seed = 1000 * step + list(CASES).index(name)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CASES[name][0], generator=generator).to(rank_device())


def separately(name: str, updates: int, rule: str = "muon") -> Tensor:
    """The parameter after training its matrices as parameters of their own in one process."""
    _, _, cut = CASES[name]
    start = values(name, 0)
    parameters = [nn.Parameter(matrix.clone()) for matrix in cut(start)]
    alone = ExchangeOptions(replica_group=None)
    optimizer = FlashMuon(parameters, update_rule=rule, exchange=alone, **SETTINGS)
    for step in range(updates):
        for parameter, gradient in zip(parameters, cut(values(name, step + 1)), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    numbers = torch.arange(start.numel()).view(start.shape)
    result = torch.empty_like(start)
    for where, parameter in zip(cut(numbers), parameters, strict=True):
        result.view(-1)[where.to(result.device)] = parameter.detach()
    return result


def compare_with_separate_parameters(kind: str, rule: str) -> None:
    """All cases in one optimizer, sharded as ``kind`` says."""
    names = [name for name in CASES if rule not in RECTANGLES or name != "packed experts"]
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    dim = {"rows": 0, "columns": 1}.get(kind)

    def place(value: Tensor) -> Tensor:
        if dim is None:
            return value.clone()
        return distribute_tensor(value.clone(), mesh, [Shard(dim)], src_data_rank=None)

    parameters = {name: nn.Parameter(place(values(name, 0))) for name in names}
    views = {name: CASES[name][1] for name in names}
    group = {"params": list(parameters.items()), "matrix_view": views}
    optimizer = FlashMuon([group], update_rule=rule, **SETTINGS)
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = place(values(name, step + 1))
        optimizer.step()
    for name, parameter in parameters.items():
        found = parameter.detach()
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        expected = separately(name, STEPS, rule)
        if rule == "dion":  # it sums over ranks, which rounds
            torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5, msg=name)
        else:
            assert torch.equal(whole, expected), name
        assert (whole - values(name, 0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "world_size", "rule"),
    [
        *(("rows", size, "muon") for size in (1, 2, 3, 4)),
        *(("columns", size, "muon") for size in (2, 3)),
        ("replicated", 3, "muon"),
        *(("rows", 3, rule) for rule in MATRIX_RULES if rule != "muon"),
        *(("columns", 3, rule) for rule in MATRIX_RULES if rule != "muon"),
    ],
)
def test_every_view_updates_as_separate_parameters(
    ranks: RankPool, kind: str, world_size: int, rule: str
) -> None:
    ranks.run(world_size, compare_with_separate_parameters, kind, rule)


def compare_flat_ranges() -> None:
    """Each parameter flattened and cut into equal ranges, as ZeRO 3 stores it."""
    size, rank = dist.get_world_size(), dist.get_rank()

    def part(value: Tensor) -> Tensor:
        length = -(-value.numel() // size)
        return value.flatten()[rank * length : (rank + 1) * length].clone()

    storages = {name: nn.Parameter(part(values(name, 0))) for name in CASES}
    optimizer = FlashMuon([{"params": [nn.Parameter(torch.zeros(2, 2))]}], **SETTINGS)
    group = optimizer.param_groups[0]
    group["params"] = list(storages.values())
    group["matrix_view"] = {name: view for name, (_, view, _) in CASES.items()}
    optimizer.state.clear()
    for storage in storages.values():
        momentum = torch.zeros_like(storage.data)
        optimizer.state[storage] = {"step": torch.zeros(()), "momentum_buffer": momentum}

    def adapter() -> list[BoundParameter]:
        return [
            BoundParameter(
                name,
                storages[name],
                0,
                even_flat_layout(shape, size),
                dist.group.WORLD,
                rank,
                Tensor.detach,
                parameter_blocks(name, shape, group),
            )
            for name, (shape, _, _) in CASES.items()
        ]

    optimizer.bind(adapter)
    for step in range(STEPS):
        for name, storage in storages.items():
            storage.grad = part(values(name, step + 1))
        optimizer.step()
    for name, storage in storages.items():
        assert torch.equal(storage.detach(), part(separately(name, STEPS))), name


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_flat_ranges_cut_through_blocks(ranks: RankPool, world_size: int) -> None:
    ranks.run(world_size, compare_flat_ranges)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 10, 3)
        self.grouped = nn.Conv2d(10, 14, 3, groups=2, bias=False)
        self.head = nn.Linear(14, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.grouped(torch.relu(self.first(images))))
        return self.head(hidden.mean((2, 3)))


def train_convolutions(model: nn.Module, steps: int) -> list[Tensor]:
    """Weights after training, and the gradients of each step, gathered."""
    overrides = {"first.weight": "muon", "grouped.weight": "muon"}
    groups = parameter_groups(model, overrides=overrides)
    exchange = ExchangeOptions(wire_dtype=torch.float32)  # bf16 would round other sums elsewhere
    optimizer = FlashMuon(groups, lr=0.05, aux_lr=0.01, exchange=exchange)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(6, 3, 8, 8, generator=generator).to(rank_device())
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in found]


def compare_sharded_convolutions() -> None:
    """FSDP2 and DDP-like replicas on the same batch: the same gradients up to rounding."""
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    torch.manual_seed(0)
    alone = Convolutions().to(rank_device())
    sharded = Convolutions().to(rank_device())
    sharded.load_state_dict(alone.state_dict())
    before = [p.detach().clone() for p in alone.parameters()]
    for part in (sharded.first, sharded.grouped, sharded):
        fully_shard(part, mesh=mesh)
    theirs, ours = train_convolutions(alone, 3), train_convolutions(sharded, 3)
    for start, a, b in zip(before, ours, theirs, strict=True):
        # Gradients are averaged over the ranks, which rounds; steps are of size 0.05.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert (b - start).abs().max() > 1e-3


def test_convolutions_train_under_fsdp2(ranks: RankPool) -> None:
    ranks.run(3, compare_sharded_convolutions)


GATES = {"lstm": 4, "gru": 3}


def compare_gates_of_recurrent_weights() -> None:
    """Modules of torch's own, sharded by rows, against gates that are parameters of their own."""
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))

    def place(value: Tensor) -> Tensor:
        return distribute_tensor(value.clone(), mesh, [Shard(0)], src_data_rank=None)

    torch.manual_seed(0)
    modules = {"lstm": nn.LSTM(5, 7, proj_size=3), "gru": nn.GRUCell(5, 7)}
    model = nn.ModuleDict(modules).to(rank_device())
    gates: dict[str, list[nn.Parameter]] = {}
    for kind, module in model.items():
        for name, param in list(module.named_parameters()):
            if name.startswith("weight"):
                count = 1 if "_hr_" in name else GATES[kind]
                cut = [nn.Parameter(gate.clone()) for gate in param.detach().chunk(count)]
                gates[f"{kind}.{name}"] = cut
            module.register_parameter(name, nn.Parameter(place(param.detach())))
    optimizer = FlashMuon(parameter_groups(model), **SETTINGS)
    alone = ExchangeOptions(replica_group=None)
    separate = FlashMuon([g for cut in gates.values() for g in cut], exchange=alone, **SETTINGS)
    for _ in range(STEPS):
        for name, param in model.named_parameters():
            gradient = torch.randn(param.shape).to(rank_device())
            param.grad = place(gradient)
            if name in gates:
                parts = gradient.chunk(len(gates[name]))
                for gate, part in zip(gates[name], parts, strict=True):
                    gate.grad = part.clone()
        optimizer.step()
        separate.step()
    weights = dict(model.named_parameters())
    for name, cut in gates.items():
        assert torch.equal(weights[name].detach().full_tensor(), torch.cat(cut)), name


@pytest.mark.parametrize("world_size", [1, 3])
def test_gates_of_recurrent_weights_update_as_separate_parameters(
    ranks: RankPool, world_size: int
) -> None:
    ranks.run(world_size, compare_gates_of_recurrent_weights)


@pytest.mark.parametrize("rule", list(MATRIX_RULES))
def test_convolutions_may_be_channels_last(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, 3, 3, generator=generator)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(start.clone(memory_format=layout))
        group = {"params": [weight], "matrix_view": Flattened(), "update_rule": rule}
        optimizer = FlashMuon([group], lr=0.05)
        for seed in range(3):
            gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
            weight.grad = gradient.to(memory_format=layout)
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], start)


def view_that_does_not_fit() -> None:
    """An error on every rank, before any collective: a rank alone gets it too."""
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    value = torch.ones(9, 4, device=rank_device())
    param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None))
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match=r"layers\.0\.qkv: .*Equal.*shape \(9, 4\).*divisor"):
            FlashMuon([{"params": [("layers.0.qkv", param)], "matrix_view": Equal(2)}])


def different_views() -> None:
    """Ranks that disagree about a view all say so."""
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    value = torch.ones(8, 4, device=rank_device())
    param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None))
    view = Sections((2, 6)) if dist.get_rank() else Sections((6, 2))
    optimizer = FlashMuon([{"params": [("layers.0.qkv", param)], "matrix_view": view}])
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"ranks \[1\] disagree.*'layers\.0\.qkv'"):
        optimizer.step()


def test_wrong_views_are_named_on_every_rank(ranks: RankPool) -> None:
    ranks.run(2, view_that_does_not_fit)
    ranks.run(2, different_views)


def test_state_dicts_hold_no_views() -> None:
    """Views are code, as callables are: a checkpoint loads with torch.load(weights_only=True)."""
    param = nn.Parameter(torch.ones(8, 4))
    optimizer = FlashMuon([{"params": [("w", param)], "matrix_view": {"w": Equal(2)}}])
    state = optimizer.state_dict()
    assert isinstance(state["param_groups"][0]["matrix_view"], str)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["matrix_view"] == {"w": Equal(2)}
