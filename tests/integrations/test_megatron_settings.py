"""Flags, refusals, and where things lie: what needs no training."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("megatron.core")

from flashns_dist.layout import leading_blocks
from flashns_dist.testing.pool import RankPool
from tests.integrations.megatron_training import (
    Case,
    make_chunks,
    make_optimizer,
    megatron_ready,
)


def config(**values: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig

    return OptimizerConfig(optimizer="flashmuon", lr=0.02, weight_decay=0.1, **values)


def resolved(settings: dict[str, Any] | None = None, **values: Any) -> Any:
    from flashns_dist.integrations.megatron.settings import Settings, resolve

    return resolve(config(**values), Settings(**(settings or {})))


# Settings -------------------------------------------------------------------------------------


def test_flags_of_megatrons_muon_are_followed() -> None:
    values = resolved(
        muon_momentum=0.8,
        muon_scale_mode="spectral",
        muon_extra_scale_factor=0.2,
        muon_fp32_matmul_prec="high",
        muon_split_qkv=False,
        adam_beta2=0.99,
    )
    arguments = values.arguments
    assert arguments["momentum"] == 0.8
    assert arguments["adjust_lr_fn"](32, 128) == pytest.approx(0.2 * 128**0.5)
    assert arguments["ns_dtype"] == torch.float32
    assert arguments["betas"] == (0.9, 0.99)
    assert not values.settings.split_qkv
    assert arguments["method"] == "auto"


def test_newton_schulz_steps_of_megatrons_are_taken_when_given() -> None:
    values = resolved(muon_num_ns_steps=10)
    assert values.arguments["method"] == "standard"
    rows = values.arguments["ns_coefficients"]
    assert len(rows) == 10
    assert rows[0] == rows[5] == (4.0848, -6.8946, 2.9270)
    with pytest.raises(ValueError, match="muon-num-ns-steps 7"):
        resolved(muon_num_ns_steps=7)
    with pytest.raises(ValueError, match="Give one pair only"):
        resolved({"method": "gram"}, muon_num_ns_steps=10)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("muon_scalar_optimizer", "lion", "lion"), ("muon_tp_mode", "blockwise", "blockwise")],
)
def test_what_cannot_be_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """Of 0.17 and main; 0.16 has no scalar optimizer, and another default of the mode."""
    from flashns_dist.integrations.megatron import settings

    monkeypatch.setattr(settings._MuonFlags, "is_changed", lambda self, key: f"muon_{key}" == name)
    given = config()
    setattr(given, name, value)
    with pytest.raises(ValueError, match=message):
        settings.resolve(given, settings.Settings())


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_matrices_do_not_travel_in_fp16(dtype: str) -> None:
    from flashns_dist.integrations.megatron.command_line import add_arguments

    with pytest.raises(ValueError, match=r"the range of fp16|use one of \['bf16', 'fp32'\]"):
        resolved({"wire_dtype": dtype})
    with pytest.raises(SystemExit):
        add_arguments(argparse.ArgumentParser()).parse_args(["--flashmuon-wire-dtype", dtype])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_rule": "normuon"}, "'normuon' under Megatron: its state 'row_moment'"),
        ({"update_rule": "dion"}, "'dion' under Megatron: its state 'right_factor'"),
        ({"overrides": {"*.mlp.*": "dion"}}, "'dion' under Megatron: its state 'right_factor'"),
        (
            {"update_rule": "dion2", "rule_settings": {"normuon": True}},
            "'dion2' under Megatron: its state 'row_moment'",
        ),
    ],
)
def test_rules_whose_state_checkpoints_would_lose_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        resolved(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_rule": "adamw"}, "--flashmuon-update-rule adamw: use one of"),
        ({"update_rule": ["muon"]}, r"--flashmuon-update-rule \['muon'\]: use one of"),
        ({"aux_update_rule": "muon"}, "--flashmuon-aux-update-rule muon: use one of"),
        ({"overrides": {"*.mlp.*": "sgd"}}, r"--flashmuon-overrides \*.mlp.\*=sgd"),
        ({"rule_settings": {"lr": 0.1}}, "--flashmuon-rule-settings lr: the update rules have"),
        ({"rule_settings": {"fraction": 0.5}}, "fraction=0.5 is a setting of the update rules"),
        ({"update_rule": "dion2", "rule_settings": {"fraction": 2.0}}, "fraction=2.0 must be in"),
    ],
)
def test_unsuitable_rules_and_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(settings)


def test_overrides_name_rules_beside_that_of_the_matrices() -> None:
    nesterov = next(name for name in vars(config()) if name.endswith("nesterov"))
    values = resolved(
        {
            "update_rule": "adamuon",
            "rule_settings": {"fraction": 0.5, "equilibrate": True},
            "overrides": {"*.mlp.*": "dion2", "*.router.*": "muon"},
        },
        **{nesterov: True},
    )
    assert set(values.groups) == {"adamuon", "adamw", "dion2"}
    assert values.groups["dion2"]["fraction"] == 0.5
    assert "fraction" not in values.groups["adamuon"]
    for expected in (
        "update_rule of matrices = adamuon, equilibrate = True, renormalize = none, "
        "independent_decay = False, beta2 = 0.95",
        "update_rule of auxiliary parameters = adamw",
        "--muon-nesterov: dion2 has no Nesterov momentum",
    ):
        assert expected in values.lines


def test_the_banner_says_what_the_flags_resolve_to() -> None:
    text = "\n".join(resolved({"aux_lr": 1e-3, "overrides": {"*.router.*": "muon"}}).lines)
    for expected in ("momentum = 0.95", "aux_lr = 0.001", "*.router.* = muon", "--muon-tp-mode"):
        assert expected in text


# Command line ---------------------------------------------------------------------------------


def test_the_command_line_of_megatron_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for megatron.training, which is not in the package of 0.16."""
    from flashns_dist.integrations.megatron.command_line import install_arguments

    module: Any = types.ModuleType("megatron.training.arguments")
    seen = []

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--optimizer", choices=["adam", "muon"], default="adam")
        parser.add_argument("--ckpt-format", default="torch_dist")
        parser.add_argument("--save")
        return parser

    def validate(args: Any, defaults: Any = None) -> Any:
        seen.append(args.optimizer)
        return args

    module.add_megatron_arguments, module.validate_args = add, validate
    holder: Any = types.ModuleType("holder_of_validate_args")
    holder.validate_args = validate
    package = types.ModuleType("megatron.training")
    monkeypatch.setitem(sys.modules, "megatron.training", package)
    monkeypatch.setitem(sys.modules, "megatron.training.arguments", module)
    monkeypatch.setitem(sys.modules, "holder_of_validate_args", holder)
    found: list[Any] = []
    install_arguments(found.append)
    parser = module.add_megatron_arguments(argparse.ArgumentParser())
    line = "--optimizer flashmuon --flashmuon-aux-lr 0.001 --no-flashmuon-split-gate-up"
    args = parser.parse_args(
        [
            *line.split(),
            *("--flashmuon-overrides", "*.router.*=muon", "--save", "there"),
            *("--flashmuon-update-rule", "dion2", "--flashmuon-aux-update-rule", "lion"),
            *("--flashmuon-rule-settings", "fraction=0.5", "equilibrate=true", "select=rows"),
        ]
    )
    assert holder.validate_args(args).optimizer == "flashmuon"
    assert seen == ["adam"]
    (settings,) = found
    assert settings.aux_lr == 0.001
    assert not settings.split_gate_up
    assert settings.split_qkv
    assert settings.overrides == {"*.router.*": "muon"}
    assert (settings.update_rule, settings.aux_update_rule) == ("dion2", "lion")
    assert settings.rule_settings == {"fraction": 0.5, "equilibrate": True, "select": "rows"}
    for entry in ("fraction=half", "equilibrate=1", "lr=0.1", "fraction"):
        args.flashmuon_rule_settings = [entry]
        with pytest.raises(ValueError, match=f"--flashmuon-rule-settings {entry}: write"):
            module.validate_args(args)
    args.ckpt_format = "torch"
    with pytest.raises(NotImplementedError, match="--ckpt-format torch:"):
        module.validate_args(args)
    module.validate_args(parser.parse_args(["--optimizer", "muon"]))
    assert seen == ["adam", "muon"]


