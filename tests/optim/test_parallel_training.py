"""Training under DDP, FSDP2, HSDP and FSDP2 + tensor parallel, and checkpoints between them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from flashns_dist import ExchangeOptions, FlashMuon, parameter_groups
from flashns_dist.layout import Equal
from flashns_dist.orthogonalize import POLAR_EXPRESS
from flashns_dist.testing.pool import RankPool, rank_device

VOCABULARY, WIDTH = 23, 20
KELLER = (3.4445, -4.775, 2.0315)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 34)
        self.down = nn.Linear(34, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(scheme: str) -> nn.Module:
    torch.manual_seed(0)
    model = Model().to(rank_device())
    device, size = rank_device().type, dist.get_world_size()
    if scheme == "ddp":
        return DistributedDataParallel(model)
    if scheme == "alone":
        return model
    if scheme == "fsdp+tp":
        mesh = init_device_mesh(device, (size // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
        mesh = mesh["dp"]
    elif scheme == "hsdp":
        mesh = init_device_mesh(device, (2, size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("dp",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def optimizer_for(
    model: nn.Module, scheme: str, rule: str = "muon", aux_rule: str = "adamw", **settings: object
) -> FlashMuon:
    replica_group = None if scheme == "alone" else "world"
    return FlashMuon(
        parameter_groups(model, aux_update_rule=aux_rule),
        update_rule=rule,
        lr=0.05,
        aux_lr=0.01 if aux_rule == "adamw" else 0.001,
        exchange=ExchangeOptions(replica_group=replica_group, wire_dtype=torch.float32),
        **settings,
    )


def data_share(scheme: str) -> tuple[int, int]:
    """(index, number) of this rank's part of the batch."""
    if scheme == "alone":
        return 0, 1
    if scheme == "fsdp+tp":
        return dist.get_rank() // 2, dist.get_world_size() // 2
    return dist.get_rank(), dist.get_world_size()


def clip_gradients(model: nn.Module, clip: float) -> float:
    """``clip_grad_norm_``; mesh by mesh, because torch's own takes DTensors of one mesh only."""
    by_mesh: dict[object, list[nn.Parameter]] = {}
    for param in model.parameters():
        by_mesh.setdefault(getattr(param, "device_mesh", None), []).append(param)
    if len(by_mesh) == 1:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in params]).full_tensor()
        for params in by_mesh.values()
    ]
    total = torch.stack(norms).norm()
    for params in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(params, clip, total)
    return float(total)


def train(
    model: nn.Module, optimizer: FlashMuon, scheme: str, steps: range, clip: float = 0.5
) -> list[float]:
    """The losses over the global batch, with two accumulated micro-batches and clipping."""
    index, number = data_share(scheme)
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCABULARY, (2, 12, 9), generator=generator).to(rank_device())
        total = torch.zeros((), device=rank_device())
        for micro_batch in tokens:
            mine = micro_batch.chunk(number)[index]
            logits = model(mine[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, :-1].flatten())
            (loss / 2).backward()
            total += loss.detach() / 2
        assert clip_gradients(model, clip) > clip
        optimizer.step()
        optimizer.zero_grad()
        if scheme != "alone":
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(float(total))
    return losses


def compare_losses(scheme: str) -> None:
    reference = build("alone")
    expected = train(reference, optimizer_for(reference, "alone"), "alone", range(8))
    model = build(scheme)
    found = train(model, optimizer_for(model, scheme), scheme, range(8))
    assert expected[-1] < 0.8 * expected[0]
    # Gradients are summed in another order; eight steps amplify its last bits a little.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("scheme", "world_size"),
    [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("hsdp", 4), ("fsdp+tp", 4)],
)
def test_losses_equal_those_of_one_process(ranks: RankPool, scheme: str, world_size: int) -> None:
    ranks.run(world_size, compare_losses, scheme)


def save(scheme: str, folder: str, settings: dict[str, object]) -> list[float]:
    """Train 4 steps, save, and go on: the losses after the checkpoint."""
    model = build(scheme)
    optimizer = optimizer_for(model, scheme, **settings)
    train(model, optimizer, scheme, range(4))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return train(model, optimizer, scheme, range(4, 8))


