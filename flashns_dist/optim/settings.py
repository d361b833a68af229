"""Settings of a parameter group: defaults of its update rule, checks, and initial state."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashns_dist.layout import Block, leading_blocks
from flashns_dist.optim.binding import BoundParameter, full_shape, group_view, parameter_blocks
from flashns_dist.optim.learning_rate import check_adjust_lr
from flashns_dist.optim.rules import MATRIX_RULES, RULES, MatrixRule
from flashns_dist.optim.rules.muon import orthogonalize_batch, resolve_ns_coefficients
from flashns_dist.optim.rules.rule import check_flag, check_fraction, number

UPDATE_RULES = tuple(RULES)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OF_ALL = ("aux_lr", "aux_weight_decay", "nonfinite", "exchange", "cuda_graph")
RULE_SETTINGS = {key for rule in RULES.values() for key in rule.settings}
_FLAGS = {"nesterov", "cautious"} | {
    key for rule in RULES.values() for key, value in rule.settings.items() if value is False
}


def rule_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that only some rules have, for one rule: what is given, else the defaults.

    Raises:
        ValueError: No rule has this name.
    """
    check_rule(name)
    return {key: given.get(key, default) for key, default in RULES[name].settings.items()}


def check_rule(name: str) -> None:
    """Raise ValueError for an unknown update rule."""
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"update_rule={name!r}: use one of {UPDATE_RULES}")