# Versions -------------------------------------------------------------------------------------


def test_an_unknown_version_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashns_dist.integrations.megatron import internals
    from megatron.core import optimizer as core_optimizer

    name = "_get_megatron_optimizer_based_on_param_groups"
    monkeypatch.delattr(core_optimizer, name)
    with pytest.raises(RuntimeError, match=rf"has no megatron\.core\.optimizer\.{name}"):
        internals.check_version()


# Refusals -------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    messages = {}
    with megatron_ready(Case()):
        for name, value in (
            ("optimizer_cpu_offload", True),
            ("use_precision_aware_optimizer", True),
            ("decoupled_weight_decay", False),
        ):
            chunks = make_chunks(Case())
            messages[name] = refused(chunks, **{name: value})
        chunks = make_chunks(Case())
        chunks[0].ddp_config = replace(chunks[0].ddp_config, use_megatron_fsdp=True)
        messages["Megatron-FSDP"] = refused(chunks)
        chunks = make_chunks(Case())
        chunks[0].config.gtp_weight_remat_size = 2
        messages["generalized tensor parallelism"] = refused(chunks)
        chunks = make_chunks(Case(experts=2))
        chunks[0].config.expert_tensor_parallel_size = 2
        messages["expert_tensor_parallel_size=2"] = refused(chunks)
        messages["model chunk"] = refused([nn.Linear(2, 2)])
    return messages


