"""State dicts: plain values out, any precision and any origin in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from flashns_dist.optim.rules import AUXILIARY_RULES

_PLAIN = (bool, int, float, str, type(None), Tensor)


def plain_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Leave out group settings that ``torch.load(weights_only=True)`` would refuse."""
    groups = [
        {key: value for key, value in group.items() if key == "params" or _is_plain(value)}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


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
        kept = {key: value for key, value in ours.items() if key not in ("params", "param_names")}
        from_torch_muon = "update_rule" not in theirs and "ns_coefficients" in theirs
        dropped = ("ns_coefficients", "ns_steps", "eps") if from_torch_muon else ()
        completed.append({**kept, **{k: v for k, v in theirs.items() if k not in dropped}})
    state = {
        key: {"step": torch.zeros(()), **entry} if "momentum_buffer" in entry else entry
        for key, entry in state_dict["state"].items()
    }
    return {"state": state, "param_groups": completed}


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
