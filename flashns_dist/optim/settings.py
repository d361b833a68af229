"""Settings of a parameter group: defaults of its update rule, checks, and initial state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashns_dist.layout import Block, leading_blocks
from flashns_dist.optim.binding import group_view, parameter_blocks
from flashns_dist.optim.learning_rate import check_adjust_lr
from flashns_dist.optim.rules import MATRIX_RULES, RULES, MatrixRule
from flashns_dist.optim.rules.muon import orthogonalize_batch, resolve_ns_coefficients

UPDATE_RULES = tuple(RULES)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_RULE_SETTINGS = {key for rule in RULES.values() for key in rule.settings}


def rule_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that only some rules have, for one rule: what is given, else the defaults.

    Raises:
        ValueError: No rule has this name.
    """
    check_rule(name)
    return {key: given.get(key, default) for key, default in RULES[name].settings.items()}


def check_rule(name: str) -> None:
    """Raise ValueError for an unknown update rule."""
    if name not in RULES:
        raise ValueError(f"update_rule={name!r}: use one of {UPDATE_RULES}")


def check_known(given: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that no update rule has."""
    for key in given:
        if key not in _RULE_SETTINGS:
            raise ValueError(
                f"{key} is neither an argument of FlashMuon nor a setting of an update rule, which "
                f"are {sorted(_RULE_SETTINGS)}"
            )


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting out of range or of another rule, naming it."""
    check_rule(group["update_rule"])
    rule = RULES[group["update_rule"]]
    for key in sorted(_RULE_SETTINGS - set(rule.settings)):
        if key in group:
            owners = [name for name, other in RULES.items() if key in other.settings]
            raise ValueError(
                f"{key}={group[key]!r} is a setting of the update rules {owners}, not of "
                f"{rule.name!r}; leave it out, or choose another update_rule for the group"
            )
    for key in ("lr", "weight_decay", "eps"):
        if not float(group[key]) >= 0:
            raise ValueError(f"{key}={group[key]} must not be negative")
    if not 0 <= float(group["momentum"]) < 1:
        raise ValueError(f"momentum={group['momentum']} must be in [0, 1)")
    if len(group["betas"]) != 2 or not all(0 <= float(b) < 1 for b in group["betas"]):
        raise ValueError(f"betas={group['betas']} must be two numbers in [0, 1)")
    if group["rounding"] not in ("nearest", "stochastic"):
        raise ValueError(f'rounding={group["rounding"]!r}: use "nearest" or "stochastic"')
    check_adjust_lr(group["adjust_lr_fn"])
    resolve_ns_coefficients(group)
    if is_matrix_rule(group):
        orthogonalize_batch(torch.zeros(0, 2, 2), group)
    rule.check(group)


def is_matrix_rule(group: Mapping[str, Any]) -> bool:
    """Whether the group's parameters are matrices, not auxiliary."""
    return group["update_rule"] in MATRIX_RULES


def check_parameter(name: str, param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter that its group's update rule cannot take."""
    if param.dtype not in _FLOATS:
        raise ValueError(
            f"{name}: dtype {param.dtype} is not supported; parameters must be fp32, fp64, bf16 or "
            "fp16"
        )
    if group["rounding"] == "stochastic" and param.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name}: stochastic rounding is for bf16, not {param.dtype}")
    if not is_matrix_rule(group):
        return
    if group_view(name, group) is not None:
        parameter_blocks(name, param.shape, group)
    elif not 2 <= param.ndim <= 3:
        raise ValueError(
            f"{name}: shape {tuple(param.shape)} is not a matrix or a stack of matrices; put it "
            'into a group with update_rule="adamw" (parameter_groups does), or give the group a '
            "matrix_view (Flattened() for convolutions)"
        )


def init_state(
    param: Tensor, group: Mapping[str, Any], blocks: tuple[Block, ...] | None = None
) -> dict[str, Tensor]:
    """Zero state of a parameter, in its sharding, in fp32 (fp64 for fp64 parameters).

    Args:
        param: A parameter, or an adapter's buffer of many.
        group: Parameter group.
        blocks: Its matrices, in the order in which they are bound; None for those of its shape.
    """
    shape = tuple(int(size) for size in param.shape)
    if blocks is None:
        blocks = leading_blocks(shape) if len(shape) >= 2 and is_matrix_rule(group) else ()
    return RULES[group["update_rule"]].init_state(param.detach(), group, blocks)


def state_names(group: Mapping[str, Any], blocks: tuple[Block, ...]) -> set[str]:
    """Names of a parameter's states."""
    rule = RULES[group["update_rule"]]
    by_block = (
        {name for block in blocks for name in rule.block_states(group, block)}
        if isinstance(rule, MatrixRule)
        else set()
    )
    return {"step", *rule.local_states, *by_block}


__all__ = [
    "UPDATE_RULES",
    "check_group",
    "check_known",
    "check_parameter",
    "check_rule",
    "init_state",
    "is_matrix_rule",
    "rule_settings",
    "state_names",
]
