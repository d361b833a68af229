"""Small models, data and references for the DeepSpeed tests, and how to run engines in a rank."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashns_dist.layout import MatrixView
from flashns_dist.optim import ExchangeOptions, FlashMuon, parameter_groups

# Read when deepspeed is first imported; the pool's ranks import this module before it.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the native Muon compiles for a minute else

BATCH = 24  # divides by 1, 2 and 3 ranks times 1 and 4 micro-batches
STEPS = 3
PARAMS = {
    "lr": 0.05,
    "weight_decay": 0.1,
    "aux_lr": 0.01,
    "aux_weight_decay": 0.02,
    "wire_dtype": "fp32",
}


class Term(nn.Module):
    """A weight whose gradient is the mean of what it is given."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        numel = prod(shape)
        self.weight = nn.Parameter(torch.linspace(-1, 1, numel).sin().reshape(shape))

    def forward(self, given: Tensor) -> Tensor:
        return (self.weight * given).sum() / len(given)


class Terms(nn.Module):
    """A linear function of its weights with gradients that every order of summation gives exactly.

    They are integers: what is given is a multiple of the batch size, so that averaging over
    samples, micro-batches and ranks in any order is exact. The weights after training must then be
    equal in every bit, whatever the sharding.
    """

    def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(Term(shape) for shape in shapes)

    def forward(self, *given: Tensor) -> Tensor:
        losses = [term(value) for term, value in zip(self.terms, given, strict=True)]
        return torch.stack(losses).sum()


MANY = ((21, 35), (35, 21), (17, 17), (29,), (5, 40), (7,), (33, 3), (3, 33), (64,))
FEW = ((13, 11), (5,))  # one matrix: fewer than ranks


def terms_batch(model: Terms, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [
        BATCH * torch.randint(-9, 10, (BATCH, *shape), generator=generator).float()
        for shape in (tuple(getattr(t.weight, "ds_shape", t.weight.shape)) for t in model.terms)
    ]


class Block(nn.Module):
    """No operation here has two parameters.

    torch may compute the gradients of, say, a weight and its bias in either order, depending on
    what the process has run before. ZeRO 2 adds up buckets in that order, so it mixes gradients of
    different parameters where ranks differ in it, as ranks of the pool do.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 35, bias=False)
        self.down = nn.Linear(35, width, bias=False)
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.shift + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model with odd sizes."""

    def __init__(self, vocabulary: int = 29, width: int = 21, heads: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def transformer_batch(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, 29, (BATCH, 7), generator=generator)
    return [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()]


def make(model: str, seed: int = 0) -> tuple[nn.Module, Callable[[Any, int], list[Tensor]]]:
    """A model by name, and its data."""
    torch.manual_seed(seed)
    if model == "transformer":
        return Transformer(), transformer_batch
    return Terms({"many": MANY, "few": FEW}[model]), terms_batch


# Reference ------------------------------------------------------------------------------------


@cache
def reference(
    model: str,
    clip: float = 0.0,
    steps: int = STEPS,
    micro_batches: int = 1,
    views: tuple[tuple[str, MatrixView], ...] = (),
    rule: tuple[tuple[str, Any], ...] = (),
) -> dict[str, Any]:
    """Weights, losses and raw gradient norms of FlashMuon in one process without DeepSpeed."""
    module, data = make(model)
    arguments = {key: value for key, value in PARAMS.items() if key != "wire_dtype"} | dict(rule)
    exchange = ExchangeOptions(wire_dtype=torch.float32, replica_group=None)
    groups = parameter_groups(module, matrix_views=dict(views))
    optimizer = FlashMuon(groups, **arguments, exchange=exchange)
    losses, norms = [], []
    for step in range(steps):
        batch = data(module, step)
        module.zero_grad()
        total = 0.0
        for part in range(micro_batches):
            loss = module(*(t.chunk(micro_batches)[part] for t in batch)) / micro_batches
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        if clip:
            norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in module.parameters()])
        norms.append(float(norm))
        optimizer.step()
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return {"weights": weights, "losses": losses, "norms": norms}


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[k].double() - theirs[k]).square().sum()) for k in ours)
    return sqrt(difference / sum(float(v.double().square().sum()) for v in theirs.values()))


def rounding_error(model: str, clip: float) -> float:
    """How far two orders of summation in one process are apart: the unit of tolerances."""
    plain = reference(model, clip)["weights"]
    return relative_difference(reference(model, clip, micro_batches=12)["weights"], plain)


# DeepSpeed ------------------------------------------------------------------------------------


@contextmanager
def deepspeed_ready() -> Iterator[Any]:
    """DeepSpeed on this rank's process group, with nothing left of an earlier one."""
    import deepspeed
    import flashns_dist.integrations.deepspeed  # noqa: F401
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import torch_autocast
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    # Else a shared-memory op is compiled, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.comm.comm.cdb = None
    importlib.reload(groups)
    # Numbers that ranks compare, though they have run different numbers of the pool's jobs.
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # by an engine that is gone
    deepspeed.init_distributed(dist_init_required=False)
    yield deepspeed


def is_older() -> bool:
    """Whether this DeepSpeed is one before 0.19, of which the adapter refuses more."""
    from flashns_dist.integrations.deepspeed.internals import RELEASE

    return RELEASE < (0, 19)


def can_accumulate(stage: int) -> bool:
    """Whether this DeepSpeed keeps all micro-batches' gradients; else the adapter refuses."""
    from flashns_dist.integrations.deepspeed.internals import RELEASE

    return stage != 2 or RELEASE >= (0, 18, 4)


def config(
    stage: int,
    world_size: int,
    *,
    dtype: str = "fp32",
    accumulation: int = 1,
    clip: float = 0.0,
    optimizer: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": BATCH // accumulation // world_size,
        "steps_per_print": 10**9,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **extra,
    }
    if stage == 3:
        made["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
    if dtype != "fp32":
        made.setdefault(dtype, {"enabled": True})
    if optimizer is None:
        optimizer = {"type": "FlashMuon", "params": dict(PARAMS)}
    if optimizer:
        made["optimizer"] = copy.deepcopy(optimizer)
    return made


def train(
    engine: Any,
    data: Callable[[Any, int], list[Tensor]],
    steps: range,
    scale_loss: Callable[[int], float] = lambda step: 1.0,
) -> tuple[list[float], list[float | None]]:
    """Losses (this rank's) and reported gradient norms."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    accumulation = engine.gradient_accumulation_steps()
    losses, norms = [], []
    for step in steps:
        mine = [t.chunk(size)[rank] for t in data(engine.module, step)]
        total = 0.0
        for part in range(accumulation):
            inputs = [t.chunk(accumulation)[part].to(engine.device) for t in mine]
            loss = engine(*inputs) * scale_loss(step)
            total += float(loss.detach()) / accumulation
            engine.backward(loss)
            engine.step()
        losses.append(total)
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    return losses, norms


def full_weights(engine: Any, *, low_precision: bool = False) -> dict[str, Tensor]:
    """fp32 master weights, or what the model computes with, on every rank.

    Collectives: one or more per parameter.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, param in engine.module.named_parameters():
        value = None
        if not low_precision and (hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")):
            value = safe_get_full_fp32_param(param)
        if value is None:
            sharded = [param] if hasattr(param, "ds_id") else []
            with deepspeed.zero.GatheredParameters(sharded):
                value = param.detach().float().clone()
        found[name] = value.detach().float().cpu().clone()
    return found
