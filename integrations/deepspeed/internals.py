"""The one place that knows DeepSpeed's internals, and how its versions differ.

Checked against 0.18.2, 0.18.4 and 0.19.8. DeepSpeed has no public description of how it lays
parameters out, so each function reads attributes of its wrappers and fails with the missing one's
name.
What is handed over decides, not the ZeRO stage: stage 1 in bf16 with fp32 accumulation has another
wrapper than stage 1 in fp32, and which one has changed between versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from .partitions import (
    Partition,
    Slice,
    check_slices,
    even_ranges,
    sequential_ranges,
)

VERSION: str = deepspeed.__version__
RELEASE = tuple(int(part) for part in re.findall(r"\d+", VERSION)[:3])

_FLAT_WRAPPERS = {
    # wrapper: (low-precision parameters, their flat buffers, this rank's master weights), by group
    "DeepSpeedZeroOptimizer": (
        "bit16_groups",
        "bit16_groups_flat",
        "single_partition_of_fp32_groups",
    ),
    "BF16_Optimizer": ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
}
_HOOKED = ("_configure_basic_optimizer", "_configure_optimizer", "_is_supported_optimizer")


def attribute(owner: object, name: str) -> Any:
    """An internal attribute of DeepSpeed.

    Raises:
        RuntimeError: This version lacks it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        raise RuntimeError(
            f"DeepSpeed {VERSION} has no {kind}.{name}, which FlashMuon's adapter needs. Use "
            "deepspeed 0.18.2 to 0.19.8, or report this version."
        ) from None


def known_defects(engine: Any) -> Iterator[tuple[str, str]]:
    """Settings that this version gets wrong with any optimizer, and why: they are refused."""
    if RELEASE >= (0, 19):
        return
    stage = engine.zero_optimization_stage()
    accumulates = engine.gradient_accumulation_steps() > 1
    if stage == 2 and accumulates and RELEASE < (0, 18, 4):
        yield (
            "stage 2 with gradient accumulation",
            f"{VERSION} loses all micro-batches but one. Use deepspeed 0.18.4, or stage 1 or 3.",
        )
    offloads = getattr(engine.zero_offload_optimizer(), "device", None) not in (None, "none")
    if stage == 2 and offloads and accumulates:
        yield (
            "offload_optimizer in stage 2 with gradient accumulation",
            f"{VERSION} loses part of the gradients. Use deepspeed 0.19, or stage 1 or 3.",
        )
    if stage == 2 and not engine.zero_contiguous_gradients():
        yield (
            "contiguous_gradients=false in stage 2",
            f"{VERSION} averages gradients wrongly. Use deepspeed 0.19, or leave it true.",
        )
    if stage in (1, 2) and engine.load_universal_checkpoint():
        yield (
            f"universal checkpoints in stage {stage}",
            f"{VERSION} loads wrong weights. Use deepspeed 0.19, or stage 3.",
        )


def engine_methods() -> dict[str, Any]:
    """The engine's methods that are wrapped, by name."""
    return {name: attribute(DeepSpeedEngine, name) for name in _HOOKED}


def allow_under_zero(optimizer_class: type) -> None:
    """Make ZeRO accept an optimizer without ``zero_allow_untested_optimizer``."""
    if optimizer_class not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)


def find_partitions(engine: Any, groups: Sequence[Mapping[str, Any]]) -> list[Partition]:
    """What the wrapped optimizer will be asked to update, in the order of DeepSpeed's calls.

    Args:
        engine: After its optimizer has been wrapped.
        groups: The optimizer's parameter groups as they were before that.

    Raises:
        NotImplementedError: The wrapper is unknown.
        RuntimeError: An internal is missing, or parameters do not lie where expected.
    """
    wrapper = engine.optimizer
    kind = type(wrapper).__name__
    names = {id(p): name for g in groups for p, name in zip(g["params"], g["names"], strict=True)}
    if kind in _FLAT_WRAPPERS:
        return _flat_partitions(wrapper, names, _FLAT_WRAPPERS[kind])
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _stage3_partitions(wrapper, names)
    if kind == "FP16_UnfusedOptimizer":
        _check_unscaled(wrapper)
        masters = attribute(wrapper, "fp32_groups")
        originals = attribute(wrapper, "fp16_groups")
        return _whole_partitions(engine, masters, originals, names)
    if wrapper is engine.basic_optimizer:
        params = [list(g["params"]) for g in groups]
        return _whole_partitions(engine, params, params, names)
    raise NotImplementedError(
        f"FlashMuon's adapter does not know DeepSpeed {VERSION}'s {kind}. Use ZeRO stage 0, 1, 2 "
        "or 3 without the feature that selects it."
    )


def _check_unscaled(wrapper: Any) -> None:
    """Refuse stage 0 with a loss scale: ``step`` divides by it, ``backward`` does not multiply.

    fp16 in 0.19, bf16 too in 0.18. Clipping and AdamW would see gradients that are too small.
    """
    scale = float(attribute(wrapper, "loss_scale"))
    if scale != 1:
        raise NotImplementedError(
            f"FlashMuon does not support DeepSpeed {VERSION}'s stage 0 with a loss scale of "
            f"{scale:g}: its step divides gradients by the scale, but its backward has not "
            'multiplied the loss by it. Use stage 1, or "fp16": {"loss_scale": 1}.'
        )