def refused(chunks: list[Any], **values: Any) -> str:
    from flashns_dist.integrations.megatron.support import check_supported

    given = config()
    for name, value in values.items():
        object.__setattr__(given, name, value)
    try:
        check_supported(given, chunks)
    except NotImplementedError as error:
        return str(error)
    return ""


def test_unsupported_features_are_refused_by_name(ranks: RankPool) -> None:
    for name, message in ranks.run(1, refusals)[0].items():
        assert message.startswith("FlashMuon does not support Megatron's")
        assert name in message


@pytest.mark.parametrize("degree", ["pipeline_model_parallel_size", "expert_model_parallel_size"])
def test_a_step_that_would_be_skipped_by_a_part_is_refused(degree: str) -> None:
    from flashns_dist.integrations.megatron.support import check_skipping

    chunk: Any = types.SimpleNamespace(config=types.SimpleNamespace(**{degree: 2}))
    with pytest.raises(NotImplementedError, match="--flashmuon-nonfinite skip with pipeline"):
        check_skipping(config(), [chunk])
    check_skipping(config(bf16=True), [chunk])
    check_skipping(config(use_distributed_optimizer=True), [chunk])
    setattr(chunk.config, degree, 1)
    check_skipping(config(), [chunk])


# Which parameters are matrices ----------------------------------------------------------------


def rules_of(case: Case) -> dict[str, str]:
    with megatron_ready(case):
        chunks = make_chunks(case)
        for name, param in chunks[0].named_parameters():
            if "layers.1.mlp.linear_fc2" in name:
                param.use_muon = False
        optimizer = make_optimizer(case, chunks)
        child = optimizer.chained_optimizers[0]
        names = {param: name for name, param in chunks[0].named_parameters()}
        return {names[p].removeprefix("module."): r for p, r in child.flashmuon_rules.items()}


def test_what_is_orthogonalized(ranks: RankPool) -> None:
    case = Case(settings={"overrides": {"*.0.mlp.linear_fc1.weight": "adamw"}})
    rules = ranks.run(1, rules_of, case)[0]
    matrices = {name for name, rule in rules.items() if rule == "muon"}
    attention = ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight")
    assert matrices == {
        *(f"decoder.layers.{i}.{name}" for i in (0, 1) for name in attention),
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
    }


def refuse_override(case: Case, message: str) -> None:
    with megatron_ready(case), pytest.raises(ValueError, match=message):
        make_optimizer(case, make_chunks(case))


def test_an_override_that_gives_a_vector_a_matrices_rule_is_refused(ranks: RankPool) -> None:
    """On all ranks of the pipeline: the last one alone has the final norm."""
    case = Case(pp=2, settings={"overrides": {"*.final_layernorm.*": "muon"}})
    message = r"final_layernorm\.\*=muon: decoder\.final_layernorm\.\w+ of shape \(32,\) is not a"
    ranks.run(2, refuse_override, case, message)


def refuse_four_dims(case: Case, attribute: bool, message: str) -> None:
    """Of a parameter that the first stage alone has."""
    with megatron_ready(case):
        chunks = make_chunks(case)
        if dist.get_rank() == 0:
            chunks[0].module.kernel = nn.Parameter(torch.zeros(4, 2, 3, 3))
            if attribute:
                chunks[0].module.kernel.use_muon = True
        with pytest.raises(ValueError, match=message):
            make_optimizer(case, chunks)


@pytest.mark.parametrize(
    ("attribute", "overrides", "asked"),
    [(True, {}, "use_muon=True"), (False, {"ker*": "adamuon"}, r"overrides ker\*=adamuon")],
)
def test_four_dims_that_are_no_convolution_are_no_matrices(
    ranks: RankPool, attribute: bool, overrides: dict[str, str], asked: str
) -> None:
    message = rf"{asked}: kernel of shape \(4, 2, 3, 3\) is not a matrix, a stack of matrices or"
    case = Case(pp=2, settings={"overrides": overrides})
    ranks.run(2, refuse_four_dims, case, attribute, message)


