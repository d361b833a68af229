"""bf16, fp16 with its loss scale, overflows and gradients that are not finite."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashns_dist.optim import ExchangeOptions, FlashMuon, parameter_groups
from flashns_dist.testing.pool import RankPool
from tests.integrations.deepspeed_training import (
    PARAMS,
    STEPS,
    can_accumulate,
    config,
    deepspeed_ready,
    full_weights,
    is_older,
    make,
    relative_difference,
    train,
)

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")

CLIP = 0.25


@cache
def mixed_reference(dtype: torch.dtype, micro_batches: int) -> dict[str, Tensor]:
    """One process: a low-precision copy computes, fp32 masters are stepped."""
    module, data = make("transformer")
    low = make("transformer")[0].to(dtype)
    arguments = {key: value for key, value in PARAMS.items() if key != "wire_dtype"}
    exchange = ExchangeOptions(wire_dtype=torch.float32, replica_group=None)
    optimizer = FlashMuon(parameter_groups(module), **arguments, exchange=exchange)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    for step in range(STEPS):
        low.zero_grad()
        for part in range(micro_batches):
            inputs = (t.chunk(micro_batches)[part] for t in data(low, step))
            (low(*inputs) * (scale / micro_batches)).backward()
        for master, param in zip(module.parameters(), low.parameters(), strict=True):
            assert param.grad is not None
            master.grad = param.grad.float() / scale
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        for master, param in zip(module.parameters(), low.parameters(), strict=True):
            param.data.copy_(master.data)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def train_in(cases: list[dict[str, Any]]) -> list[float]:
    found = []
    with deepspeed_ready() as deepspeed:
        for case in cases:
            module, data = make("transformer")
            settings = config(world_size=dist.get_world_size(), clip=CLIP, **case)
            if case["dtype"] == "fp16":
                settings["fp16"] = {"enabled": True, "initial_scale_power": 10}
            engine, *_ = deepspeed.initialize(
                model=module, model_parameters=module.parameters(), config=settings
            )
            train(engine, data, range(STEPS))
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case["dtype"]]
            found.append(relative_difference(full_weights(engine), mixed_reference(dtype, 1)))
            engine.destroy()
    return found


def cases_here() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = [
        {"stage": stage, "dtype": dtype, "accumulation": accumulation}
        for stage in (1, 2, 3)
        for dtype, accumulation in (("bf16", 4), ("fp16", 1))
        if accumulation == 1 or can_accumulate(stage)
    ]
    if not is_older():
        fp32 = {"grad_accum_dtype": "fp32"}
        cases += [
            {"stage": 0, "dtype": "bf16"},
            {"stage": 1, "dtype": "bf16", "accumulation": 4, "data_types": fp32},
        ]
    return cases


def test_low_precision_trains_as_in_one_process(ranks: RankPool) -> None:
    cases = cases_here()
    for case, difference in zip(cases, ranks.run(2, train_in, cases)[0], strict=True):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case["dtype"]]
        # Summing in another order costs one process this much in the same precision.
        unit = relative_difference(mixed_reference(dtype, 4), mixed_reference(dtype, 1))
        assert difference < 3 * unit, f"{case}: {difference:.1e}, rounding makes {unit:.1e}"


def skip_an_overflow() -> None:
    with deepspeed_ready() as deepspeed:
        for stage in (1, 2, 3):
            module, data = make("transformer")
            settings = config(stage, 2, dtype="fp16", clip=CLIP)
            settings["fp16"] = {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}
            engine, *_ = deepspeed.initialize(
                model=module, model_parameters=module.parameters(), config=settings
            )
            train(engine, data, range(2))
            optimizer = engine.basic_optimizer
            before = [
                {key: value.clone() for key, value in state.items()}
                for state in optimizer.state.values()
            ]
            weights = [partition.storage.clone() for partition in optimizer._partitions]
            scale = engine.optimizer.loss_scale
            # On one rank only: the others must skip too.
            bad = 1e30 if dist.get_rank() == 1 else 1.0
            train(engine, data, range(2, 3), scale_loss=lambda step, bad=bad: bad)  # type: ignore[misc]
            assert engine.skipped_steps == 1
            assert engine.optimizer.loss_scale == scale / 2
            for old, state in zip(before, optimizer.state.values(), strict=True):
                for key, value in old.items():
                    assert torch.equal(value, state[key]), f"stage {stage}: {key} has changed"
            for old_weight, partition in zip(weights, optimizer._partitions, strict=True):
                same = (old_weight == partition.storage) | old_weight.isnan()  # ZeRO 3's padding
                assert same.all(), f"stage {stage}: master weights have changed"
            train(engine, data, range(3, 5))
            assert engine.skipped_steps == 1
            assert all(s["exp_avg"].isfinite().all() for s in optimizer.state.values())
            assert all(int(s["step"]) == 4 for s in optimizer.state.values())
            engine.destroy()


def test_an_overflow_in_fp16_skips_the_step_on_all_ranks(ranks: RankPool) -> None:
    ranks.run(2, skip_an_overflow)


def meet_a_nan() -> None:
    with deepspeed_ready() as deepspeed:
        for stage in (0, 1, 2, 3):
            for nonfinite in ("raise", "skip"):
                module, data = make("transformer")
                params = {**PARAMS, "nonfinite": nonfinite}
                settings = config(stage, 2, optimizer={"type": "FlashMuon", "params": params})
                engine, *_ = deepspeed.initialize(
                    model=module, model_parameters=module.parameters(), config=settings
                )
                train(engine, data, range(1))
                before = full_weights(engine)
                optimizer = engine.basic_optimizer
                saved = [s["exp_avg"].clone() for s in optimizer.state.values()]
                bad = float("nan") if dist.get_rank() == 1 else 1.0

                def run(engine: Any = engine, bad: float = bad) -> None:
                    train(engine, data, range(1, 2), scale_loss=lambda step: bad)  # noqa: B023

                # DeepSpeed itself may leave out a step whose gradient norm is not finite.
                allowed = FloatingPointError if nonfinite == "raise" else ()
                with contextlib.suppress(allowed):
                    run()
                    assert nonfinite == "skip" or stage != 0, "stage 0 has no check of its own"
                for old, state in zip(saved, optimizer.state.values(), strict=True):
                    assert torch.equal(old, state["exp_avg"]), f"stage {stage}, {nonfinite}"
                after = full_weights(engine)
                assert all(torch.equal(before[name], after[name]) for name in before)
                engine.destroy()


def test_a_gradient_that_is_not_finite_changes_nothing(ranks: RankPool) -> None:
    ranks.run(2, meet_a_nan)
