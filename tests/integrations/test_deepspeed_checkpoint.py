"""Saving and loading continues as if nothing had happened, on another number of ranks too."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashns_dist.optim import FlashMuon, parameter_groups
from flashns_dist.testing.pool import RankPool
from tests.integrations.deepspeed_training import (
    can_accumulate,
    config,
    deepspeed_ready,
    full_weights,
    is_older,
    make,
    reference,
    relative_difference,
    rounding_error,
    train,
)

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")

CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0},
    "stage 0 bf16": {"stage": 0, "dtype": "bf16"},
    "stage 1": {"stage": 1},
    "stage 1 bf16": {"stage": 1, "dtype": "bf16"},
    "stage 1 bf16, fp32 accumulation": {
        "stage": 1,
        "dtype": "bf16",
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "stage 1 round robin": {"stage": 1, "zero": {"round_robin_gradients": True}},
    "stage 2": {"stage": 2},
    "stage 2 offload": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
    "stage 3": {"stage": 3},
    "stage 3 fp16": {"stage": 3, "dtype": "fp16"},
    "stage 3 sub-groups": {"stage": 3, "zero": {"sub_group_size": 700}},
}


def supported(name: str) -> bool:
    """Stage 0 in bf16, and what falls back to it, has a loss scale before DeepSpeed 0.19."""
    if is_older() and name == "stage 2 offload":
        return False  # with accumulation
    return not (is_older() and name in ("stage 0 bf16", "stage 1 bf16, fp32 accumulation"))


def start(deepspeed: Any, seed: int, settings: dict[str, Any]) -> Any:
    module, _ = make("transformer", seed)
    accumulation = 4 if can_accumulate(settings["stage"]) else 1
    made = config(
        world_size=dist.get_world_size(), accumulation=accumulation, clip=0.25, **settings
    )
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=made)[0]


def momenta(engine: Any) -> list[torch.Tensor]:
    state = engine.basic_optimizer.state.values()
    return [s["exp_avg"].clone() for s in state]


def continue_training(folder: str) -> None:
    data = make("transformer")[1]
    with deepspeed_ready() as deepspeed:
        for name, settings in CASES.items():
            if not supported(name):
                continue
            engine = start(deepspeed, 0, settings)
            train(engine, data, range(2))
            engine.save_checkpoint(f"{folder}/{name}", tag="saved")
            saved = momenta(engine)
            losses, _ = train(engine, data, range(2, 5))
            engine.destroy()
            again = start(deepspeed, 7, settings)
            again.load_checkpoint(f"{folder}/{name}", tag="saved")
            for ours, theirs in zip(momenta(again), saved, strict=True):
                assert torch.equal(ours, theirs), f"{name}: momentum differs"
            assert train(again, data, range(2, 5))[0] == losses, name
            again.destroy()


def test_a_loaded_checkpoint_continues_with_the_same_losses(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2, continue_training, str(tmp_path), timeout=240)


def continue_a_schedule(folder: str) -> None:
    data = make("transformer")[1]
    with deepspeed_ready() as deepspeed:

        def start_scheduled(seed: int, stage: int) -> Any:
            module = make("transformer", seed)[0]
            optimizer = FlashMuon(parameter_groups(module), lr=0.05, aux_lr=0.01)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            settings = config(stage, dist.get_world_size(), optimizer={})
            return deepspeed.initialize(
                model=module, optimizer=optimizer, lr_scheduler=scheduler, config=settings
            )[0]

        for stage in (0, 1, 2, 3):
            engine = start_scheduled(0, stage)
            train(engine, data, range(2))
            engine.save_checkpoint(f"{folder}/{stage}", tag="saved")
            losses, _ = train(engine, data, range(2, 5))
            again = start_scheduled(7, stage)
            again.load_checkpoint(f"{folder}/{stage}", tag="saved")
            assert train(again, data, range(2, 5))[0] == losses, f"stage {stage}"
            assert again.get_lr() == engine.get_lr() == pytest.approx([0.05 / 6, 0.01 / 6])
            engine.destroy()
            again.destroy()


def test_a_users_scheduler_still_schedules_after_loading(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, continue_a_schedule, str(tmp_path))


UNIVERSAL = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 3 sub-groups": {"stage": 3, "zero": {"sub_group_size": 700}},
}


def convert(folder: str) -> None:
    """Make a universal checkpoint of the one that is tagged "saved"."""
    from deepspeed.checkpoint import ds_to_universal

    if dist.get_rank() == 0:
        ds_to_universal.main(
            Namespace(
                input_folder=f"{folder}/saved",
                output_folder=f"{folder}/universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
        Path(f"{folder}/latest_universal").write_text("universal")
    dist.barrier()


def save_universal(folder: str) -> None:
    data = make("transformer")[1]
    with deepspeed_ready() as deepspeed:
        for name, settings in UNIVERSAL.items():
            engine = start(deepspeed, 0, settings)
            train(engine, data, range(2))
            engine.save_checkpoint(f"{folder}/{name}", tag="saved")
            engine.destroy()
            convert(f"{folder}/{name}")


def load_universal(folder: str) -> list[tuple[str, float]]:
    data = make("transformer")[1]
    found = []
    with deepspeed_ready() as deepspeed:
        for name, settings in UNIVERSAL.items():
            if is_older() and settings["stage"] != 3:  # refused
                continue
            engine = start(deepspeed, 7, {**settings, "checkpoint": {"load_universal": True}})
            engine.load_checkpoint(f"{folder}/{name}", tag="universal")
            train(engine, data, range(2, 4))
            expected = reference("transformer", 0.25, steps=4)["weights"]
            found.append((name, relative_difference(full_weights(engine), expected)))
            rules = [group["update_rule"] for group in engine.basic_optimizer.param_groups]
            assert rules == ["muon", "adamw"], f"{name}: {rules}"
            engine.destroy()
    return found


def test_a_universal_checkpoint_of_two_ranks_continues_on_three(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2, save_universal, str(tmp_path), timeout=240)
    unit = rounding_error("transformer", 0.25)
    for size in (3, 1):
        for name, difference in ranks.run(size, load_universal, str(tmp_path), timeout=240)[0]:
            assert difference < 10 * unit, f"{name} on {size} ranks: {difference:.1e}"


def start_groups(deepspeed: Any, seed: int, stage: int, **extra: Any) -> Any:
    module = make("transformer", seed)[0]
    params = list(module.parameters())
    groups = [{"params": params[:6]}, {"params": params[6:], "lr": 0.01, "weight_decay": 0.3}]
    settings = config(stage, dist.get_world_size(), **extra)
    return deepspeed.initialize(model=module, model_parameters=groups, config=settings)[0]


def save_groups(folder: str) -> dict[int, Any]:
    data = make("transformer")[1]
    found = {}
    with deepspeed_ready() as deepspeed:
        for stage in (1, 3):
            engine = start_groups(deepspeed, 0, stage)
            train(engine, data, range(1))
            for group in engine.optimizer.param_groups:
                group["lr"] /= 2  # a scheduler
            train(engine, data, range(1, 2))
            engine.save_checkpoint(f"{folder}/{stage}", tag="saved")
            train(engine, data, range(2, 4))
            found[stage] = full_weights(engine)
            engine.destroy()
            convert(f"{folder}/{stage}")
    return found


def load_groups(folder: str) -> dict[int, Any]:
    data = make("transformer")[1]
    found = {}
    with deepspeed_ready() as deepspeed:
        for stage in (1, 3):
            if is_older() and stage != 3:  # refused
                continue
            engine = start_groups(deepspeed, 7, stage, checkpoint={"load_universal": True})
            engine.load_checkpoint(f"{folder}/{stage}", tag="universal")
            train(engine, data, range(2, 4))
            found[stage] = full_weights(engine)
            assert engine.get_lr() == [0.025, 0.005, 0.025, 0.005], f"stage {stage}"
            engine.destroy()
    return found


def test_groups_keep_their_learning_rates_in_a_universal_checkpoint(
    ranks: RankPool, tmp_path: Path
) -> None:
    expected = ranks.run(2, save_groups, str(tmp_path))[0]
    unit = rounding_error("transformer", 0.0)
    for stage, weights in ranks.run(3, load_groups, str(tmp_path))[0].items():
        difference = relative_difference(weights, expected[stage])
        assert difference < 10 * unit, f"stage {stage}: {difference:.1e}"


def load_elsewhere(folder: str) -> None:
    with deepspeed_ready() as deepspeed:
        engine = start(deepspeed, 0, {"stage": 1})
        with pytest.raises(Exception, match=r"world size|DP"):
            engine.load_checkpoint(f"{folder}/stage 1", tag="saved")


def save_one(folder: str) -> None:
    with deepspeed_ready() as deepspeed:
        engine = start(deepspeed, 0, {"stage": 1})
        train(engine, make("transformer")[1], range(1))
        engine.save_checkpoint(f"{folder}/stage 1", tag="saved")


def test_a_plain_checkpoint_does_not_load_on_another_number_of_ranks(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2, save_one, str(tmp_path))
    ranks.run(3, load_elsewhere, str(tmp_path))