def resume(scheme: str, folder: str, settings: dict[str, object]) -> list[float]:
    model = build(scheme)
    optimizer = optimizer_for(model, scheme, **settings)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return train(model, optimizer, scheme, range(4, 8))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("fsdp", 2), ("fsdp", 2)),
        (("fsdp", 2), ("fsdp", 3)),
        (("fsdp", 4), ("ddp", 2)),
        (("ddp", 2), ("hsdp", 4)),
        (("hsdp", 4), ("alone", 1)),
        (("fsdp+tp", 4), ("fsdp", 2)),
        (("alone", 1), ("fsdp+tp", 4)),
    ],
    ids=lambda value: f"{value[0]}-{value[1]}",
)
def test_a_checkpoint_resumes_under_another_sharding(
    ranks: RankPool, tmp_path: Path, saved: tuple[str, int], loaded: tuple[str, int]
) -> None:
    check_resumed(ranks, str(tmp_path), saved, loaded, {})


def check_resumed(
    ranks: RankPool,
    folder: str,
    saved: tuple[str, int],
    loaded: tuple[str, int],
    settings: dict[str, object],
) -> None:
    expected = ranks.run(saved[1], save, saved[0], folder, settings)[0]
    found = ranks.run(loaded[1], resume, loaded[0], folder, settings)[0]
    rtol = 0.0 if saved == loaded else 2e-4
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=rtol)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(
    ("settings", "saved", "loaded"),
    [
        ({"rule": "normuon", "aux_rule": "lion"}, ("fsdp", 2), ("fsdp", 3)),
        ({"rule": "adamuon"}, ("fsdp", 3), ("ddp", 2)),
        ({"rule": "dion2"}, ("fsdp", 2), ("fsdp", 3)),
        ({"rule": "dion2", "normuon": True}, ("fsdp+tp", 4), ("alone", 1)),
        ({"rule": "dion"}, ("fsdp", 2), ("fsdp", 2)),
        ({"rule": "dion"}, ("alone", 1), ("fsdp", 3)),
    ],
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else value)),
)
def test_every_rules_checkpoint_resumes_under_another_sharding(
    ranks: RankPool,
    tmp_path: Path,
    settings: dict[str, object],
    saved: tuple[str, int],
    loaded: tuple[str, int],
) -> None:
    check_resumed(ranks, str(tmp_path), saved, loaded, settings)


def test_torch_save_resumes_in_one_process(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, FlashMuon]:
        torch.manual_seed(0)
        model = Model().bfloat16()
        return model, FlashMuon(parameter_groups(model), rounding="stochastic", lr=0.05)

    def steps(model: nn.Module, optimizer: FlashMuon, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator).bfloat16()
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c")
    resumed, fresh = make()
    loaded = torch.load(tmp_path / "c", weights_only=True)
    resumed.load_state_dict(loaded["model"])
    fresh.load_state_dict(loaded["optimizer"])
    momenta = [s["momentum_buffer"] for s in fresh.state.values() if "momentum_buffer" in s]
    assert all(m.dtype == torch.float32 for m in momenta)
    steps(model, optimizer, range(3, 6))
    steps(resumed, fresh, range(3, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_torch_muon_checkpoints_load() -> None:
    torch.manual_seed(0)
    start = [torch.randn(12, 20), torch.randn(9, 5)]
    theirs = [nn.Parameter(v.clone()) for v in start]
    muon = torch.optim.Muon(theirs, lr=0.03, momentum=0.8)
    for param in theirs:
        param.grad = torch.randn_like(param)
    muon.step()
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = FlashMuon(ours, method="standard", ns_coefficients=KELLER, ns_dtype=torch.bfloat16)
    optimizer.load_state_dict(copy.deepcopy(muon.state_dict()))  # torch would share the tensors
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert optimizer.param_groups[0]["momentum"] == 0.8
    assert optimizer.param_groups[0]["ns_coefficients"] == KELLER
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], muon.state[b]["momentum_buffer"])
        a.grad = b.grad = torch.randn_like(a)
    before = [p.detach().clone() for p in theirs]
    optimizer.step()
    muon.step()
    for a, b, old in zip(ours, theirs, before, strict=True):
        # Two bf16 iterations differ by 2 to 4 percent; without the momentum it would be 50.
        assert (a - b).norm() < 0.1 * (b - old).norm()


