"""The step of auxiliary parameters: elementwise, where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.rounding import element_noise, rounding_seed, stochastic_round_
from flashns_dist.optim.rules import AUXILIARY_RULES


def step_auxiliary(
    bound: Sequence[BoundParameter],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, dict[str, Tensor]],
    active: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> None:
    """Update every active parameter whose group has an auxiliary rule. No collectives.

    Args:
        bound: All parameters.
        groups: ``param_groups`` of the optimizer.
        state: Its state.
        active: Which parameters have a gradient on some rank.
        gradients: This rank's parts of them; None counts as zero.
    """
    for group_index, group in enumerate(groups):
        rule = AUXILIARY_RULES.get(group["update_rule"])
        if rule is None:
            continue
        chosen = [i for i, b in enumerate(bound) if b.group_index == group_index and active[i]]
        members = [bound[i] for i in chosen]
        weights = [b.local(b.storage) for b in members]
        local_gradients = [
            torch.zeros_like(w) if (g := gradients[i]) is None else g
            for i, w in zip(chosen, weights, strict=True)
        ]
        states = [
            {
                key: value if key == "step" else b.local(value)
                for key, value in state[b.storage].items()
            }
            for b in members
        ]
        rule.step(weights, local_gradients, states, group, _Writer(members, states, group))


class _Writer:
    """Writes fp32 results into weights of lower precision."""

    def __init__(
        self,
        bound: Sequence[BoundParameter],
        states: Sequence[dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        self._bound, self._states, self._group = bound, states, group

    def __call__(self, index: int, value: Tensor) -> None:
        bound = self._bound[index]
        weight = bound.local(bound.storage)
        if self._group["rounding"] == "nearest":
            weight.copy_(value)
            return
        seed = rounding_seed(bound.name, int(self._states[index]["step"].item()))
        for fragment in bound.layout.fragments[bound.group_rank]:
            noise = element_noise(seed, fragment.box, bound.layout.shape, weight.device)
            stochastic_round_(fragment.view(weight), fragment.view(value), noise)


__all__ = ["step_auxiliary"]
