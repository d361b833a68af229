"""Which parameters are orthogonalized."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations

from flashns_dist import FlashMuon, parameter_groups
from flashns_dist.layout import QKV, Equal, Flattened, Sections
from flashns_dist.testing.pool import RankPool, rank_device


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 16))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(4, 16, 32))
        self.w1_bias = nn.Parameter(torch.zeros(4, 32))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(16)
        self.gate_proj = nn.Linear(16, 32)
        self.router = Router()
        self.experts = Experts()
        self.scale = nn.Parameter(torch.ones(()))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))
        self.attention_biases = nn.Parameter(torch.zeros(4, 9))
        self.lora = nn.Parameter(torch.zeros(16, 1))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tok = nn.Embedding(40, 16)
        self.pos_emb = nn.Parameter(torch.zeros(8, 16))
        self.patch = nn.Conv2d(3, 16, 4)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.unnamed = nn.Linear(16, 40, bias=False)
        self.lm_head = nn.Linear(16, 39)
        self.frozen = nn.Linear(16, 16, bias=False).requires_grad_(False)
        if tied:
            self.unnamed.weight = self.tok.weight


HEAD = "output head: as wide as an embedding"
EXPECTED = {
    "tok.weight": ("adamw", "embedding"),
    "pos_emb": ("adamw", "embedding by name"),
    "patch.weight": ("adamw", "convolution"),
    "patch.bias": ("adamw", "bias"),
    "layers.1.attn_norm.weight": ("adamw", "norm or scalar"),
    "layers.1.gate_proj.weight": ("muon", "matrix"),
    "layers.1.gate_proj.bias": ("adamw", "bias"),
    "layers.1.router.weight": ("adamw", "router by name"),
    "layers.1.experts.w1": ("muon", "stack of matrices"),
    "layers.1.experts.w1_bias": ("adamw", "bias"),
    "layers.1.relative_position_bias_table": ("adamw", "bias"),
    "layers.1.attention_biases": ("adamw", "bias"),
    "layers.1.scale": ("adamw", "norm or scalar"),
    "layers.1.lora": ("adamw", "a vector in shape"),
    "unnamed.weight": ("adamw", HEAD),
    "lm_head.weight": ("adamw", "output head by name"),
    "lm_head.bias": ("adamw", "bias"),
}


def test_each_kind_of_parameter_goes_where_it_belongs() -> None:
    groups = parameter_groups(Model())
    found = {d.name: (d.update_rule, d.reason) for d in groups.decisions}
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    assert "frozen.weight" not in found
    named = {name for group in groups for name, _ in group["params"]}
    assert named == set(found)
    FlashMuon(groups)


HEADED, ROUTED, TOKENS = "output head by name", "router by name", "embedding by name"
NAMES = {
    "register_tokens": ((4, 8), TOKENS),
    "encoder.query_tokens": ((1, 4, 8), TOKENS),
    "encoder.mask_token": ((4, 8), TOKENS),
    "mlp_tokens.weight": ((4, 8), "matrix"),
    "layers.0.mixer.A_log": ((16, 4), "decay by name"),
    "layers.0.mlp.gate.weight": ((4, 8), ROUTED),
    "layers.0.ffn.gate.weight": ((16, 8), "matrix"),
    "layers.0.experts.3.gate.weight": ((4, 8), "matrix"),
    "layers.0.experts.gate": ((2, 4, 8), "stack of matrices"),
    "layers.0.attention.gate.weight": ((8, 8), "matrix"),
    "layers.0.moe.router.weight": ((16, 8), ROUTED),
    "layers.0.moe.gating.weight": ((16, 8), ROUTED),
    "layers.0.moe.gate.wg.weight": ((16, 8), ROUTED),
    "layers.0.attention.output.weight": ((8, 8), "matrix"),
    "model.output.weight": ((16, 8), HEADED),
    "output.weight": ((16, 8), HEADED),
    "output": ((16, 8), HEADED),
    "heads.0.head.weight": ((16, 8), HEADED),
    "fc.weight": ((16, 8), HEADED),
    "module.fc.weight": ((16, 8), HEADED),
    "_orig_mod.fc.weight": ((16, 8), HEADED),
    "_orig_mod.module.fc.weight": ((16, 8), HEADED),
    "layers.0.fc.weight": ((16, 8), "matrix"),
    "block.fc.weight": ((16, 8), "matrix"),
}


@pytest.mark.parametrize("name", list(NAMES))
def test_names_decide(name: str) -> None:
    shape, reason = NAMES[name]
    *path, last = name.split(".")
    module = nn.Module()
    parameter = nn.Parameter(torch.zeros(shape))
    module.register_parameter(last, parameter)
    for part in reversed(path):
        inner, module = module, nn.Module()
        module.add_module(part, inner)
    assert [d.reason for d in parameter_groups(module).decisions] == [reason]


def test_compiled_and_checkpointed_modules_go_where_they_would() -> None:
    def make(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, str]:
        parts = {
            "gate_up_proj": nn.Linear(4, 6),
            "router": nn.Linear(4, 3),
            "lm_head": nn.Linear(4, 5),
        }
        model = nn.ModuleDict({name: wrap(part) for name, part in parts.items()})
        decisions = parameter_groups(model).decisions
        return {
            d.name.split(".")[0]: f"{d.reason} {d.view}" for d in decisions if d.param.ndim == 2
        }

    plain = make(lambda module: module)
    assert "output head" in plain["lm_head"]
    assert make(torch.compile) == plain
    assert make(checkpoint_wrapper) == plain


PARAMETRIZED = {
    "table": nn.Embedding(5, 4),
    "conv": nn.Conv1d(4, 4, 3, groups=2),
    "lm_head": nn.Linear(4, 6),
    "last": nn.Linear(4, 5),
    "norm": nn.Linear(4, 4),
    "gate_up_proj": nn.Linear(4, 6),
    "attention": nn.MultiheadAttention(4, 2),
    "matrix": nn.Linear(4, 4),
}


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_modules_go_where_they_would(name: str) -> None:
    def found(model: nn.Module) -> set[tuple[str, ...]]:
        decisions = parameter_groups(model, overrides={"conv.*weight*": "muon"}).decisions
        return {
            (d.name.split(".")[0], d.update_rule, d.reason, str(d.view))
            for d in decisions
            if not d.name.endswith("original0")  # the lengths of weight_norm
        }

    parts = copy.deepcopy(PARAMETRIZED)
    plain = found(nn.ModuleDict(parts))
    for key, part in parts.items():
        tensor = "in_proj_weight" if key == "attention" else "weight"
        getattr(parametrizations, name)(part, tensor)
    assert found(nn.ModuleDict(parts)) == plain
    assert {d.reason for d in parameter_groups(parts["table"]).decisions} == {"embedding"}


def flat_parameters(use_orig_params: bool) -> None:
    part = FullyShardedDataParallel(
        nn.Linear(4, 4).to(rank_device()), use_orig_params=use_orig_params, device_id=rank_device()
    )
    with pytest.raises(ValueError, match=r"layer: FullyShardedDataParallel .*fully_shard"):
        parameter_groups(nn.ModuleDict({"layer": part}))
    with pytest.raises(ValueError, match="the model: FullyShardedDataParallel"):
        parameter_groups(part)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_parameters_are_refused(ranks: RankPool, use_orig_params: bool) -> None:
    ranks.run(2, flat_parameters, use_orig_params)


def test_tied_weights_are_counted_once_and_auxiliary() -> None:
    names = [d.name for d in parameter_groups(Model(tied=True)).decisions]
    assert "tok.weight" in names
    assert "unnamed.weight" not in names


# Embeddings (rows, width), hidden matrices and heads (in, out), of such widths.
WIDTHS = {
    "nanoGPT": ([(96, 32), (32, 32)], [(32, 128), (32, 32), (128, 32)], []),
    "BERT": ([(96, 32), (32, 32), (2, 32)], [(32, 32)] * 4 + [(32, 64), (64, 32)], [(32, 2)]),
    "T5": ([(96, 32), (32, 4)], [(32, 32)] * 4 + [(32, 64), (64, 32)], [(32, 96)]),
    "several heads": ([(96, 32)], [(32, 32), (32, 64), (64, 32)], [(32, 96)] * 3),
    "one head as wide as the model": ([(32, 32)], [(32, 64), (64, 48)], [(48, 32)]),
}


@pytest.mark.parametrize("kind", list(WIDTHS))
def test_hidden_matrices_as_wide_as_an_embedding_has_rows_are_no_heads(kind: str) -> None:
    embeddings, hidden, heads = WIDTHS[kind]
    model = nn.ModuleDict(
        {
            "tables": nn.ModuleList([nn.Embedding(*shape) for shape in embeddings]),
            "hidden": nn.ModuleList([nn.Linear(*shape, bias=False) for shape in hidden]),
            "last": nn.ModuleList([nn.Linear(*shape, bias=False) for shape in heads]),
        }
    )
    kinds = {"tables": "embedding", "hidden": "matrix", "last": HEAD}
    found = parameter_groups(model).decisions
    assert [d.reason for d in found] == [kinds[d.name.split(".")[0]] for d in found]


def test_a_tied_head_counts_among_the_matrices_of_its_width() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(8, 8), "down": nn.Linear(16, 8, bias=False)})
    model["last"] = nn.Linear(8, 8, bias=False)
    model["last"].weight = model["table"].weight
    assert [d.update_rule for d in parameter_groups(model).decisions] == ["adamw", "muon"]


def test_the_table_counts_layers_together() -> None:
    table = parameter_groups(Model()).table()
    line = next(line for line in table.splitlines() if "gate_proj.weight" in line)
    assert line.split() == [
        "muon",
        "layers.*.gate_proj.weight",
        "2",
        "32",
        "x",
        "16",
        "1,024",
        "matrix",
    ]


def test_overrides_decide_first() -> None:
    overrides = {"layers.0.*.weight": "frozen", "*gate_proj*": "adamw", "pos_emb": "muon"}
    found = {
        d.name: d.update_rule for d in parameter_groups(Model(), overrides=overrides).decisions
    }
    assert found["layers.0.gate_proj.weight"] == "frozen"
    assert found["layers.1.gate_proj.weight"] == "adamw"
    assert found["pos_emb"] == "muon"
    names = [n for g in parameter_groups(Model(), overrides=overrides) for n, _ in g["params"]]
    assert "layers.0.gate_proj.weight" not in names


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers.*": "sgd"}, "'sgd'"),
        ({"nothing.*": "muon"}, "match no trainable"),
        ("layers.*", r"overrides='layers.\*' must map name patterns"),
        ({3: "muon"}, r"overrides=\{3: 'muon'\} must map name patterns"),
    ],
)
def test_a_wrong_override_is_named(overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(Model(), overrides=overrides)


@pytest.mark.parametrize("rule", ["muon", None, ["adamw"]])
def test_a_wrong_rule_of_auxiliary_parameters_is_named(rule: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"aux_update_rule={rule!r}: use one of")):
        parameter_groups(Model(), aux_update_rule=rule)


def test_matrices_take_the_optimizers_rule() -> None:
    groups = parameter_groups(Model(), overrides={"layers.0.gate*.weight": "normuon"})
    assert [group.get("update_rule") for group in groups] == [None, "normuon", "adamw"]
    optimizer = FlashMuon(groups, update_rule="normuon")
    assert [g["update_rule"] for g in optimizer.param_groups] == ["normuon", "normuon", "adamw"]


def test_group_settings_reach_the_optimizer() -> None:
    groups = parameter_groups(Model(), lr=0.5, aux_lr=0.25, aux_weight_decay=0.125, eps=1e-6)
    optimizer = FlashMuon(groups, lr=1.0, weight_decay=0.2)
    muon, adamw = optimizer.param_groups
    assert (muon["update_rule"], muon["lr"], muon["weight_decay"]) == ("muon", 0.5, 0.2)
    assert (adamw["lr"], adamw["weight_decay"], adamw["eps"]) == (0.25, 0.125, 1e-6)
    assert optimizer.param_groups[0]["param_names"][0] == "layers.0.gate_proj.weight"


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4)
        self.conv = nn.Conv2d(8, 12, 3, groups=4)
        self.upsample = nn.ConvTranspose1d(8, 12, 3)
        self.qkv_proj = nn.Linear(16, 32, bias=False)
        self.gate_up_proj = nn.Linear(16, 64, bias=False)
        self.experts = Experts()


def decisions(**arguments: object) -> dict[str, tuple[str, str, object]]:
    found = parameter_groups(Fused(), **arguments).decisions
    return {d.name: (d.update_rule, d.reason, d.view) for d in found}


def test_views_are_found_where_modules_leave_no_doubt() -> None:
    found = decisions(overrides={"conv.weight": "muon"})
    assert found["attention.in_proj_weight"] == ("muon", "matrix", Equal(3))
    assert found["gate_up_proj.weight"] == ("muon", "matrix", Equal(2))
    assert found["conv.weight"] == ("muon", "override 'conv.weight'", Flattened(4))
    assert found["upsample.weight"] == ("adamw", "convolution", None)
    assert found["experts.w1"] == ("muon", "stack of matrices", None)
    rule, reason, view = found["qkv_proj.weight"]
    assert (rule, view) == ("muon", None)
    assert reason == "matrix, fused by its name: see matrix_views"


def test_recurrent_weights_are_cut_into_gates() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=4),
            "lstm_cell": nn.LSTMCell(6, 8),
            "gru": nn.GRU(6, 8, num_layers=2),
            "gru_cell": nn.GRUCell(6, 8),
            "rnn": nn.RNN(6, 8),
        }
    )
    gates = {"lstm": Equal(4), "lstm_cell": Equal(4), "gru": Equal(3), "gru_cell": Equal(3)}
    for decision in parameter_groups(model).decisions:
        kind, name = decision.name.split(".")
        if name.startswith("bias"):
            assert decision.update_rule == "adamw"
        else:
            view = None if name.startswith("weight_hr") else gates.get(kind)
            assert (decision.update_rule, decision.view) == ("muon", view)


def test_declared_views_come_first_and_make_matrices() -> None:
    views = {"qkv*": QKV(4, 2), "conv.weight": Flattened(4), "gate_up*": None, "up*": Flattened()}
    found = decisions(matrix_views=views, overrides={"upsample.*": "adamw"})
    assert found["qkv_proj.weight"] == ("muon", "declared by 'qkv*'", QKV(4, 2))
    assert found["conv.weight"] == ("muon", "declared by 'conv.weight'", Flattened(4))
    assert found["gate_up_proj.weight"] == ("muon", "matrix", None)
    assert found["upsample.weight"] == ("adamw", "override 'upsample.*'", None)
    table = parameter_groups(Fused(), matrix_views={"qkv*": QKV(4, 2)}).table()
    assert "declared by 'qkv*': QKV(num_heads=4, num_kv_heads=2" in table


def test_views_reach_the_optimizer() -> None:
    model = Fused()
    optimizer = FlashMuon(parameter_groups(model, matrix_views={"qkv*": QKV(4, 2)}))
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    shapes = {b.name: [block.shape for block in b.blocks] for b in optimizer._bound}
    assert shapes["qkv_proj.weight"] == [(16, 16), (8, 16), (8, 16)]
    assert shapes["attention.in_proj_weight"] == [(16, 16)] * 3
    assert shapes["experts.w1"] == [(16, 32)] * 4


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"qkv*": Sections((16, 8))}, r"qkv_proj.weight: matrix_view Sections.* \(32, 16\): "),
        ({"nothing.*": Equal(2)}, r"matrix_views \['nothing.\*'\] match no trainable"),
        ({"qkv*": "qkv"}, "qkv_proj.weight: matrix_view qkv .*: it is no view"),
        ({"qkv*": Equal}, "qkv_proj.weight: .*: it is a class; make a view of it"),
        ({3: Equal(2)}, r"matrix_views=\{3: Equal.* must map name patterns"),
        ("qkv*", r"matrix_views='qkv\*' must map name patterns"),
        (Equal(2), r"matrix_views=Equal.* must map name patterns"),
    ],
)
def test_a_wrong_view_is_named(views: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(Fused(), matrix_views=views)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            {"params": [("w", nn.Parameter(torch.zeros(6, 4)))], "matrix_view": Equal(4)},
            "w: matrix",
        ),
        (
            {"params": [("w", nn.Parameter(torch.zeros(6, 4)))], "matrix_view": {"v*": Equal(2)}},
            r"patterns \['v\*'\] match no parameter .* \['w'\]",
        ),
        (
            {"params": [nn.Parameter(torch.zeros(6, 4))], "matrix_view": {"w": Equal(2)}},
            r"pass \(name, parameter\) pairs",
        ),
        (
            {"params": [("w", nn.Parameter(torch.zeros(6, 4)))], "matrix_view": Equal("2")},
            r"w: matrix_view Equal.* count='2' must be a whole number",
        ),
        (
            {"params": [("w", nn.Parameter(torch.zeros(6, 4)))], "matrix_view": {3: Equal(2)}},
            "mapping from name patterns",
        ),
    ],
)
def test_a_groups_wrong_view_is_named_and_not_added(group: dict[str, object], message: str) -> None:
    first = nn.Parameter(torch.zeros(3, 3))
    optimizer = FlashMuon([("first", first) if isinstance(group["params"][0], tuple) else first])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
