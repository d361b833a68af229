"""What DeepSpeed's own Muon gets wrong, and FlashMuon right, measured the same way on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashns_dist.testing.pool import RankPool
from tests.integrations.deepspeed_training import (
    PARAMS,
    config,
    deepspeed_ready,
    full_weights,
    is_older,
    make,
    relative_difference,
    rounding_error,
    train,
)

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "native": {"type": "Muon", "params": {"lr": 0.05, "momentum": 0.95, "torch_adam": True}},
    "flash": {"type": "FlashMuon", "params": dict(PARAMS)},
}
both = pytest.mark.parametrize("which", ["native", "flash"])


def require_native(which: str) -> None:
    if which == "native" and is_older():
        pytest.skip("the Muon of DeepSpeed before 0.19 fails in stage 3")


def start(deepspeed: Any, which: str, stage: int, **settings: Any) -> tuple[nn.Module, Any, Any]:
    module, data = make("transformer")
    zero = {"reduce_scatter": False} if which == "native" and stage == 3 else {}
    made = config(stage, dist.get_world_size(), optimizer=OPTIMIZERS[which], zero=zero, **settings)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=module.parameters(), config=made
    )
    return module, data, engine


def raw_norm() -> float:
    module, data = make("transformer")
    module(*data(module, 0)).backward()
    return float(nn.utils.get_total_norm([p.grad for p in module.parameters()]))


def reported_norms(which: str) -> list[float]:
    """The gradient norm that each stage reports with clipping, after one step."""
    found = []
    with deepspeed_ready() as deepspeed:
        for stage in (1, 2, 3):
            _, data, engine = start(deepspeed, which, stage, clip=0.25)
            found.append(float(train(engine, data, range(1))[1][0] or 0.0))
            engine.destroy()
    return found


@both
def test_the_reported_norm_is_that_of_the_raw_gradients(ranks: RankPool, which: str) -> None:
    require_native(which)
    expected = raw_norm()
    errors = [abs(norm / expected - 1) for norm in ranks.run(2, reported_norms, which)[0]]
    if which == "flash":
        assert max(errors) < 1e-5
    else:
        assert min(errors) > 1, f"the native Muon no longer clips updates: {errors}"


def change_of_matrices(which: str) -> list[float]:
    """How much a clip threshold far below the gradients' norm shrinks the first update."""
    found = []
    with deepspeed_ready() as deepspeed:
        for stage in (1, 2, 3):
            changes = []
            for clip in (0.0, 0.01):
                _, data, engine = start(deepspeed, which, stage, clip=clip)
                before = full_weights(engine)["blocks.0.up.weight"]
                train(engine, data, range(1))
                changes.append(float((full_weights(engine)["blocks.0.up.weight"] - before).norm()))
                engine.destroy()
            found.append(changes[1] / changes[0])
    return found


@both
def test_clipping_does_not_shrink_an_orthogonalized_update(ranks: RankPool, which: str) -> None:
    """Its size is the learning rate's, whatever the gradients' is."""
    require_native(which)
    ratios = ranks.run(2, change_of_matrices, which)[0]
    if which == "flash":
        assert all(ratio == pytest.approx(1, abs=1e-3) for ratio in ratios)
    else:
        assert max(ratios) < 0.1, f"the native Muon no longer clips updates: {ratios}"


def weights_by_stage(which: str) -> dict[int, dict[str, Tensor]]:
    found = {}
    with deepspeed_ready() as deepspeed:
        for stage in (0, 1, 2, 3):
            _, data, engine = start(deepspeed, which, stage)
            train(engine, data, range(3))
            found[stage] = {n: w for n, w in full_weights(engine).items() if "blocks" in n}
            engine.destroy()
    return found


@both
def test_weights_do_not_depend_on_stage_or_world_size(ranks: RankPool, which: str) -> None:
    require_native(which)
    base: dict[str, Tensor] | None = None
    worst = 0.0
    for size in (1, 2, 3):
        for weights in ranks.run(size, weights_by_stage, which)[0].values():
            base = weights if base is None else base
            worst = max(worst, relative_difference(weights, base))
    unit = rounding_error("transformer", 0.0)
    if which == "flash":
        assert worst < 10 * unit
    else:
        assert worst > 100 * unit, f"the native Muon no longer depends on them: {worst:.1e}"


def momentum_by_accumulation(which: str) -> list[float]:
    """Norm of all momenta after one step under ZeRO 3, by number of micro-batches."""
    found = []
    with deepspeed_ready() as deepspeed:
        for accumulation in (1, 4):
            _, data, engine = start(deepspeed, which, 3, accumulation=accumulation)
            train(engine, data, range(1))
            total = torch.zeros((), dtype=torch.float64)
            for state in engine.basic_optimizer.state.values():
                momentum = state.get("momentum_buffer", state.get("exp_avg"))
                if momentum is not None and ("momentum_buffer" in state or len(state) == 2):
                    total += momentum.double().nan_to_num().square().sum()
            dist.all_reduce(total)
            found.append(float(total.sqrt()))
            engine.destroy()
    return found


@both
def test_momentum_counts_steps_and_not_micro_batches(ranks: RankPool, which: str) -> None:
    require_native(which)
    one, four = ranks.run(2, momentum_by_accumulation, which)[0]
    if which == "native" and four == pytest.approx(one, rel=1e-4):
        pytest.skip("this DeepSpeed's Muon is right here: 0.19.8 has fixed it")
    if which == "flash":
        assert four == pytest.approx(one, rel=1e-5)
    else:
        assert four != pytest.approx(one, rel=1e-2)
