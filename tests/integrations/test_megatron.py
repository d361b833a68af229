"""FlashMuon inside Megatron's optimizers: the same losses and weights as in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("megatron.core")

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.testing.pool import RankPool
from tests.integrations.megatron_training import (
    Case,
    full_shape,
    global_names,
    losses_of,
    make_chunks,
    make_optimizer,
    megatron_ready,
    random_like,
    shard_of,
    skip_what_this_megatron_lacks,
    unwrapped,
)

# Losses of about 4.5, in fp32 and summed in another order: 10 times the worst that was seen, and
# far below the change of one step (0.1).
ROUNDING = 5e-6

OPTIONS = {"equilibrate": True, "renormalize": "rows", "independent_decay": True}
RULES: dict[str, dict[str, Any]] = {
    "muon with options, lion": {"rule_settings": OPTIONS, "aux_update_rule": "lion"},
    "adamuon": {"update_rule": "adamuon", "rule_settings": {"beta2": 0.9}},
    "dion2": {"update_rule": "dion2", "rule_settings": {"fraction": 0.4}},
}

LOSSES = {
    "dp2": (2, Case()),
    "dp4, small buckets, overlapped": (4, Case(gated=True, bucket_size=3000, overlap=True)),
    "dp2, replicated": (2, Case(gated=True, distributed=False)),
    "dp2 x tp2, sequence parallel": (4, Case(gated=True, tp=2, sequence_parallel=True)),
    "dp2 x tp2, replicated": (4, Case(gated=True, tp=2, distributed=False)),
    "pp2 x tp2": (4, Case(gated=True, pp=2, tp=2)),
    "pp2 x dp2, tied embeddings": (4, Case(pp=2, tied=True)),
    "virtual pipeline": (2, Case(gated=True, pp=2, virtual=2, layers=4)),
    "dp2 x cp2, overlapped": (4, Case(gated=True, cp=2, overlap=True, bucket_size=3000)),
    "dp2 x cp2, loss per token": (4, Case(gated=True, cp=2, per_token_loss=True)),
    "tp2 x cp2, sequence parallel": (4, Case(gated=True, tp=2, cp=2, sequence_parallel=True)),
    "pp2 x cp2": (4, Case(gated=True, pp=2, cp=2)),
    "experts, ep2 x edp2": (4, Case(gated=True, ep=2, experts=4)),
    "experts, ep2 x edp2, context parallel": (4, Case(gated=True, cp=2, ep=2, experts=4)),
    "experts, dp2 x tp2": (4, Case(gated=True, tp=2, sequence_parallel=True, experts=4)),
    "experts, tp2 x dp2, ep2 x edp2": (
        4,
        Case(gated=True, tp=2, sequence_parallel=True, ep=2, etp=1, experts=4),
    ),
    "experts, tp2, edp2": (2, Case(gated=True, tp=2, sequence_parallel=True, etp=1, experts=4)),
    "packed experts, dp2": (2, Case(gated=True, experts=4, packed=True)),
    "packed experts, ep2 x edp2": (4, Case(gated=True, ep=2, experts=4, packed=True)),
    "two instances of two ranks": (4, Case(gated=True, instances=2)),
    **{
        f"{name}, dp2 x tp2": (4, Case(gated=True, tp=2, settings=settings))
        for name, settings in RULES.items()
    },
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_those_of_one_process(ranks: RankPool, name: str) -> None:
    world_size, case = LOSSES[name]
    skip_what_this_megatron_lacks(case)
    ours = ranks.run(world_size, losses_of, case)[0]
    alone = ranks.run(1, losses_of, case.alone())[0]
    for (loss, norm), (expected, expected_norm) in zip(ours, alone, strict=True):
        assert loss == pytest.approx(expected, abs=ROUNDING)
        assert norm == pytest.approx(expected_norm, rel=ROUNDING)
    assert abs(alone[0][0] - alone[-1][0]) > 100 * ROUNDING


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_with_overlap_gives_what_it_gives_without(
    ranks: RankPool, dtype: str
) -> None:
    """The same two ranks and the same sums: equal in every bit."""
    case = Case(gated=True, dtype=dtype, bucket_size=5000, clip=0.0)  # norms sum in bucket order
    plain = ranks.run(2, losses_of, case)[0]
    overlapped = ranks.run(2, losses_of, replace(case, overlap=True))[0]
    assert [loss for loss, _ in plain] == [loss for loss, _ in overlapped]
    exact = ranks.run(1, losses_of, replace(case.alone(), dtype="fp32"))[0]
    # Three decimal digits of bfloat16 in losses of 4.5.
    assert plain[-1][0] == pytest.approx(exact[-1][0], abs=0.02)


CONVOLUTIONS = {"patches.weight": 1, "grouped.weight": 2, "conv1d.weight": 1}  # their groups


# Bit for bit ----------------------------------------------------------------------------------


def separate_matrices(name: str, whole: Tensor, case: Case) -> list[Tensor]:
    """Views of a weight: the matrices that Megatron fuses into it, each (rows, cols)."""
    split_qkv = case.settings.get("split_qkv", True)
    if name.endswith("linear_qkv.weight") and split_qkv:
        by_group = whole.view(2, 32, 32)  # 2 query groups of 2 query heads, a key and a value
        return [by_group[:, :16], by_group[:, 16:24], by_group[:, 24:]]
    if (
        name.endswith("linear_fc1.weight")
        and case.gated
        and case.settings.get("split_gate_up", True)
    ):
        return list(whole.chunk(2))
    if name in CONVOLUTIONS:
        return [part.flatten(1) for part in whole.chunk(CONVOLUTIONS[name])]
    return [whole]


class Reference:
    """FlashMuon on separately stored matrices in this process, without Megatron."""

    def __init__(self, case: Case) -> None:
        from flashns_dist.integrations.megatron import Settings

        self.case = case
        self.settings = Settings(**case.settings)
        self.whole: dict[str, Tensor] = {}
        self.parts: dict[str, list[nn.Parameter]] = {}
        self.rules: dict[str, str] = {}
        self.optimizer: FlashMuon | None = None

    def add(self, name: str, value: Tensor, rule: str) -> None:
        self.whole[name], self.rules[name] = value.clone(), rule
        parts = separate_matrices(name, value, self.case) if rule == "muon" else [value]
        self.parts[name] = [
            nn.Parameter(part.reshape(-1, part.shape[-1]).clone() if rule == "muon" else part)
            for part in parts
        ]

    def step(self, gradients: dict[str, Tensor]) -> None:
        if self.optimizer is None:
            groups = []
            for rule in ("muon", "adamw"):
                named = [parts for name, parts in self.parts.items() if self.rules[name] == rule]
                groups.append(
                    {
                        "params": [p for parts in named for p in parts],
                        "update_rule": self.settings.rule(rule),
                    }
                )
            self.optimizer = FlashMuon(
                [g for g in groups if g["params"]],
                lr=0.02,
                weight_decay=0.1,
                momentum=0.9,
                nesterov=False,
                aux_lr=0.02,
                aux_weight_decay=0.1,  # Megatron's scheduler would spare vectors
                betas=(0.9, 0.999),
                exchange=ExchangeOptions(replica_group=None),
                **self.settings.rule_settings,
            )
        for name, parts in self.parts.items():
            found = gradients[name]
            pieces = separate_matrices(name, found, self.case) if len(parts) > 1 else [found]
            for param, piece in zip(parts, pieces, strict=True):
                param.grad = piece.reshape(param.shape).clone()
        self.optimizer.step()

    def value(self, name: str) -> Tensor:
        whole = self.whole[name].clone()
        parts = self.parts[name]
        views = separate_matrices(name, whole, self.case) if len(parts) > 1 else [whole]
        for view, param in zip(views, parts, strict=True):
            view.copy_(param.detach().view(view.shape))
        return whole


def compare_with_separate_matrices(case: Case, steps: int = 3) -> dict[str, int]:
    """Step on given gradients; every weight must have the bits of the reference."""
    with megatron_ready(case):
        chunks = make_chunks(case)
        optimizer = make_optimizer(case, chunks)
        params = {
            name: param
            for chunk in chunks
            for name, param in global_names(unwrapped(chunk), case).items()
        }
        reference = Reference(case)
        for name, param in params.items():
            is_aux = param.ndim < 2 or "embedding" in name or "output" in name or "router" in name
            whole = gathered(name, param, case)
            reference.add(name, whole, "adamw" if is_aux else "muon")
        for step in range(steps):
            gradients = {
                name: random_like(name, full_shape(param, case), step + 1)
                for name, param in params.items()
            }
            for chunk in chunks:
                chunk.zero_grad_buffer()
            for name, param in params.items():
                param.main_grad.copy_(shard_of(gradients[name], param, case))
            assert optimizer.step()[0]
            reference.step(gradients)
        if case.overlap:
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
        for name, param in params.items():
            expected = shard_of(reference.value(name), param, case).to(param.dtype)
            assert torch.equal(param.detach(), expected), name
            assert not torch.equal(param.detach(), shard_of(reference.whole[name], param, case))
        children = optimizer.chained_optimizers
        held = sum(len(g["params"]) for child in children for g in child.param_groups)
        return {"held": held, "all": len(params)}


def gathered(name: str, param: Tensor, case: Case) -> Tensor:
    """The whole start value, which ``fill`` made from the name."""
    from tests.integrations.megatron_training import start_value

    whole = start_value(name, param, case).to(param.dtype).float()
    assert torch.equal(shard_of(whole, param, case), param.detach())
    return whole


BITWISE = {
    "dp2": (2, Case(gated=True)),
    "dp4": (4, Case(gated=True)),
    "dp2, small buckets": (2, Case(gated=True, bucket_size=3000, overlap=True)),
    "dp2 x tp2": (4, Case(gated=True, tp=2)),
    "dp2 x tp2, replicated": (4, Case(gated=True, tp=2, distributed=False)),
    "dp2, replicated, bf16": (2, Case(gated=True, distributed=False, dtype="bf16")),
    "tp2, QKV as one matrix": (2, Case(gated=True, tp=2, settings={"split_qkv": False})),
    "dp2, fc1 as one matrix": (2, Case(gated=True, settings={"split_gate_up": False})),
    "ep2 x edp2": (4, Case(gated=True, ep=2, experts=4)),
    **{
        f"convolutions, {ranks}": (
            2,
            replace(
                case, convolutions=True, settings={"overrides": dict.fromkeys(CONVOLUTIONS, "muon")}
            ),
        )
        for ranks, case in (("dp2", Case()), ("tp2", Case(tp=2)))
    },
    **{
        f"{name}, {ranks}": (2, replace(case, gated=True, settings=settings))
        for name, settings in RULES.items()
        for ranks, case in (("dp2", Case()), ("tp2", Case(tp=2)))
    },
}


@pytest.mark.parametrize("name", BITWISE)
def test_weights_equal_separately_stored_matrices(ranks: RankPool, name: str) -> None:
    world_size, case = BITWISE[name]
    case = replace(case, clip=0.0, settings={"wire_dtype": "bf16", **case.settings})
    counts = ranks.run(world_size, compare_with_separate_matrices, case)
    if name == "dp4":
        assert all(count["held"] < count["all"] for count in counts), "every rank lacks some"


# Mixed precision in one group -----------------------------------------------------------------


def compare_mixed_dtypes() -> int:
    """Matrices in bf16 and fp32 in one group: Megatron's index map confuses them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import MegatronModule

    from tests.integrations.megatron_training import make_config

    case = Case(dtype="bf16", clip=0.0, settings={"wire_dtype": "bf16"})
    with megatron_ready(case):
        config = make_config(case)

        class Mixed(MegatronModule):
            def __init__(self) -> None:
                super().__init__(config)
                self.a = nn.Linear(3, 8, bias=False).bfloat16()
                self.b = nn.Linear(2, 16, bias=False)
                self.c = nn.Linear(8, 3, bias=False).bfloat16()

        model = Mixed()
        for name, param in model.named_parameters():
            param.data.copy_(random_like(name, tuple(param.shape)))
        starts = {name: param.detach().float() for name, param in model.named_parameters()}
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True
        )
        wrapped = DistributedDataParallel(config, ddp, model)
        optimizer = make_optimizer(case, [wrapped])
        reference = Reference(case)
        for name, value in starts.items():
            reference.add(name, value, "muon")
        for step in range(3):
            gradients = {n: random_like(n, tuple(v.shape), step + 1) for n, v in starts.items()}
            for name, param in model.named_parameters():
                param.main_grad.copy_(gradients[name])
            optimizer.step()
            reference.step(gradients)
        child = optimizer.chained_optimizers[0]
        for name, param in model.named_parameters():
            expected = reference.value(name)
            assert torch.equal(param.detach(), expected.to(param.dtype)), name
            if param in child.model_param_gbuf_map:
                held = child._get_model_param_range_map(param)["param"]
                tensors = child._get_main_param_and_optimizer_states(param)
                found = tensors["param"].detach()
                assert torch.equal(found, expected.view(-1)[held.start : held.end]), name
        return len(child.model_param_gbuf_map)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_groups_of_mixed_precision_and_ranks_with_nothing(ranks: RankPool, world_size: int) -> None:
    held = ranks.run(world_size, compare_mixed_dtypes)
    assert (min(held) == 0) == (world_size == 4)


