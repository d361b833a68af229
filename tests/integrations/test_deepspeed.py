"""FlashMuon under DeepSpeed gives the weights of one process without it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashns_dist.layout import Equal, Sections
from flashns_dist.optim import ExchangeOptions, FlashMuon, parameter_groups
from flashns_dist.testing.pool import RankPool
from tests.integrations.deepspeed_training import (
    BATCH,
    PARAMS,
    STEPS,
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

CLIP = {"many": 50.0, "few": 20.0, "transformer": 0.25}


def run_engine(deepspeed: Any, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    module, data = make(model)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=module.parameters(), config=settings
    )
    losses, norms = train(engine, data, range(STEPS))
    round_robin = settings["zero_optimization"].get("round_robin_gradients", False)
    result = {
        "weights": full_weights(engine, low_precision=round_robin),
        "losses": losses,
        "norms": norms,
        "wrapper": type(engine.optimizer).__name__,
        "cut": cut_matrices(engine.basic_optimizer),
    }
    engine.destroy()
    return result


def cut_matrices(optimizer: Any) -> int:
    """How many matrices have parts on several ranks."""
    return sum(
        sum(stop > start for start, stop in item.ranges) > 1
        for partition in optimizer._partitions
        for item in partition.slices
        if len(item.shape) > 1
    )


def check_norms(ours: list[float | None], theirs: list[float], tolerance: float, case: str) -> None:
    """The reported norms are those of the raw gradients; stage 0 in fp32 reports none."""
    if None in ours:
        assert "'stage': 0" in case
        return
    torch.testing.assert_close(
        torch.tensor(ours),
        torch.tensor(theirs),
        rtol=tolerance,
        atol=0,
        msg=f"{case}: {ours}, {theirs}",
    )


def clipping_error(model: str, clip: float) -> float:
    """Ten times what a norm that is wrong in its last bits changes in one process.

    Orthogonalization magnifies rounding of directions with small singular values.
    """
    plain = reference(model, clip)["weights"]
    nudged = reference(model, clip * (1 + 4e-7))["weights"]
    largest = max(float((plain[name] - nudged[name]).abs().max()) for name in plain)
    return 10 * max(largest, 1e-7)


def compare_exactly(model: str, stage: int) -> None:
    """Bitwise without clipping; with it, up to how the norm is summed."""
    size = dist.get_world_size()
    with deepspeed_ready() as deepspeed:
        for accumulation in (1, 4) if can_accumulate(stage) else (1,):
            for clip in (0.0, CLIP[model]):
                settings = config(stage, size, accumulation=accumulation, clip=clip)
                result = run_engine(deepspeed, model, settings)
                expected = reference(model, clip)
                allowed = clipping_error(model, clip)
                case = str({"stage": stage, "accumulation": accumulation, "clip": clip})
                for name, weight in expected["weights"].items():
                    ours = result["weights"][name]
                    if clip or weight.ndim < 2:  # vectorized AdamW rounds its tail differently
                        difference = float((ours - weight).abs().max())
                        assert difference < allowed, f"{case}: {name} differs by {difference:.1e}"
                    else:
                        assert torch.equal(ours, weight), f"{case}: {name} differs"
                if clip:
                    check_norms(result["norms"], expected["norms"], 1e-6, case)
                if model == "many" and size > 1 and stage > 0:
                    assert result["cut"] > 0, "no matrix is cut: the test tests nothing"


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["many", "few"])
def test_weights_equal_those_of_one_process_in_every_bit(
    ranks: RankPool, model: str, stage: int, world_size: int
) -> None:
    ranks.run(world_size, compare_exactly, model, stage)


VIEWS = {
    "terms.0.*": {"Sections": {"sizes": [10, 11]}},
    "terms.1.*": {"Equal": {"count": 3, "dim": 1}},
    "terms.6.*": {"Sections": {"sizes": [2, 1], "repeats": 11}},
}


def compare_views(stages: list[int]) -> None:
    views = (
        ("terms.0.*", Sections((10, 11))),
        ("terms.1.*", Equal(3, dim=1)),
        ("terms.6.*", Sections((2, 1), repeats=11)),
    )
    with deepspeed_ready() as deepspeed:
        for stage in stages:
            settings = config(stage, dist.get_world_size())
            settings["optimizer"]["params"]["matrix_views"] = VIEWS
            weights = run_engine(deepspeed, "many", settings)["weights"]
            expected, plain = (
                reference("many", views=views)["weights"],
                reference("many")["weights"],
            )
            for name in ("terms.0.weight", "terms.1.weight", "terms.6.weight"):
                assert torch.equal(weights[name], expected[name]), f"stage {stage}: {name}"
                assert not torch.equal(weights[name], plain[name])


def test_views_of_the_config_are_matrices_in_every_stage(ranks: RankPool) -> None:
    ranks.run(3, compare_views, [0, 1, 2, 3])


RULES: list[dict[str, Any]] = [
    {"update_rule": "adamuon", "beta2": 0.8},
    {"update_rule": "dion2", "fraction": 0.5},
    {"equilibrate": True, "renormalize": "rows", "independent_decay": True, "weight_decay": 1e-3},
]


def compare_rules(stages: list[int]) -> None:
    with deepspeed_ready() as deepspeed:
        for stage, rule in product(stages, RULES):
            settings = config(stage, dist.get_world_size())
            settings["optimizer"]["params"].update(rule)
            weights = run_engine(deepspeed, "many", settings)["weights"]
            expected = reference("many", rule=tuple(rule.items()))["weights"]
            plain = reference("many")["weights"]
            for name, weight in expected.items():
                if weight.ndim > 1:
                    assert torch.equal(weights[name], weight), f"stage {stage}, {rule}: {name}"
                    assert not torch.equal(weight, plain[name])
        for rule in ({"update_rule": "normuon"}, {"update_rule": "dion"}):
            settings = config(1, dist.get_world_size())
            settings["optimizer"]["params"].update(rule)
            with pytest.raises(NotImplementedError, match="universal checkpoints would lose it"):
                run_engine(deepspeed, "many", settings)


def test_update_rules_of_the_config_give_the_weights_of_one_process(ranks: RankPool) -> None:
    ranks.run(3, compare_rules, [0, 1, 2, 3])


def compare_transformer(cases: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(wrapper, relative difference of the weights, the unit of it) of each case."""
    found = []
    with deepspeed_ready() as deepspeed:
        for case in cases:
            clip = case.get("clip", 0.0)
            result = run_engine(deepspeed, "transformer", config(world_size=_size(), **case))
            expected = reference("transformer", clip)
            if clip:
                check_norms(result["norms"], expected["norms"], 1e-4, str(case))
            found.append(
                (
                    result["wrapper"],
                    relative_difference(result["weights"], expected["weights"]),
                    rounding_error("transformer", clip),
                )
            )
    return found