def check_complete(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a group whose update rule is unknown, or was set after it was made."""
    rule = group["update_rule"]
    check_rule(rule)
    missing = [key for key in RULES[rule].settings if key not in group]
    if missing:
        raise ValueError(
            f"update_rule={rule!r}: the group lacks {missing[0]!r}, since it was made with another "
            "update rule, which keeps another state; make a new optimizer"
        )


def check_used(given: Mapping[str, Any], rules: Collection[str]) -> None:
    """Raise ValueError for a setting that none of these update rules has."""
    for key, value in given.items():
        if key not in RULE_SETTINGS:
            raise ValueError(
                f"{key} is neither an argument of FlashMuon nor a setting of an update rule, which "
                f"are {sorted(RULE_SETTINGS)}"
            )
        if not any(key in RULES[name].settings for name in rules):
            owners = [name for name, rule in RULES.items() if key in rule.settings]
            raise ValueError(
                f"{key}={value!r} is a setting of the update rules {owners}, which no group has; "
                "leave it out, or choose one of them with update_rule"
            )


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting out of range or of another rule, naming it."""
    check_rule(group["update_rule"])
    rule = RULES[group["update_rule"]]
    for key in sorted(RULE_SETTINGS - set(rule.settings)):
        if key in group:
            owners = [name for name, other in RULES.items() if key in other.settings]
            raise ValueError(
                f"{key}={group[key]!r} is a setting of the update rules {owners}, not of "
                f"{rule.name!r}; leave it out, or choose another update_rule for the group"
            )
    for key in _OF_ALL:
        if key in group:
            instead = f"; call it {key[4:]!r} in a group" if key.startswith("aux_") else ""
            raise ValueError(f"{key}={group[key]!r} is FlashMuon's, not a group's{instead}")
    if "matrix_views" in group:
        raise ValueError(
            "a group has no 'matrix_views': call it 'matrix_view', or give it to parameter_groups"
        )
    check_values(group)


def check_values(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting out of range, naming it."""
    check_complete(group)
    rule = RULES[group["update_rule"]]
    for key in ("lr", "weight_decay", "eps"):
        if number(key, group[key]) < 0:
            raise ValueError(f"{key}={group[key]} must not be negative")
    check_fraction("momentum", group["momentum"])
    _check_betas(group["betas"])
    for key, value in group.items():
        if key in _FLAGS:
            check_flag(key, value)
    if group["rounding"] not in ("nearest", "stochastic"):
        raise ValueError(f'rounding={group["rounding"]!r}: use "nearest" or "stochastic"')
    _check_view(group.get("matrix_view"))
    check_adjust_lr(group["adjust_lr_fn"])
    if not isinstance(group["method"], str):
        raise ValueError(f'method={group["method"]!r} must be a name, such as "auto"')
    steps = number("ns_steps", group["ns_steps"])
    if steps != int(steps) or steps < 1:
        raise ValueError(f"ns_steps={group['ns_steps']!r} must be a whole number, at least 1")
    resolve_ns_coefficients(group)
    if is_matrix_rule(group):
        orthogonalize_batch(torch.zeros(0, 2, 2, device="cpu"), group)
    rule.check(group)


def _check_betas(betas: Any) -> None:
    try:
        found = [number("betas", beta) for beta in betas]
    except (TypeError, ValueError):
        found = []
    if len(found) != 2 or not all(0 <= beta < 1 for beta in found):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")


def _check_view(view: Any) -> None:
    by_pattern = view if isinstance(view, Mapping) else {"*": view}
    if not all(isinstance(p, str) and (v is None or callable(v)) for p, v in by_pattern.items()):
        raise ValueError(
            f"matrix_view={view!r} must be a view of flashns_dist.layout, a function from shapes "
            "to blocks, None, or a mapping from name patterns to these"
        )


def is_matrix_rule(group: Mapping[str, Any]) -> bool:
    """Whether the group's parameters are matrices, not auxiliary."""
    rule = group["update_rule"]  # anything, where it was set later
    return isinstance(rule, str) and rule in MATRIX_RULES


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
    shape = full_shape(param)
    if group_view(name, group) is not None:
        parameter_blocks(name, shape, group)
    elif not 2 <= len(shape) <= 3:
        raise ValueError(
            f"{name}: shape {shape} is not a matrix or a stack of matrices; put it "
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


def check_states(
    bound: Sequence[BoundParameter],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Raise NotImplementedError where a rule's state is not there, or of another size.

    An adapter that keeps many parameters in one buffer may make no states by block.
    """
    sizes: dict[tuple[int, str], int] = {}
    last: dict[tuple[int, str], BoundParameter] = {}
    for parameter in bound:
        group = groups[parameter.group_index]
        rule = RULES[group["update_rule"]]
        needed = {**dict.fromkeys(rule.local_states, 0), **block_sizes(group, parameter.blocks)}
        for name, size in needed.items():
            key = (id(parameter.storage), name)
            sizes[key] = sizes.get(key, 0) + size
            last[key] = parameter
    for (_, name), parameter in last.items():
        rule_name = groups[parameter.group_index]["update_rule"]
        found = state.get(parameter.storage, {}).get(name)
        size = sizes[id(parameter.storage), name]
        if found is None or (size and found.numel() != size):
            has = "none" if found is None else f"one of {found.numel()} elements"
            raise NotImplementedError(
                f"{parameter.name}: update_rule={rule_name!r} keeps a state {name!r}"
                f"{f' of {size} elements' if size else ''} and there is {has}. An adapter that "
                "cannot make it (init_state with the blocks of the buffer) needs another rule."
            )


def state_problem(
    bound: Sequence[BoundParameter], state: Mapping[Tensor, Mapping[str, Any]]
) -> str | None:
    """What is wrong where a state is gone or on another device than its parameter, or None."""
    last: Tensor | None = None  # many parameters of an adapter may be in one
    for parameter in bound:
        storage = parameter.storage
        if storage is last:
            continue
        last, device = storage, storage.device
        entries = state.get(storage)
        if not entries:
            return (
                f"{parameter.name}: its state, which was there since the optimizer was made, is "
                "gone. Put it back, or make a new optimizer."
            )
        for name, value in entries.items():
            if name != "step" and getattr(value, "device", device) != device:
                return (
                    f"{parameter.name}: its state {name!r} is on {value.device}, the parameter on "
                    f"{device}. Move both before step()."
                )
    return None


def state_names(group: Mapping[str, Any], blocks: tuple[Block, ...]) -> set[str]:
    """Names of a parameter's states."""
    rule = RULES[group["update_rule"]]
    return {"step", *rule.local_states, *block_sizes(group, blocks)}


def block_sizes(group: Mapping[str, Any], blocks: Sequence[Block]) -> dict[str, int]:
    """Names of a parameter's states by block, and how many numbers each has."""
    rule = RULES[group["update_rule"]]
    sizes: dict[str, int] = {}
    for block in blocks if isinstance(rule, MatrixRule) else ():
        for name, size in rule.block_states(group, block).items():  # type: ignore[union-attr]
            sizes[name] = sizes.get(name, 0) + size
    return sizes


__all__ = [
    "RULE_SETTINGS",
    "UPDATE_RULES",
    "block_sizes",
    "check_complete",
    "check_group",
    "check_parameter",
    "check_rule",
    "check_states",
    "check_used",
    "check_values",
    "init_state",
    "is_matrix_rule",
    "rule_settings",
    "state_names",
    "state_problem",
]
