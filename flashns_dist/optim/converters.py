"""The state of other optimizers, read into FlashMuon."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flashns_dist.layout import Box
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.flash_muon import FlashMuon
from flashns_dist.optim.rules import MOMENTUM_SUMS, RULES

Source: TypeAlias = "Mapping[str, Any] | tuple[Mapping[str, Any], Sequence[str]]"

_COUNTERS = ("step", "step_dev")


def load_foreign_state(optimizer: FlashMuon, *sources: Source) -> None:
    """Read state dicts of ``torch.optim.Muon``, ``AdamW``, or microsoft/dion's optimizers.

    ``torch.optim.Muon``'s momentum is an exponential average, as here. dion's Muon and NorMuon keep
    the sum ``M <- mu M + g``, larger by ``1 / (1 - mu)``: it is multiplied by ``1 - mu`` with the
    source group's ``mu``. Dion2's stays a sum. First and second moments of AdamW are the same
    everywhere. Settings (learning rates, decays) are not read: they are this optimizer's.

    Parameters are found by name. Values are whole tensors, of which every rank takes what it
    stores, or DTensors with the parameter's own placements. Call it on every rank. Collectives: as
    ``bind_parameter``, at most.

    Args:
        optimizer: Made with named parameters (as ``parameter_groups`` gives), of any sharding.
            Changed in place, once everything has been checked.
        sources: State dicts, each holding some of the parameters: with ``param_names``, or keyed by
            names (``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``), or paired
            with the names of its parameters in order.

    Raises:
        ValueError: A parameter is in no source, its state is of an unknown kind, or does not fit
            the parameter's shape or update rule; nothing has changed.
    """
    found: dict[str, dict[str, Any]] = {}
    for source in sources:
        found.update(_by_name(source))
    optimizer._bind()
    missing = [b.name for b in optimizer._bound if b.name not in found]
    if missing:
        raise ValueError(
            f"{', '.join(missing[:3])} and {len(missing)} in all are in no source, which hold "
            f"{list(found)[:3]} ...; give all state dicts, and both sides the same names"
        )
    changes: list[tuple[Tensor, Tensor]] = []
    left: set[str] = set()
    for bound in optimizer._bound:
        group = optimizer.param_groups[bound.group_index]
        state, values = optimizer.state[bound.storage], found[bound.name]
        converted = _converted(bound.name, values, group)
        left |= {f"{group['update_rule']}'s {key}" for key in state.keys() - converted.keys()}
        for key, value in converted.items():
            if key == "step":
                changes.append((state[key], value))
            else:
                changes += _copies(bound, key, state[key], value)
    for target, value in changes:
        target.copy_(value)
    left -= {f"{rule}'s step" for rule in RULES}
    if left:
        warnings.warn(
            f"the sources hold nothing for {', '.join(sorted(left))}: kept as it was", stacklevel=2
        )


def _by_name(source: Source) -> dict[str, dict[str, Any]]:
    """Each parameter's state entries, with its group's settings under ``"group"``."""
    state_dict, names = source if isinstance(source, tuple) else (source, None)
    groups, state = state_dict["param_groups"], state_dict["state"]
    keys = [key for group in groups for key in group["params"]]
    if names is None:
        if all(isinstance(key, str) for key in keys):
            names = keys
        elif all("param_names" in group for group in groups):
            names = [name for group in groups for name in group["param_names"]]
        else:
            raise ValueError(
                "a source names no parameters; pass (state_dict, names), with the names in the "
                "order of its parameters"
            )
    if len(names) != len(keys):
        raise ValueError(f"a source has {len(keys)} parameters, but {len(names)} names were given")
    of_key = {key: group for group in groups for key in group["params"]}
    return {
        name: {**state.get(key, {}), "group": of_key[key]}
        for name, key in zip(names, keys, strict=True)
    }


def _converted(name: str, values: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state by our names."""
    theirs, rule = values["group"], group["update_rule"]
    algorithm = theirs.get("algorithm")
    if "exp_avg_sq" in values:
        kind, moments = "adamw", {key: values[key] for key in ("exp_avg", "exp_avg_sq")}
    elif algorithm == "adamw" and "variance" in values:
        kind = "adamw"
        moments = {"exp_avg": values["momentum"], "exp_avg_sq": values["variance"]}
    elif algorithm == "lion":
        kind, moments = "lion", {"exp_avg": values["momentum"]}
    elif algorithm in ("muon", "normuon", "dion2", "nordion2", "dion3") and "momentum" in values:
        kind = "a matrix"
        average = rule not in MOMENTUM_SUMS
        if average != (algorithm in ("muon", "normuon")):
            raise ValueError(
                f"{name}: its state is of dion's {algorithm!r}, which cannot become that of "
                f"{rule!r}; use the same update rule"
            )
        scale = 1 - float(theirs["mu"]) if average else 1.0
        momentum = values["momentum"]
        momentum = momentum.to(torch.promote_types(momentum.dtype, torch.float32))
        moments = {"momentum_buffer": momentum * scale}
    elif "momentum_buffer" in values and "ns_coefficients" in theirs and rule not in MOMENTUM_SUMS:
        kind, moments = "a matrix", {"momentum_buffer": values["momentum_buffer"]}
    else:
        entries = sorted(key for key in values if key != "group")
        raise ValueError(
            f"{name}: cannot read a state with {entries or 'no entries'} into {rule!r}; known are "
            "torch.optim.Muon's and AdamW's, and dion's Muon, NorMuon, Dion2, AdamW and Lion"
        )
    if set(moments) - {"momentum_buffer"} != set(RULES[rule].local_states) - {"momentum_buffer"}:
        raise ValueError(
            f"{name}: its state is of {kind}, but its group has update_rule={rule!r}; sort the "
            "parameters alike, with overrides of parameter_groups"
        )
    steps = [values[key] for key in _COUNTERS if key in values] + [theirs.get("step")]
    if steps[0] is not None:
        moments["step"] = torch.as_tensor(float(steps[0]), device="cpu")
    return moments


def _copies(
    bound: BoundParameter, key: str, state: Tensor, value: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(view of this rank's state, what belongs there) pairs."""
    shape = bound.layout.shape
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{bound.name}: {key} has shape {tuple(value.shape)}, the parameter {shape}"
        )
    placements = getattr(value, "placements", None)
    local = bound.local(state)
    if placements is not None:
        if placements != getattr(state, "placements", None):
            raise ValueError(
                f"{bound.name}: {key} has placements {placements}, which are not the parameter's; "
                "pass whole tensors (StateDictOptions(full_state_dict=True))"
            )
        return [(local, bound.local(value))]
    whole = Box((0,) * len(shape), shape)
    return [
        (fragment.view(local), value[fragment.box.slices_in(whole)])
        for fragment in bound.layout.fragments[bound.group_rank]
    ]


__all__ = ["load_foreign_state"]