def _size() -> int:
    return dist.get_world_size()


FP32_CASES: list[dict[str, Any]] = [
    {"stage": 0, "accumulation": 4, "clip": 0.25},
    {"stage": 1, "accumulation": 4, "clip": 0.25},
    {"stage": 2, "accumulation": 4, "clip": 0.25},
    {"stage": 3, "accumulation": 4, "clip": 0.25},
    {"stage": 1, "zero": {"round_robin_gradients": True}},
    {"stage": 2, "zero": {"round_robin_gradients": True}, "accumulation": 4},
    {"stage": 1, "zero": {"offload_optimizer": {"device": "cpu"}}, "clip": 0.25},
    {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}, "accumulation": 4},
    {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}}, "clip": 0.25},
    {
        "stage": 3,
        "zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
    {"stage": 3, "zero": {"sub_group_size": 700}, "clip": 0.25},
    {"stage": 3, "zero": {"stage3_param_persistence_threshold": 10**6}},
    {"stage": 2, "zero": {"overlap_comm": True, "contiguous_gradients": False}},
]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_transformer_trains_as_in_one_process(ranks: RankPool, world_size: int) -> None:
    cases = FP32_CASES
    if is_older():  # refused
        cases = [c for c in cases if "offload" not in str(c) or "accumulation" not in c]
        cases = [c for c in cases if "contiguous_gradients" not in c.get("zero", {})]
    cases = [c for c in cases if "accumulation" not in c or can_accumulate(c["stage"])]
    results = ranks.run(world_size, compare_transformer, cases)[0]
    for case, (_, difference, unit) in zip(cases, results, strict=True):
        assert difference < 10 * unit, f"{case}: {difference:.1e}, rounding makes {unit:.1e}"


class Branches(nn.Module):
    """Uses one of two matrices, by turns; a third never."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(9, 7, bias=False) for _ in range(3))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return self.layers[int(chosen[0])](x).square().mean()


def branches() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)

    def data(model: nn.Module, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(BATCH, 9, generator=generator), torch.full((BATCH,), step % 2)]

    return Branches(), data


def train_branches(*, repeated: bool) -> dict[str, Tensor]:
    """In one process, with zero or its last gradient for what has none."""
    module, data = branches()
    arguments = {key: value for key, value in PARAMS.items() if key != "wire_dtype"}
    exchange = ExchangeOptions(wire_dtype=torch.float32, replica_group=None)
    optimizer = FlashMuon(parameter_groups(module), **arguments, exchange=exchange)
    last = [torch.zeros_like(param) for param in module.parameters()]
    for step in range(4):
        module.zero_grad()
        module(*data(module, step)).backward()
        for index, param in enumerate(module.parameters()):
            if param.grad is None:
                param.grad = last[index].clone()
            if repeated:
                last[index] = param.grad.clone()
        optimizer.step()
    return {name: param.detach() for name, param in module.named_parameters()}


def compare_branches() -> list[tuple[float, float]]:
    zeros, repeated = train_branches(repeated=False), train_branches(repeated=True)
    found = []
    with deepspeed_ready() as deepspeed:
        for stage in (0, 1, 2, 3):
            module, data = branches()
            engine, *_ = deepspeed.initialize(
                model=module, model_parameters=module.parameters(), config=config(stage, _size())
            )
            train(engine, data, range(4))
            weights = full_weights(engine)
            found.append(
                (relative_difference(weights, zeros), relative_difference(weights, repeated))
            )
            engine.destroy()
    return found


def test_a_parameter_without_a_gradient_counts_as_the_docs_say(ranks: RankPool) -> None:
    *others, three = ranks.run(2, compare_branches)[0]
    for stage, (as_zero, _) in enumerate(others):
        assert as_zero < 1e-5, f"stage {stage}"
    assert min(three) < 1e-5
    if three[0] < 1e-5:
        pytest.fail("ZeRO 3 hands over zeros now: say so in docs/deepspeed.md")