def _whole_partitions(
    engine: Any,
    masters: Sequence[Sequence[Tensor]],
    originals: Sequence[Sequence[Tensor]],
    names: Mapping[int, str],
) -> list[Partition]:
    """Stage 0: every rank has all parameters, and their averaged gradients."""
    group = attribute(engine, "seq_data_parallel_group")
    return [
        Partition(master, index, group, (), names[id(original)], tuple(original.shape))
        for index, (held, owned) in enumerate(zip(masters, originals, strict=True))
        for master, original in zip(held, owned, strict=True)
    ]


def _flat_partitions(
    wrapper: Any, names: Mapping[int, str], attributes: tuple[str, str, str]
) -> list[Partition]:
    """ZeRO 1 and 2: one buffer per group, cut into equal partitions.

    The parameters are views of the buffer, so their addresses say where they lie whatever the
    order (``round_robin_gradients``) and alignment; ``_hp_mapping`` is wrong under the former.
    """
    params_by_group, flats, masters = (attribute(wrapper, name) for name in attributes)
    process_groups = attribute(wrapper, "real_dp_process_group")
    partitions = []
    for index, (params, flat, master) in enumerate(
        zip(params_by_group, flats, masters, strict=True)
    ):
        group = process_groups[index]
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        slices, low = [], []
        for param in sorted((p for p in params if p.numel()), key=Tensor.data_ptr):
            begin, rest = divmod(param.data_ptr() - flat.data_ptr(), flat.element_size())
            if rest or begin < 0 or begin + param.numel() > flat.numel():
                raise RuntimeError(
                    f"{names[id(param)]}: it is not a view of DeepSpeed {VERSION}'s flat buffer of "
                    f"parameter group {index}, which FlashMuon's adapter relies on. Use deepspeed "
                    "0.18.2 to 0.19.8 without the feature that moves it."
                )
            ranges = sequential_ranges(begin, param.numel(), master.numel(), size)
            start, stop = ranges[rank]
            offset = begin + start - rank * master.numel()
            slices.append(Slice(names[id(param)], tuple(param.shape), ranges, offset))
            low.append(param.detach().reshape(-1)[start:stop])
        _raise_problem(check_slices(master, slices, rank, low), group)
        partitions.append(Partition(master, index, group, tuple(slices)))
    return partitions


def _stage3_partitions(wrapper: Any, names: Mapping[int, str]) -> list[Partition]:
    """ZeRO 3: sub-groups of each group; each parameter cut by itself."""
    sub_groups = attribute(wrapper, "fp16_groups")
    masters = attribute(wrapper, "fp32_partitioned_groups_flat")
    group_ids = attribute(wrapper, "sub_group_to_group_id")
    positions = attribute(wrapper, "grad_position")
    partitions = []
    for index, (params, master) in enumerate(zip(sub_groups, masters, strict=True)):
        group = getattr(params[0], "ds_process_group", None) or attribute(
            wrapper, "dp_process_group"
        )
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        slices, low = [], []
        for param in params:
            sub_group, offset, numel = positions[wrapper.get_param_id(param)]
            assert sub_group == index
            shape = tuple(int(n) for n in attribute(param, "ds_shape"))
            ranges = even_ranges(int(attribute(param, "ds_numel")), int(numel), size)
            slices.append(Slice(names[id(param)], shape, ranges, int(offset)))
            start, stop = ranges[rank]
            low.append(attribute(param, "ds_tensor").detach().reshape(-1)[: stop - start])
        _raise_problem(check_slices(master, slices, rank, low), group)
        partitions.append(Partition(master, group_ids[index], group, tuple(slices)))
    return partitions


def _raise_problem(problem: str, group: dist.ProcessGroup) -> None:
    """Raise on all ranks where one has found a problem. Collectives: one all_gather_object."""
    found: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(found, problem, group=group)
    wrong = [(dist.get_global_rank(group, i), text) for i, text in enumerate(found) if text]
    if wrong:
        rank, text = wrong[0]
        raise RuntimeError(
            f"rank {rank}: {text}. FlashMuon's adapter does not understand how DeepSpeed {VERSION} "
            "lays parameters out under this config; use deepspeed 0.18.2 to 0.19.8 or report it."
        )


def gradient_norm(wrapper: Any) -> float | None:
    """The global norm of this step's gradients, or None where DeepSpeed has not computed it.

    DeepSpeed writes -1 for a norm that is not finite; waits for the device where it is a tensor.
    """
    norm = getattr(wrapper, "_global_grad_norm", None)
    if norm is None:
        return None
    value = float(norm)
    return value if value >= 0 else float("nan")


def is_initializing(gradients: Sequence[Tensor | None]) -> bool:
    """Whether ``step()`` is called by a wrapper's constructor, with zeros: not a step."""
    return all(g is None or not bool(torch.count_nonzero(g)) for g in gradients)
