"""Lion for the auxiliary parameters, elementwise where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from flashns_dist.optim.rules.rule import AuxiliaryRule


class Lion(AuxiliaryRule):
    """Lion (arXiv 2302.06675): the sign of an average of momentum and gradient."""

    name = "lion"
    local_states = ("exp_avg",)

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: Mapping[str, Any],
        write: Callable[[int, Tensor], None],
    ) -> None:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        for index, (weight, gradient, state) in enumerate(
            zip(weights, gradients, states, strict=True)
        ):
            state["step"] += 1
            momentum = state["exp_avg"]
            if not weight.numel():
                continue
            # Products and sums apart: fused ones would round by where in the memory they are.
            full, gradient = weight.to(momentum.dtype), gradient.to(momentum.dtype)
            direction = (momentum * beta1).add_(gradient * (1 - beta1)).sign_()
            full.mul_(1 - lr * decay).sub_(direction.mul_(lr))
            momentum.mul_(beta2).add_(gradient * (1 - beta2))
            if full.dtype != weight.dtype:
                write(index, full)


__all__ = ["Lion"]
