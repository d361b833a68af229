"""AdamW for the auxiliary parameters, elementwise where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from flashns_dist.optim.rules.rule import AuxiliaryRule


class AdamW(AuxiliaryRule):
    """AdamW (arXiv 1711.05101), as ``torch.optim.AdamW``."""

    name = "adamw"
    local_states = ("exp_avg", "exp_avg_sq")

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: Mapping[str, Any],
        write: Callable[[int, Tensor], None],
    ) -> None:
        adamw_step(weights, gradients, states, group, write)


def adamw_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    group: Mapping[str, Any],
    write: Callable[[int, Tensor], None],
) -> None:
    """``AdamW.step``: ``exp_avg``, ``exp_avg_sq`` (fp32 or fp64) and ``step`` of each change.

    torch's fused kernel on the CPU walks the four memories side by side, whatever their strides, so
    that all get those of the moments, which are dense.
    """
    beta1, beta2 = group["betas"]
    chosen = [i for i, weight in enumerate(weights) if weight.numel()]
    for i, weight in enumerate(weights):
        if not weight.numel():
            states[i]["step"] += 1
    if not chosen:
        return
    moments = [states[i]["exp_avg"] for i in chosen]
    full = [_like(weights[i], moment) for i, moment in zip(chosen, moments, strict=True)]
    adamw(
        full,
        [_like(gradients[i], moment) for i, moment in zip(chosen, moments, strict=True)],
        moments,
        [states[i]["exp_avg_sq"] for i in chosen],
        [],
        [states[i]["step"] for i in chosen],
        fused=_fused(full[0].device),
        amsgrad=False,
        beta1=float(beta1),
        beta2=float(beta2),
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=False,
    )
    for value, index in zip(full, chosen, strict=True):
        if value.dtype != weights[index].dtype:
            write(index, value)
        elif value is not weights[index]:
            weights[index].copy_(value)


def _like(value: Tensor, moment: Tensor) -> Tensor:
    """The value, or a copy in the moment's dtype and strides where it has others."""
    if value.dtype == moment.dtype and value.stride() == moment.stride():
        return value
    return torch.empty_like(moment).copy_(value)


def _fused(device: torch.device) -> bool:
    # The CPU's fused kernel rounds the last few elements of a memory otherwise than the others, so
    # that moments would depend on the sharding.
    return device.type == "cuda"