def test_another_number_of_groups_is_refused() -> None:
    one = FlashMuon([nn.Parameter(torch.zeros(3, 4))])
    two = FlashMuon([{"params": [nn.Parameter(torch.zeros(3, 4))]} for _ in range(2)])
    with pytest.raises(ValueError, match="1 parameter groups, the optimizer 2"):
        two.load_state_dict(one.state_dict())


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("saved", "settings", "message"),
    [
        (FlashMuon, {}, r"parameter 0 of group 0: momentum_buffer .* shape \(3, 4\)"),
        (torch.optim.AdamW, {}, r"has \['exp_avg', 'exp_avg_sq'\] of it, and update_rule='muon'"),
        (torch.optim.Muon, {"update_rule": "adamw"}, r"\['momentum_buffer'\] .*'adamw'"),
        (torch.optim.Muon, {"update_rule": "dion2"}, "whose momentum is an average"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    saved: type[torch.optim.Optimizer], settings: dict[str, str], message: str
) -> None:
    state_dict = stepped(saved([nn.Parameter(torch.zeros(3, 4))])).state_dict()
    param = nn.Parameter(torch.zeros(2, 4) if saved is FlashMuon else torch.zeros(3, 4))
    optimizer = FlashMuon([param], **settings)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"])


def load_whole_state_into_shards() -> None:
    """Every rank would take the first rows."""
    whole = stepped(FlashMuon([nn.Parameter(torch.zeros(6, 4, device=rank_device()))]))
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    values = torch.zeros(6, 4, device=rank_device())
    sharded = FlashMuon([nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))])
    with pytest.raises(ValueError, match=r"placements None .* set_optimizer_state_dict"):
        sharded.load_state_dict(whole.state_dict())


def test_a_whole_state_is_not_taken_for_a_shard(ranks: RankPool) -> None:
    ranks.run(2, load_whole_state_into_shards)


def test_a_checkpoint_without_views_keeps_them() -> None:
    param = nn.Parameter(torch.zeros(4, 4))
    optimizer = FlashMuon([{"params": [param], "matrix_view": Equal(2)}])
    optimizer.load_state_dict(FlashMuon([param]).state_dict())
    assert optimizer.param_groups[0]["matrix_view"] == Equal(2)


def test_names_and_views_are_the_models_not_the_checkpoints() -> None:
    """A wrapper (DDP, torch.compile) gives every parameter another name."""
    found = []
    for prefix in ("", "module.", "_orig_mod."):
        param = nn.Parameter(torch.arange(48.0).view(8, 6).cos())
        name = prefix + "w"
        optimizer = FlashMuon([{"params": [(name, param)], "matrix_view": {name: Equal(2)}}])
        if found:
            param.data.copy_(found[0][0])
            optimizer.load_state_dict(copy.deepcopy(found[0][1]))  # or tensors are shared
            assert optimizer.param_groups[0]["param_names"] == [name]
        else:
            stepped(optimizer)
            found.append((param.detach().clone(), copy.deepcopy(optimizer.state_dict())))
        param.grad = torch.arange(48.0).view(8, 6).sin()
        optimizer.step()
        found.append(param.detach().clone())
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize(
    "settings",
    [
        {"matrix_view": Equal(2)},
        {"adjust_lr_fn": lambda rows, cols: 0.5},
        {"ns_dtype": torch.float32},
        {"ns_coefficients": POLAR_EXPRESS},
        {"update_rule": "normuon", "matrix_view": Equal(2)},
    ],
)
def test_flattened_state_dicts_load(settings: dict[str, Any]) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def make() -> tuple[nn.Module, FlashMuon]:
        torch.manual_seed(0)
        model = nn.Linear(6, 8, bias=False)
        return model, FlashMuon([{"params": list(model.parameters()), **settings}], lr=0.3)

    model, optimizer = make()
    stepped(optimizer)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other, resumed = make()
    resumed.param_groups[0]["lr"] = 0.1
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert resumed.param_groups[0]["lr"] == 0.3
    for key, value in settings.items():
        assert resumed.param_groups[0][key] == value
    stepped(optimizer)
    stepped(resumed)
    assert torch.equal(model.weight, other.weight)


def test_states_by_block_of_other_views_are_refused() -> None:
    saved = stepped(
        FlashMuon(
            [{"params": [nn.Parameter(torch.zeros(12, 8))], "matrix_view": Equal(2, 1)}],
            update_rule="normuon",
        )
    ).state_dict()
    optimizer = FlashMuon([nn.Parameter(torch.zeros(12, 8))], update_rule="normuon")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="row_moment in the checkpoint has 24 elements"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
