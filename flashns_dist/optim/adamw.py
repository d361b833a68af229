"""AdamW for the auxiliary parameters, elementwise where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    group: dict[str, Any],
    write: Callable[[int, Tensor], None],
) -> None:
    """One AdamW step, as ``torch.optim.AdamW``, on this rank's parts.

    Args:
        weights: This rank's parts. fp32 and fp64 are updated in place.
        gradients: Same shapes, any float dtype.
        states: ``exp_avg`` and ``exp_avg_sq`` (fp32 or fp64) and ``step`` of each.
        group: Parameter group: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        write: Called with (index, new value) for weights of lower precision, which are computed in
            fp32.
    """
    beta1, beta2 = group["betas"]
    chosen = [i for i, weight in enumerate(weights) if weight.numel()]
    for i, weight in enumerate(weights):
        if not weight.numel():
            states[i]["step"] += 1
    if not chosen:
        return
    dtypes = [states[i]["exp_avg"].dtype for i in chosen]
    full = [weights[i].to(dtype) for i, dtype in zip(chosen, dtypes, strict=True)]
    adamw(
        full,
        [gradients[i].to(dtype) for i, dtype in zip(chosen, dtypes, strict=True)],
        [states[i]["exp_avg"] for i in chosen],
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


def _fused(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


def init_adamw_state(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero moments in the weight's sharding; ``step`` on its device, as the fused kernel needs."""
    device = getattr(weight, "_local_tensor", weight).device
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(weight, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(weight, dtype=dtype, memory_format=torch.preserve_format),
    }
