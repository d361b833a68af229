"""How the config and the user's objects become groups, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flashns_dist.optim import ExchangeOptions, FlashMuon, parameter_groups
from flashns_dist.testing.pool import RankPool
from tests.integrations.deepspeed_training import (
    PARAMS,
    STEPS,
    Term,
    config,
    deepspeed_ready,
    full_weights,
    make,
    reference,
    relative_difference,
    rounding_error,
    train,
)

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")


def start(deepspeed: Any, settings: dict[str, Any], **given: Any) -> Any:
    module = given.pop("model", None) or make("few")[0]
    given.setdefault("model_parameters", module.parameters())
    return deepspeed.initialize(model=module, config=settings, **given)[0]


def weights_after_training(engine: Any, model: str) -> dict[str, torch.Tensor]:
    train(engine, make(model)[1], range(STEPS))
    weights = full_weights(engine)
    engine.destroy()
    return weights


# Params -----------------------------------------------------------------------------------------


def read(params: dict[str, Any]) -> Any:
    from flashns_dist.integrations.deepspeed.settings import read_params

    return read_params(params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"learning_rate": 1e-3}, "optimizer.params.learning_rate is unknown"),
        ({"momentun": 0.9}, "momentun is unknown to FlashMuon. Did you mean momentum?"),
        ({"adam_lr": 1e-3}, "Did you mean aux_lr?"),
        ({"ns_method": "gram"}, "Did you mean method?"),
        ({"lr": "auto"}, 'lr="auto" has not been filled in'),
        ({"lr": "fast"}, "lr='fast' must be a number"),
        ({"momentum": 1.5}, "momentum=1.5 must be in"),
        ({"ns_steps": 7}, "ns_steps=7 is how often a single row"),
        ({"betas": 0.9}, "betas=0.9 must be two numbers"),
        ({"nesterov": "false"}, "nesterov='false' must be True or False"),
        ({"wire_dtype": "int8"}, "wire_dtype='int8': .*'bf16', 'bfloat16', 'float32', 'fp32'.$"),
        ({"wire_dtype": "fp16"}, "wire_dtype=torch.float16: .* the range of fp16"),
        ({"memory_bytes": "1GiB"}, "memory_bytes='1GiB'"),
        ({"ns_dtype": "fp8"}, "ns_dtype='fp8'"),
        ({"overrides": ["head"]}, "overrides=.* must map"),
        ({"overrides": {"head": ["muon"]}}, r"overrides\['head'\]=\['muon'\] must be the name"),
        ({"matrix_views": ["head"]}, "matrix_views=.* must map"),
        ({"matrix_views": {"a": {"QKV": {"n": 2}}}}, r"matrix_views\.a: QKV .* argument 'n'"),
        ({"update_rule": "soap"}, "update_rule='soap'"),
        ({"update_rule": "lion"}, "is for auxiliary parameters"),
        ({"fraction": 0.5}, "a setting of the update rules .'dion2'., which no group has"),
        ({"adjust_lr_fn": "fast"}, "adjust_lr_fn='fast' is unknown"),
        ({"replicas": "none"}, "replicas='none'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_params_that_are_wrong_are_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(params)


def test_params_may_be_strings_as_json_has_them() -> None:
    settings = read({"lr": "2e-2", "betas": [0.8, 0.9], "ns_dtype": "bf16", "wire_dtype": "fp32"})
    assert settings.arguments["lr"] == 0.02
    assert settings.arguments["betas"] == (0.8, 0.9)
    assert settings.arguments["ns_dtype"] == torch.bfloat16
    assert settings.arguments["exchange"].wire_dtype == torch.float32


def test_every_argument_of_flash_muon_has_a_key() -> None:
    import inspect

    from flashns_dist.integrations.deepspeed import PARAMS as known

    # A CUDA graph is for one step over everything; DeepSpeed calls one per partition.
    left_out = {"params", "exchange", "settings", "cuda_graph"}
    arguments = set(inspect.signature(FlashMuon).parameters) - left_out
    assert arguments <= set(known), "document the new argument in settings.py and docs/deepspeed.md"


# Resolution -------------------------------------------------------------------------------------


def resolve_in_any_case() -> None:
    with deepspeed_ready() as deepspeed:
        for name in ("FlashMuon", "flashmuon", "FLASHMUON", "flashMuon"):
            for stage in (0, 1, 3):
                settings = config(stage, 1, optimizer={"type": name, "params": dict(PARAMS)})
                engine = start(deepspeed, settings)
                assert type(engine.basic_optimizer).__name__ == "FlashNS"
                engine.destroy()
        with pytest.raises(AssertionError, match="not a supported DeepSpeed Optimizer"):
            start(deepspeed, config(1, 1, optimizer={"type": "FlashMoon", "params": {}}))
        with pytest.raises(ValueError, match=r"params\.speed is unknown"):
            start(deepspeed, config(1, 1, optimizer={"type": "FlashMuon", "params": {"speed": 2}}))


def test_the_type_resolves_in_any_letter_case(ranks: RankPool) -> None:
    ranks.run(1, resolve_in_any_case)


def flash_muon(params: Any) -> FlashMuon:
    arguments = {key: value for key, value in PARAMS.items() if key != "wire_dtype"}
    return FlashMuon(params, **arguments, exchange=ExchangeOptions(wire_dtype=torch.float32))


def train_with_objects() -> list[tuple[str, float]]:
    found = []
    expected = reference("transformer")["weights"]

    def given_object(module: nn.Module) -> dict[str, Any]:
        return {"optimizer": flash_muon(parameter_groups(module)), "model_parameters": None}

    def given_callable(module: nn.Module) -> dict[str, Any]:
        return {"optimizer": lambda params: flash_muon(parameter_groups(module))}

    def given_scheduled(module: nn.Module) -> dict[str, Any]:
        optimizer = flash_muon(parameter_groups(module))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def given_groups(module: nn.Module) -> dict[str, Any]:
        params = list(module.parameters())
        groups = [{"params": params[:5]}, {"params": params[5:]}]
        return {"model_parameters": groups, "config": "FlashMuon"}

    def given_nothing(module: nn.Module) -> dict[str, Any]:
        return {"model_parameters": None, "config": "FlashMuon"}

    ways: list[Callable[[nn.Module], dict[str, Any]]] = [
        given_object,
        given_callable,
        given_scheduled,
        given_groups,
        given_nothing,
    ]
    with deepspeed_ready() as deepspeed:
        for way in ways:
            for stage in (0, 1, 2, 3):
                module = make("transformer")[0]
                given = way(module)
                from_config = given.pop("config", None)
                settings = config(stage, 2, optimizer=None if from_config else {})
                engine = start(deepspeed, settings, model=module, **given)
                weights = weights_after_training(engine, "transformer")
                found.append((f"{way.__name__} {stage}", relative_difference(weights, expected)))
    return found


def test_objects_callables_and_groups_train_as_the_config_does(ranks: RankPool) -> None:
    for case, difference in ranks.run(2, train_with_objects)[0]:
        assert difference < 10 * rounding_error("transformer", 0.0), (case, difference)


def settings_of_groups() -> None:
    with deepspeed_ready() as deepspeed:
        module = make("transformer")[0]
        module.blocks[0].up.weight.requires_grad_(False)
        names = dict(module.named_parameters())
        decayed = [p for n, p in names.items() if "norm" not in n]
        groups = [
            {"params": decayed, "weight_decay": 0.3, "lr": 0.02},
            {"params": [p for n, p in names.items() if "norm" in n], "weight_decay": 0.0},
        ]
        params = {**PARAMS, "overrides": {"blocks.1.out.*": "adamw", "blocks.0.down.*": "frozen"}}
        settings = config(1, 1, optimizer={"type": "FlashMuon", "params": params})
        engine = start(deepspeed, settings, model=module, model_parameters=groups)
        optimizer = engine.basic_optimizer
        held = [
            (group["update_rule"], group["weight_decay"], group["lr"], group["lr_ratio"])
            for group in optimizer.param_groups
        ]
        ratio = PARAMS["aux_lr"] / PARAMS["lr"]
        assert held == [
            ("muon", 0.3, 0.02, 1.0),
            ("adamw", 0.3, 0.02, ratio),
            ("adamw", 0.0, PARAMS["lr"], ratio),
        ]
        muon = {item.name for item in optimizer._partitions[0].slices}
        assert muon == {
            "blocks.0.qkv.weight",
            "blocks.0.out.weight",
            "blocks.1.qkv.weight",
            "blocks.1.up.weight",
            "blocks.1.down.weight",
        }
        everything = {item.name for p in optimizer._partitions for item in p.slices}
        frozen = {"blocks.0.up.weight", "blocks.0.down.weight"}
        assert everything == set(names) - frozen
        engine.destroy()
        strangers = [nn.Parameter(torch.zeros(3, 3))]
        with pytest.raises(ValueError, match="not one of the model's named parameters"):
            start(deepspeed, config(1, 1), model_parameters=strangers)
        sorted_otherwise = parameter_groups(module, overrides={"blocks.1.up.*": "adamw"})
        with pytest.raises(ValueError, match=r"has update_rule='adamw', which .*\"overrides\""):
            start(deepspeed, config(1, 1), model=module, model_parameters=sorted_otherwise)


def test_groups_keep_their_settings_and_overrides_decide(ranks: RankPool) -> None:
    ranks.run(1, settings_of_groups)


def give_what_is_no_matrix() -> None:
    """Else a vector would not be trained at all, and a convolution as kernels by position."""
    with deepspeed_ready() as deepspeed:
        for zero in (False, True):
            stage = 3 if zero else 1
            for name, shape in (("vector", (5,)), ("convolution", (4, 3, 2, 2))):
                params = {**PARAMS, "overrides": {f"{name}.weight": "muon"}}
                settings = config(stage, 1, optimizer={"type": "FlashMuon", "params": params})
                with deepspeed.zero.Init(config_dict_or_path=settings, enabled=zero):
                    module = nn.ModuleDict({"matrix": Term((6, 4)), name: Term(shape)})
                message = rf"{name}\.weight: shape {re.escape(str(shape))} is not a matrix"
                with pytest.raises(ValueError, match=message):
                    start(deepspeed, settings, model=module)


def test_an_override_that_makes_a_matrix_of_what_is_none_is_refused(ranks: RankPool) -> None:
    ranks.run(1, give_what_is_no_matrix)


def train_with_frozen_parameters() -> list[float]:
    """Clipped, in every stage: a frozen parameter is no part of the norm."""
    overrides = {"embed.*": "frozen", "blocks.0.up.*": "frozen"}
    module, data = make("transformer")
    for name, param in module.named_parameters():
        param.requires_grad_(not name.startswith(("embed", "blocks.0.up")))
    optimizer = flash_muon(parameter_groups(module))
    for step in range(STEPS):
        module.zero_grad()
        module(*data(module, step)).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.25)
        optimizer.step()
    expected = {name: p.detach() for name, p in module.named_parameters()}
    found = []
    with deepspeed_ready() as deepspeed:
        for stage in (0, 1, 2, 3):
            params = {**PARAMS, "overrides": overrides}
            settings = config(
                stage, 1, clip=0.25, optimizer={"type": "FlashMuon", "params": params}
            )
            engine = start(deepspeed, settings, model=make("transformer")[0])
            found.append(
                relative_difference(weights_after_training(engine, "transformer"), expected)
            )
    return found


def test_frozen_parameters_do_not_count_in_clipping(ranks: RankPool) -> None:
    for stage, difference in enumerate(ranks.run(1, train_with_frozen_parameters)[0]):
        assert difference < 10 * rounding_error("transformer", 0.25), f"stage {stage}"


def follow_a_scheduler() -> None:
    """DeepSpeed's WarmupLR writes one learning rate into all groups."""
    with deepspeed_ready() as deepspeed:
        scheduler = {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": 0.01,
                "warmup_max_lr": 0.05,
                "warmup_num_steps": 4,
                "warmup_type": "linear",
            },
        }
        for stage in (0, 2, 3):
            engine = start(deepspeed, config(stage, 1, scheduler=scheduler))
            module, data = make("few")
            optimizer = flash_muon(parameter_groups(module))
            lrs = set()
            for step in range(STEPS):
                lr = engine.basic_optimizer.param_groups[1]["lr"]
                train(engine, data, range(step, step + 1))
                optimizer.param_groups[0]["lr"] = lr
                optimizer.param_groups[1]["lr"] = lr * PARAMS["aux_lr"] / PARAMS["lr"]
                module.zero_grad()
                module(*data(module, step)).backward()
                optimizer.step()
                lrs.add(lr)
            assert len(lrs) > 1, "the scheduler does not schedule"
            expected = {name: p.detach() for name, p in module.named_parameters()}
            assert relative_difference(full_weights(engine), expected) < 1e-5
            engine.destroy()


