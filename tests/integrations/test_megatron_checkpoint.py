"""Checkpoints of Megatron runs with FlashMuon: saved on some ranks, resumed on others."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from flashns_dist.testing.pool import RankPool
from tests.integrations.megatron_training import (
    Case,
    make_chunks,
    make_optimizer,
    megatron_ready,
    resume,
    save,
    skip_what_this_megatron_lacks,
    train,
    train_and_save,
)

FULL, BY_DATA = "fully_reshardable", "dp_reshardable"
PLAIN = Case(gated=True)
EXPERTS = Case(gated=True, experts=4)
ADAMUON = Case(gated=True, settings={"update_rule": "adamuon", "aux_update_rule": "lion"})
ONE_LAYER = Case(gated=True, settings={"overrides": {"*.0.mlp.linear_fc1.weight": "adamw"}})

# name: sharding type, (ranks, case) that saves, (ranks, case) that resumes
RESUMED = {
    "the same ranks": (FULL, (2, PLAIN), (2, PLAIN)),
    "more data ranks": (FULL, (2, PLAIN), (4, PLAIN)),
    "tensor parallel": (FULL, (2, PLAIN), (2, replace(PLAIN, tp=2))),
    "tensor to pipeline": (FULL, (4, replace(PLAIN, tp=2)), (2, replace(PLAIN, pp=2))),
    "virtual pipeline to data": (
        FULL,
        (2, replace(PLAIN, pp=2, virtual=2, layers=4)),
        (2, replace(PLAIN, layers=4)),
    ),
    "by data rank": (BY_DATA, (2, PLAIN), (4, PLAIN)),
    "experts by data rank": (BY_DATA, (4, replace(EXPERTS, ep=2)), (2, replace(EXPERTS, ep=2))),
    "experts": (FULL, (2, replace(EXPERTS, ep=2)), (4, replace(EXPERTS, ep=4))),
    "context parallel": (
        FULL,
        (2, replace(PLAIN, cp=2)),
        (4, replace(PLAIN, cp=2, tp=2)),
    ),
    "packed experts": (
        FULL,
        (2, replace(EXPERTS, ep=2, packed=True)),
        (4, replace(EXPERTS, ep=2, packed=True)),
    ),
    "replicated": (
        None,
        (2, replace(PLAIN, distributed=False)),
        (2, replace(PLAIN, distributed=False, tp=2)),
    ),
    "second moments, tensor parallel": (FULL, (2, ADAMUON), (2, replace(ADAMUON, tp=2))),
    "second moments, by data rank": (BY_DATA, (2, ADAMUON), (1, ADAMUON)),
    "second moments, replicated": (
        None,
        (2, replace(ADAMUON, distributed=False)),
        (2, replace(ADAMUON, distributed=False, tp=2)),
    ),
    "another rule in one layer": (FULL, (2, ONE_LAYER), (2, replace(ONE_LAYER, tp=2))),
    "another rule in one layer, replicated": (
        None,
        (2, replace(ONE_LAYER, distributed=False)),
        (2, replace(ONE_LAYER, distributed=False, tp=2)),
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_losses_go_on_as_without_a_break(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """In fp32: sums in another order are the only difference."""
    sharding, (size, case), (other_size, other) = RESUMED[name]
    skip_what_this_megatron_lacks(case)
    whole = ranks.run(size, train_and_save, case, str(tmp_path), sharding, 2)[0]
    resumed = ranks.run(other_size, resume, other, str(tmp_path), sharding, 2)[0]
    for (loss, norm), (expected, expected_norm) in zip(resumed, whole[2:], strict=True):
        assert loss == pytest.approx(expected, abs=5e-6)
        assert norm == pytest.approx(expected_norm, rel=5e-6)
    assert abs(whole[2][0] - whole[0][0]) > 0.01


@pytest.mark.parametrize("sharding", [FULL, None])
def test_the_loss_scale_and_half_precision_come_back(
    ranks: RankPool, tmp_path: Path, sharding: str | None
) -> None:
    case = replace(PLAIN, dtype="fp16", distributed=sharding is not None)
    whole = ranks.run(2, train_and_save, case, str(tmp_path), sharding, 2)[0]
    assert ranks.run(2, resume, case, str(tmp_path), sharding, 2)[0] == whole[2:]


def leave_expert_parallelism(folder: str) -> str:
    """What a run without expert parallelism says to the checkpoint of one with it."""
    from tests.integrations.megatron_training import load

    case = replace(EXPERTS, ep=2, layers=1)
    with megatron_ready(case):
        chunks = make_chunks(case)
        save(folder, chunks, make_optimizer(case, chunks), FULL)
    case = replace(case, ep=1)
    with megatron_ready(case):
        chunks = make_chunks(case)
        try:
            load(folder, chunks, make_optimizer(case, chunks), FULL)
        except ValueError as error:
            return str(error)
        return ""


def test_a_checkpoint_with_expert_parallelism_is_refused_without(
    ranks: RankPool, tmp_path: Path
) -> None:
    """Megatron makes two optimizers with it and one without, and loads neither as the other."""
    for message in ranks.run(2, leave_expert_parallelism, str(tmp_path)):
        assert message.startswith("the checkpoint has several optimizers, this run has one")


def refuse_a_format() -> None:
    with megatron_ready(PLAIN):
        chunks = make_chunks(PLAIN)
        optimizer = make_optimizer(PLAIN, chunks).chained_optimizers[0]
        train(PLAIN, chunks, optimizer, range(1))
        saved = optimizer.state_dict()
        for group in saved["optimizer"]["param_groups"]:
            group |= {"lr": 7.0, "step": 7}
        saved |= {"param_state": {}, "param_state_sharding_type": "fully_sharded_bucket_space"}
        with pytest.raises(NotImplementedError, match="fully_sharded_bucket_space"):
            optimizer.load_state_dict(saved)
        now = optimizer.state_dict()["optimizer"]["param_groups"]
        assert all(group["lr"] != 7.0 and group["step"] == 1 for group in now)


def test_a_format_that_is_refused_changes_nothing(ranks: RankPool) -> None:
    ranks.run(1, refuse_a_format)


def keep_the_dict(case: Case) -> None:
    with megatron_ready(case):
        chunks = make_chunks(case)
        optimizer = make_optimizer(case, chunks).chained_optimizers[0]
        train(case, chunks, optimizer, range(1))
        saved = optimizer.state_dict()
        inner = saved.get("optimizer", saved)
        # Megatron's sharded checkpoints hold it so.
        inner["state"]["common_step"] = torch.ones(())
        expected = {k: dict(v) for k, v in inner["state"].items() if k != "common_step"}
        groups = list(inner["param_groups"])
        optimizer.load_state_dict(saved)
        assert inner["state"].pop("common_step") == 1
        assert inner["state"] == expected
        assert all(a is b for a, b in zip(inner["param_groups"], groups, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loading_does_not_edit_the_state_dict(ranks: RankPool, dtype: str) -> None:
    ranks.run(1, keep_the_dict, replace(ONE_LAYER, distributed=False, dtype=dtype))


def keep_flags(folder: str) -> dict[str, Any]:
    """Save with one momentum and learning rate, load with another; what the groups say then."""
    from tests.integrations.megatron_training import load

    with megatron_ready(PLAIN):
        chunks = make_chunks(PLAIN)
        optimizer = make_optimizer(PLAIN, chunks)
        train(PLAIN, chunks, optimizer, range(1))
        for group in optimizer.param_groups:
            group["lr"] = 0.125
        save(folder, chunks, optimizer, FULL)
        changed = replace(PLAIN, config={"muon_momentum": 0.5}, settings={"aux_lr": 0.005})
        chunks = make_chunks(changed)
        optimizer = make_optimizer(changed, chunks)
        load(folder, chunks, optimizer, FULL)
        matrices = next(g for g in optimizer.param_groups if g["update_rule"] == "muon")
        peaks = {g["max_lr"] for g in optimizer.param_groups if g["update_rule"] == "adamw"}
        steps = {float(s["step"]) for s in optimizer.chained_optimizers[0].state.values()}
        kept = ("wd_mult", "lr_mult", "max_lr", "min_lr", "is_decoupled_lr", "is_expert_parallel")
        return {
            "momentum": matrices["momentum"],
            "lr": matrices["lr"],
            "peaks": peaks,
            "steps": steps,
            "missing": [key for key in kept if key not in matrices],
        }


def test_flags_of_this_run_win_and_what_the_scheduler_sets_is_restored(
    ranks: RankPool, tmp_path: Path
) -> None:
    found = ranks.run(1, keep_flags, str(tmp_path))[0]
    expected = {"momentum": 0.5, "lr": 0.125, "peaks": {0.005}, "steps": {1.0}, "missing": []}
    assert found == expected


@pytest.mark.parametrize("wanted", [False, True])
def test_the_checkpoints_schedule_is_taken_where_megatron_is_told_to(
    monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    """A stand-in for megatron.training, which is not in the package of 0.16."""
    from flashns_dist.integrations.megatron.checkpoints import restored_groups

    module: Any = types.ModuleType("megatron.training.global_vars")
    module._GLOBAL_ARGS = types.SimpleNamespace(use_checkpoint_opt_param_scheduler=wanted)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", module)
    ours = {"lr": 0.5, "max_lr": 0.5, "min_lr": 0.1, "weight_decay": 0.0, "momentum": 0.9}
    theirs = {"lr": 0.2, "max_lr": 0.4, "min_lr": 0.2, "weight_decay": 0.1, "momentum": 0.8}
    (found,) = restored_groups([ours], [theirs])
    peaks = (0.4, 0.2) if wanted else (0.5, 0.1)
    assert (found["max_lr"], found["min_lr"]) == peaks
    assert (found["lr"], found["weight_decay"], found["momentum"]) == (0.2, 0.1, 0.9)


def refuse(folder: str) -> list[str]:
    from tests.integrations.megatron_training import load

    messages = []
    with megatron_ready(PLAIN):
        chunks = make_chunks(PLAIN)
        optimizer = make_optimizer(PLAIN, chunks)
        for kind in ("dp_zero_gather_scatter", "fully_sharded_model_space", "fsdp_dtensor"):
            try:
                save(folder, chunks, optimizer, kind)
            except NotImplementedError as error:
                messages.append(str(error))
        try:
            optimizer.save_parameter_state(f"{folder}/state.pt")
        except NotImplementedError as error:
            messages.append(str(error))
        adam = replace(PLAIN, optimizer="adam")
        chunks = make_chunks(adam)
        other = make_optimizer(adam, chunks)
        for child in other.chained_optimizers:  # torch's Adam needs a state to be saved
            for group in child.optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.zeros_like(param)
            child.optimizer.step()
        save(folder, chunks, other, FULL)
        chunks = make_chunks(PLAIN)
        try:
            load(folder, chunks, make_optimizer(PLAIN, chunks), FULL)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
        second = replace(PLAIN, settings={"update_rule": "adamuon"})
        runs = ((FULL, second, PLAIN), (BY_DATA, PLAIN, second), (FULL, ONE_LAYER, PLAIN))
        for number, (kind, saved, resumed) in enumerate(runs):
            path = Path(folder) / str(number)
            path.mkdir()
            chunks = make_chunks(saved)
            save(str(path), chunks, make_optimizer(saved, chunks), kind)
            chunks = make_chunks(resumed)
            try:
                load(str(path), chunks, make_optimizer(resumed, chunks), kind)
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_other_formats_and_other_optimizers_are_refused_by_name(
    ranks: RankPool, tmp_path: Path
) -> None:
    messages = ranks.run(1, refuse, str(tmp_path))[0]
    for kind, message in zip(
        ("dp_zero_gather_scatter", "fully_sharded_model_space", "fsdp_dtensor", "torch"),
        messages[:4],
        strict=True,
    ):
        assert f"checkpoint format {kind}" in message
    assert len(messages) == 8
    for message in messages[4:7]:
        assert message.startswith("ValueError: the checkpoint has no parameter group with")
    assert messages[7].startswith(
        "ValueError: the checkpoint was written with --flashmuon-overrides"
    )