# Packed experts -------------------------------------------------------------------------------


def compare_packed_experts(tp: int) -> None:
    """0.16's ``GroupedMLP`` layout: gate and up projection of every expert by themselves."""
    from flashns_dist.integrations.megatron.settings import Transposed
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import MegatronModule

    from tests.integrations.megatron_training import make_config

    experts, hidden, width = 3, 8, 12
    case = Case(tp=tp, clip=0.0, gated=True, settings={"wire_dtype": "bf16"})
    first = [random_like(f"first {e}", (hidden, 2 * width)) for e in range(experts)]
    second = [random_like(f"second {e}", (width, hidden)) for e in range(experts)]

    def pack(first: list[Tensor], second: list[Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """This rank's ``weight1`` (columns of gate and up) and ``weight2`` (rows)."""
        halves = [[half.chunk(tp, 1)[rank] for half in w.chunk(2, 1)] for w in first]
        packed = torch.stack([torch.cat(pair, 1) for pair in halves])
        rows = torch.stack([w.chunk(tp, 0)[rank] for w in second])
        return packed.view(hidden, -1), rows.view(-1, hidden)

    with megatron_ready(case):
        config = make_config(case)
        rank = parallel_state.get_tensor_model_parallel_rank()

        class GroupedMLP(MegatronModule):
            num_local_experts = experts

            def __init__(self) -> None:
                super().__init__(config)
                one, two = pack(first, second, rank)
                self.weight1, self.weight2 = nn.Parameter(one), nn.Parameter(two)
                for param, dim in ((self.weight1, 1), (self.weight2, 0)):
                    param.tensor_model_parallel, param.partition_dim = True, dim
                    param.partition_stride = 1

        model = GroupedMLP()
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True
        )
        optimizer = make_optimizer(case, [DistributedDataParallel(config, ddp, model)])
        alone = [nn.Parameter(half.clone()) for w in first for half in w.chunk(2, 1)]
        alone += [nn.Parameter(w.clone()) for w in second]
        reference = FlashMuon(
            alone,
            lr=0.02,
            weight_decay=0.1,
            momentum=0.9,
            nesterov=False,
            adjust_lr_fn=Transposed("original"),  # they are stored as (in, out)
            exchange=ExchangeOptions(replica_group=None),
        )
        for step in range(3):
            grad1 = [random_like(f"first {e}", (hidden, 2 * width), step + 1) for e in range(3)]
            grad2 = [random_like(f"second {e}", (width, hidden), step + 1) for e in range(3)]
            one, two = pack(grad1, grad2, rank)
            model.weight1.main_grad.copy_(one)
            model.weight2.main_grad.copy_(two)
            gradients = [half for g in grad1 for half in g.chunk(2, 1)] + grad2
            for param, gradient in zip(alone, gradients, strict=True):
                param.grad = gradient.clone()
            optimizer.step()
            reference.step()
        halves = [p.detach() for p in alone]
        joined = [torch.cat(halves[2 * e : 2 * e + 2], 1) for e in range(experts)]
        one, two = pack(joined, halves[2 * experts :], rank)
        assert torch.equal(model.weight1.detach(), one)
        assert torch.equal(model.weight2.detach(), two)


@pytest.mark.parametrize(("world_size", "tp"), [(2, 1), (4, 2)])
def test_packed_experts_equal_separate_ones(ranks: RankPool, world_size: int, tp: int) -> None:
    ranks.run(world_size, compare_packed_experts, tp)


# Non-finite gradients -------------------------------------------------------------------------


def step_with_infinity(case: Case) -> tuple[Any, ...]:
    """What happens when one rank's gradient buffer holds an infinity."""
    import torch.distributed as dist

    with megatron_ready(case):
        chunks = make_chunks(case)
        optimizer = make_optimizer(case, chunks)
        buffers = [*chunks[0].buffers, *chunks[0].expert_parallel_buffers]
        for buffer in buffers:
            buffer.grad_data.fill_(1.0)
        before = [p.detach().clone() for p in chunks[0].parameters()]
        scale = float(optimizer.get_loss_scale())
        if dist.get_rank() == 0:
            buffer.grad_data[: buffer.grad_data.numel() // 8] = float("inf")
        message = ""
        result: Any = None
        try:
            result = optimizer.step()
        except FloatingPointError as error:
            message = str(error)
        same = all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))
        inner = optimizer.chained_optimizers[0].optimizer
        idle = all(
            not state["momentum_buffer"].any()
            for state in inner.state.values()
            if "momentum_buffer" in state
        )
        return result, message, same, idle, float(optimizer.get_loss_scale()) / scale


