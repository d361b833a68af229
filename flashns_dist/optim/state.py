"""State dicts: plain values out, any precision and any origin in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from flashns_dist.layout import Block
from flashns_dist.optim.rules import AUXILIARY_RULES, MOMENTUM_SUMS, RULES
from flashns_dist.optim.settings import block_sizes

_PLAIN = (bool, int, float, str, type(None), Tensor)
_NOT_SAVED = "<not saved>"


def plain_state_dict(state_dict: dict[str, Any], *, keep_keys: bool = False) -> dict[str, Any]:
    """Leave out group settings that ``torch.load(weights_only=True)`` would refuse.

    Args:
        state_dict: Of an optimizer.
        keep_keys: Put a text in their place: ``flatten_optimizer_state_dict`` asks for all keys.
    """
    groups = [
        {
            key: value if key == "params" or _is_plain(value) else _NOT_SAVED
            for key, value in group.items()
            if keep_keys or key == "params" or _is_plain(value)
        }
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _is_missing(value: object) -> bool:
    return isinstance(value, str) and value == _NOT_SAVED


def completed_state_dict(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Fill in the settings and counters that a checkpoint of another origin lacks.

    Raises:
        ValueError: The checkpoint has another number of groups, or other update rules.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(saved)} parameter groups, the optimizer {len(groups)}; make "
            "the optimizer with the same groups before loading"
        )
    completed = []
    for number, (ours, theirs) in enumerate(zip(groups, saved, strict=True)):
        rule = theirs.get("update_rule", ours["update_rule"])
        if rule != ours["update_rule"]:
            raise ValueError(
                f"group {number} of the checkpoint has update_rule={rule!r}, the optimizer's has "
                f"{ours['update_rule']!r}, and their states differ; make the optimizer with the "
                "checkpoint's rule"
            )
        kept = {key: value for key, value in ours.items() if key != "params"}
        from_torch_muon = "update_rule" not in theirs and "ns_coefficients" in theirs
        if from_torch_muon and rule in MOMENTUM_SUMS:
            raise ValueError(
                f"group {number} of the checkpoint is torch.optim.Muon's, whose momentum is an "
                f"average, and that of update_rule={rule!r} is a sum; use another update rule"
            )
        dropped: tuple[str, ...] = ()
        if from_torch_muon:
            dropped = ("ns_coefficients", "ns_steps", "eps")
        # Names and views are of the model, which another wrapper may have named otherwise.
        dropped = (*dropped, "matrix_view", "param_names")
        read = {k: v for k, v in theirs.items() if k not in dropped and not _is_missing(v)}
        completed.append({**kept, **read})
    state = {
        key: {"step": torch.zeros((), device="cpu"), **entry}
        if "momentum_buffer" in entry
        else entry
        for key, entry in state_dict["state"].items()
    }
    return {"state": state, "param_groups": completed}


def check_loadable(
    name: str,
    param: Tensor,
    entry: Mapping[str, Any],
    group: Mapping[str, Any],
    blocks: Sequence[Block],
) -> None:
    """Raise ValueError for a checkpoint's state that a parameter cannot take.

    Args:
        name: Of the parameter.
        param: The parameter.
        entry: Its state in the checkpoint.
        group: Its group, with the checkpoint's settings.
        blocks: Its matrices.
    """
    rule = group["update_rule"]
    needed = RULES[rule].local_states
    others = sorted(entry.keys() - {"step"})
    if others and not entry.keys() & set(needed):
        raise ValueError(
            f"{name}: the checkpoint has {others} of it, and update_rule={rule!r} keeps "
            f"{list(needed)}; make the optimizer with the checkpoint's rules"
        )
    for key in needed:
        value = entry.get(key)
        if isinstance(value, Tensor) and _where(value) != _where(param):
            raise ValueError(
                f"{name}: {key} in the checkpoint has {_described(value)}, the parameter has "
                f"{_described(param)}. torch.distributed.checkpoint loads into other shardings; so "
                "does set_optimizer_state_dict with StateDictOptions(full_state_dict=True), from "
                "whole tensors."
            )
    for key, size in block_sizes(group, blocks).items():
        value = entry.get(key)
        if isinstance(value, Tensor) and value.numel() != size:
            raise ValueError(
                f"{name}: {key} in the checkpoint has {value.numel()} elements, the parameter's "
                f"matrices need {size}; give it the matrix_view that it was saved with"
            )


def _where(tensor: Tensor) -> tuple[object, ...]:
    local = getattr(tensor, "_local_tensor", tensor)
    return tuple(tensor.shape), getattr(tensor, "placements", None), tuple(local.shape)


def _described(tensor: Tensor) -> str:
    shape, placements, local = _where(tensor)
    return f"shape {shape}, placements {placements} and {local} on this rank"


def restore_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Undo the cast of states to the parameters' dtype that ``Optimizer.load_state_dict`` makes."""
    saved_ids = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for key, param in zip(saved_ids, params, strict=True):
        dtype = torch.promote_types(param.dtype, torch.float32)
        for name, value in state_dict["state"].get(key, {}).items():
            if not isinstance(value, Tensor):
                continue
            loaded = optimizer.state[param][name]
            if name == "step":
                rule = next(
                    g for g in optimizer.param_groups if any(p is param for p in g["params"])
                )
                where = (
                    param.device if rule.get("update_rule") in AUXILIARY_RULES else loaded.device
                )
                optimizer.state[param][name] = value.to(device=where, dtype=torch.float32).clone()
            elif loaded.dtype != dtype or value.dtype != param.dtype:
                optimizer.state[param][name] = value.to(device=param.device, dtype=dtype)