def test_the_auxiliary_learning_rate_follows_deepspeeds_schedulers(ranks: RankPool) -> None:
    ranks.run(1, follow_a_scheduler)


def start_from_zero() -> None:
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05}}
    with deepspeed_ready() as deepspeed:
        for optimizer in (None, {}):
            settings = config(1, 1, optimizer=optimizer, scheduler=scheduler)
            module = make("few")[0]
            given: dict[str, Any] = {}
            if optimizer is None:
                settings["optimizer"]["params"]["lr"] = 0
            else:
                given["optimizer"] = FlashMuon(parameter_groups(module), lr=0, aux_lr=0.01)
            with pytest.raises(ValueError, match="lr=0: FlashMuon keeps aux_lr as a ratio"):
                start(deepspeed, settings, model=module, **given)


def test_a_learning_rate_of_zero_is_refused(ranks: RankPool) -> None:
    ranks.run(1, start_from_zero)


def partition_while_constructing() -> list[float]:
    found = []

    def given_object(module: nn.Module) -> dict[str, Any]:
        return {"optimizer": flash_muon(parameter_groups(module))}

    ways: list[Callable[[nn.Module], dict[str, Any]]] = [lambda module: {}, given_object]
    with deepspeed_ready() as deepspeed:
        for way in ways:
            settings = config(3, 2)
            with deepspeed.zero.Init(config_dict_or_path=settings):
                module = make("transformer")[0]
            plain = make("transformer")[0]
            for param, value in zip(module.parameters(), plain.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                    param.data.copy_(value.data)
            engine = start(deepspeed, settings, model=module, **way(module))
            weights = weights_after_training(engine, "transformer")
            found.append(relative_difference(weights, reference("transformer")["weights"]))
    return found


def test_a_model_made_under_zero_init_trains_alike(ranks: RankPool) -> None:
    for difference in ranks.run(2, partition_while_constructing)[0]:
        assert difference < 10 * rounding_error("transformer", 0.0)


# Refusals ---------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nvme": (
        {
            "stage": 3,
            "zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp/nvme"}},
        },
        "offload_optimizer to NVMe",
    ),
    "parameters on nvme": (
        {"stage": 3, "zero": {"offload_param": {"device": "nvme", "nvme_path": "/tmp/nvme"}}},
        "offload_param to NVMe",
    ),
    "partial offload": (
        {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "ratio below 1",
    ),
    "hpz": ({"stage": 3, "zero": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
    "qgz": ({"stage": 3, "zero": {"zero_quantized_gradients": True}}, "zero_quantized_gradients"),
    "qwz": ({"stage": 3, "zero": {"zero_quantized_weights": True}}, "zero_quantized_weights"),
    "elastic": ({"stage": 1, "zero": {"elastic_checkpoint": True}}, "elastic_checkpoint"),
    "universal round robin": (
        {
            "stage": 1,
            "zero": {"round_robin_gradients": True},
            "checkpoint": {"load_universal": True},
        },
        "round_robin_gradients",
    ),
    "fp16 stage 0": ({"stage": 0, "dtype": "fp16"}, "stage 0 with a loss scale"),
    "fp16 autocast": (
        {"stage": 1, "torch_autocast": {"enabled": True, "dtype": "float16"}},
        "torch_autocast in fp16",
    ),
}


def refuse(cases: dict[str, tuple[dict[str, Any], str]]) -> None:
    with deepspeed_ready() as deepspeed:
        for name, (settings, reason) in cases.items():
            with pytest.raises(NotImplementedError) as caught:
                start(deepspeed, config(world_size=2, **settings))
            assert reason in str(caught.value), f"{name}: {caught.value}"
            module = make("few")[0]
            made = config(world_size=2, optimizer={}, zero_force_ds_cpu_optimizer=False, **settings)
            given = flash_muon(parameter_groups(module))
            with pytest.raises(NotImplementedError) as caught:
                start(deepspeed, made, model=module, optimizer=given)
            assert reason in str(caught.value), f"{name}: {caught.value}"


def test_what_would_be_wrong_is_refused_at_the_start(ranks: RankPool) -> None:
    ranks.run(2, refuse, REFUSED)


def refuse_offload_of_an_object() -> None:
    with deepspeed_ready() as deepspeed:
        module = make("few")[0]
        settings = config(2, 1, optimizer={}, zero={"offload_optimizer": {"device": "cpu"}})
        with pytest.raises(NotImplementedError, match="zero_force_ds_cpu_optimizer"):
            start(
                deepspeed,
                settings,
                model=module,
                optimizer=flash_muon(parameter_groups(module)),
            )
        settings["zero_force_ds_cpu_optimizer"] = False
        module = make("transformer")[0]
        given = flash_muon(parameter_groups(module))
        engine = start(deepspeed, settings, model=module, optimizer=given)
        weights = weights_after_training(engine, "transformer")
        expected = reference("transformer")["weights"]
        assert relative_difference(weights, expected) < 10 * rounding_error("transformer", 0.0)


def test_offload_with_an_object_says_how_to_allow_it(ranks: RankPool) -> None:
    ranks.run(1, refuse_offload_of_an_object)


def refuse_arguments_of_an_object() -> None:
    overlapped = ExchangeOptions(overlap_backward=True)
    with deepspeed_ready() as deepspeed:
        for name, value in (("cuda_graph", True), ("exchange", overlapped)):
            module = make("few")[0]
            given = FlashMuon(parameter_groups(module), **{name: value})
            with pytest.raises(
                ValueError, match=r"cuda_graph=True is not|overlap_backward=True is"
            ):
                start(deepspeed, config(1, 1, optimizer={}), model=module, optimizer=given)


def test_an_objects_arguments_that_would_be_ignored_are_refused(ranks: RankPool) -> None:
    ranks.run(1, refuse_arguments_of_an_object)


def refuse_moe_and_pipelines() -> None:
    with deepspeed_ready() as deepspeed:
        from deepspeed.moe.layer import MoE
        from deepspeed.pipe import PipelineModule

        module = nn.Sequential(MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=1))
        with pytest.raises(NotImplementedError, match="MoE layers"):
            start(deepspeed, config(1, 1), model=module)
        pipeline = PipelineModule([nn.Linear(8, 8), nn.Linear(8, 8)], num_stages=1)
        with pytest.raises(NotImplementedError, match="pipeline engine"):
            start(deepspeed, config(0, 1), model=pipeline)


def test_moe_layers_and_pipelines_are_refused(ranks: RankPool) -> None:
    ranks.run(1, refuse_moe_and_pipelines)


def miss_an_internal() -> None:
    with deepspeed_ready() as deepspeed:
        from deepspeed.runtime.zero import stage_1_and_2

        kind = stage_1_and_2.DeepSpeedZeroOptimizer
        original = kind.__init__

        def forgetful(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            del self.bit16_groups_flat

        kind.__init__ = forgetful
        try:
            with pytest.raises(RuntimeError, match=r"no DeepSpeedZeroOptimizer\.bit16_groups_flat"):
                start(deepspeed, config(1, 1))
        finally:
            kind.__init__ = original


def test_a_missing_internal_is_named(ranks: RankPool) -> None:
    ranks.run(1, miss_an_internal)