def test_an_infinity_skips_the_step_and_halves_the_loss_scale(ranks: RankPool) -> None:
    case = Case(dtype="fp16", config={"hysteresis": 1})
    for result, message, same, idle, ratio in ranks.run(2, step_with_infinity, case):
        assert result == (False, None, None)
        assert not message
        assert same
        assert idle
        assert ratio == 0.5


def test_an_infinity_without_a_loss_scale_raises_on_every_rank(ranks: RankPool) -> None:
    case = Case(dtype="bf16", clip=0.0)
    for result, message, same, idle, _ in ranks.run(2, step_with_infinity, case):
        assert result is None
        assert "not finite" in message or "NaN or an infinity" in message
        assert same
        assert idle


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, dtype="bf16"),
        Case(pp=2, clip=0.0),
        Case(ep=2, experts=4, dtype="bf16", distributed=False),
    ],
    ids=["pipeline", "pipeline, fp32", "experts, replicated"],
)
def test_a_step_is_skipped_by_the_whole_model(ranks: RankPool, case: Case) -> None:
    """Also by other pipeline stages, and by experts, which have an optimizer of their own."""
    case = replace(case, settings={"nonfinite": "skip"})
    for result, message, same, idle, ratio in ranks.run(2, step_with_infinity, case):
        assert result == (False, None, None)
        assert not message
        assert same
        assert idle
        assert ratio == 1.0


# Errors ---------------------------------------------------------------------------------------


def refuse_unmarked_shard() -> str:
    case = Case(tp=2)
    with megatron_ready(case):
        chunks = make_chunks(case)
        param = dict(chunks[0].named_parameters())["module.decoder.layers.0.mlp.linear_fc1.weight"]
        param.tensor_model_parallel = False
        optimizer = make_optimizer(case, chunks)
        for buffer in chunks[0].buffers:
            buffer.grad_data.fill_(1.0)
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        return ""


def test_a_shard_that_is_not_marked_as_one_is_found(ranks: RankPool) -> None:
    for message in ranks.run(2, refuse_unmarked_shard):
        assert message.startswith("decoder.layers.0.mlp.linear_fc1.weight: it is not marked")