def rules_of_chunks(case: Case) -> list[set[str]]:
    """Of each chunk on this rank, the rules of its ``linear_fc1``."""
    with megatron_ready(case):
        chunks = make_chunks(case)
        rules = make_optimizer(case, chunks).chained_optimizers[0].flashmuon_rules
        return [{rules[p] for n, p in c.named_parameters() if "fc1.weight" in n} for c in chunks]


def test_an_override_can_name_one_chunk_of_a_virtual_pipeline(ranks: RankPool) -> None:
    """Megatron names the layers of every chunk from 0."""
    overrides = {"chunk1.*.linear_fc1.weight": "adamw"}
    case = Case(pp=2, virtual=2, layers=4, settings={"overrides": overrides})
    assert ranks.run(2, rules_of_chunks, case) == [[{"muon"}, {"adamw"}]] * 2


def overridden(name: str, told: dict[str, Any]) -> dict[str, set[Any]]:
    """Epsilon and betas of the auxiliary groups that a key of Megatron's chooses, and of others."""
    from flashns_dist.integrations.megatron import Settings
    from megatron.core.optimizer import ParamKey, get_megatron_optimizer

    case = Case(distributed=False)
    with megatron_ready(case):
        given = config(adam_eps=1e-6)
        given.flashmuon = Settings()
        chunks = make_chunks(case)
        made = get_megatron_optimizer(given, chunks, {ParamKey(name=name): told})
        found: dict[str, set[Any]] = {"chosen": set(), "others": set()}
        for param_name, param in chunks[0].named_parameters():
            group = next(g for g in made.param_groups if any(p is param for p in g["params"]))
            kind = "chosen" if "final_layernorm" in param_name else "others"
            if group["update_rule"] == "adamw":
                found[kind].add((group["eps"], tuple(group["betas"])))
        return found


def test_megatrons_overrides_by_parameter_reach_adamw(ranks: RankPool) -> None:
    told = {"eps": 1e-4, "betas": (0.8, 0.9)}
    found = ranks.run(1, overridden, "*final_layernorm*", told)[0]
    assert found == {"chosen": {(1e-4, (0.8, 0.9))}, "others": {(1e-6, (0.9, 0.999))}}


# Layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_shard_layouts_say_where_every_element_is(dim: int, num_ranks: int) -> None:
    """Against slices of a numbered matrix, with a bucket that begins and ends elsewhere."""
    from flashns_dist.integrations.megatron.layouts import (
        buffer_ranges,
        holdings_of,
        shard_layout,
    )

    num_shards, shape = (1 if dim < 0 else 2), (10, 14)
    local_shape = tuple(n // num_shards if axis == dim else n for axis, n in enumerate(shape))
    numbers = torch.arange(140).view(shape)
    shards = numbers.chunk(num_shards, dim) if dim >= 0 else (numbers,)
    numel = shards[0].numel()
    start, bucket = 64, 64 * num_ranks * 5
    ranges = buffer_ranges(start, start + numel, 0, bucket, num_ranks)
    members = [(t, d) for d in range(num_ranks) for t in range(num_shards)]
    layout = shard_layout(local_shape, dim, num_shards, holdings_of(members, ranges))
    assert layout.shape == shape
    found = torch.full(shape, -1)
    for (shard, replica), fragments in zip(members, layout.fragments, strict=True):
        first, last = ranges[replica]
        storage = shards[shard].reshape(-1)[first:last]
        for fragment in fragments:
            found[fragment.box.slices_in(leading_blocks(shape)[0].parts[0])] = fragment.view(
                storage
            )
    assert torch.equal(found, numbers)


def packed_experts(gated: bool, num_shards: int) -> list[list[tuple[int, int]]]:
    from flashns_dist.integrations.megatron.matrices import describe

    class GroupedMLP(nn.Module):
        """The packed layout of 0.16, whose own class needs a GPU library."""

        num_local_experts = 3
        config = types.SimpleNamespace(gated_linear_unit=gated)

    found = []
    for name, shape, dim in (("weight1", (8, 3 * 12), 1), ("weight2", (3 * 6, 8), 0)):
        param = nn.Parameter(torch.zeros(shape))
        param.tensor_model_parallel, param.partition_dim = True, dim  # type: ignore[attr-defined]
        described = describe(
            f"mlp.experts.{name}",
            param,
            [GroupedMLP()],
            num_shards,
            is_matrix=True,
            split_qkv=True,
            split_gate_up=True,
        )
        found.append([block.shape for block in described.blocks])
    return found


def test_packed_experts_are_matrices_by_expert() -> None:
    assert packed_experts(False, 1) == [[(8, 12)] * 3, [(6, 8)] * 3]
    assert packed_experts(True, 1) == [[(8, 6)] * 6, [(6, 8)] * 3]
    assert packed_experts(True, 2) == [[(8, 12)] * 6, [(12, 8)] * 3]


@pytest.mark.parametrize(
    ("groups", "cut", "shapes"),
    [
        (1, None, [(6, 36)]),
        (2, None, [(3, 18)] * 2),
        (1, 0, [(12, 36)]),  # shards of the outputs
        (1, 1, [(6, 72)]),
        (2, 0, [(3, 18)] * 4),  # shards of the groups
    ],
)
def test_a_convolution_is_a_matrix_by_group(
    groups: int, cut: int | None, shapes: list[tuple[int, int]]
) -> None:
    from flashns_dist.integrations.megatron.matrices import describe

    layer: Any = nn.Conv2d(4, 6, 3, groups=groups)
    if cut is not None:
        layer.weight.tensor_model_parallel, layer.weight.partition_dim = True, cut
    described = describe(
        "patches.weight",
        layer.weight,
        [layer],
        2,
        is_matrix=True,
        split_qkv=True,
        split_gate_up=True,
    )
    assert [block.shape for block in described.blocks] == shapes


def test_grouped_experts_are_split_like_dense_layers() -> None:
    """TEGroupedMLP stores one (out, in) weight per expert."""
    from flashns_dist.integrations.megatron.matrices import describe

    class Grouped(nn.Module):
        config = types.SimpleNamespace(gated_linear_unit=True)

    shapes = {}
    for name in ("linear_fc1.weight3", "linear_fc2.weight0"):
        described = describe(
            f"decoder.layers.0.mlp.experts.{name}",
            nn.Parameter(torch.zeros(12, 8)),
            [Grouped()],
            1,
            is_matrix=True,
            split_qkv=True,
            split_gate_up=True,
        )
        shapes[name] = [block.shape for block in described.blocks]
    assert shapes == {"linear_fc1.weight3": [(6, 8), (6, 8)], "linear_fc2.weight0": [(12, 8)]}


def test_a_gated_attention_has_four_matrices() -> None:
    """By query group: queries, their gates, key, value."""
    from flashns_dist.integrations.megatron.matrices import describe

    class Attention(nn.Module):
        config = types.SimpleNamespace(
            num_query_groups=2, num_attention_heads=4, kv_channels=3, attention_output_gate=True
        )

    name = "decoder.layers.0.self_attention.linear_qkv.weight"

    def shapes(rows: int) -> list[tuple[int, int]]:
        param = nn.Parameter(torch.zeros(rows, 8))
        owners = [nn.Linear(1, 1), Attention()]
        described = describe(
            name, param, owners, 1, is_matrix=True, split_qkv=True, split_gate_up=True
        )
        return [block.shape for block in described.blocks]

    assert shapes(36) == [(12, 8), (12, 8), (6, 8), (6, 8)]
    with pytest.raises(ValueError, match=f"{name}: 35 rows are not those of 4 attention heads"):
        shapes(35)


SCRIPT = """
import sys
from megatron.core.optimizer import get_megatron_optimizer
import neighbour
print(get_megatron_optimizer.__code__.co_filename, sys.argv[1:], __name__)
"""


def test_the_launcher_runs_a_script_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "pretrain.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("")
    command = [sys.executable, "-W", "ignore", "-m", "flashns_dist.integrations.megatron"]
    script = str(tmp_path / "pretrain.py")
    done = subprocess.run(
        [*command, script, "--optimizer", "flashmuon"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert "hooks.py ['--optimizer', 'flashmuon'] __main__" in last


def test_the_launcher_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    from flashns_dist.integrations.megatron.__main__ import main

    with pytest.raises(SystemExit) as asked:
        main(["megatron", "--help"])
    assert not asked.value.code
    assert "SCRIPT [ARGUMENT ...]" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="usage"):
        main(["megatron"])


def test_the_launcher_names_a_script_that_is_not_there() -> None:
    from flashns_dist.integrations.megatron.__main__ import main

    with pytest.raises(SystemExit, match=r"nowhere\.py: no such script"):
        main(["megatron", "nowhere.py"])
