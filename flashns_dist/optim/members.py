"""The parameters of an optimizer's groups: their names, where they lie, and their state."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from flashns_dist.layout import Block
from flashns_dist.optim.binding import (
    BoundParameter,
    bind_parameter,
    full_shape,
    parameter_blocks,
)
from flashns_dist.optim.settings import init_state, state_names

Groups: TypeAlias = "Sequence[Mapping[str, Any]]"
State: TypeAlias = "MutableMapping[Tensor, dict[str, Any]]"


def named_members(groups: Groups, index: int) -> list[tuple[str, Tensor]]:
    """The parameters of one group with their names, or with their positions if they have none.

    Raises:
        ValueError: There are more parameters than names, or fewer.
    """
    group = groups[index]
    names = group.get("param_names") or [
        f"parameter {i} of group {index}" for i in range(len(group["params"]))
    ]
    if len(names) != len(group["params"]):
        raise ValueError(
            f"group {index} has {len(group['params'])} parameters and {len(names)} "
            "param_names; change both lists, or neither"
        )
    return list(zip(names, group["params"], strict=True))


def bound_members(groups: Groups, replica_group: dist.ProcessGroup | None) -> list[BoundParameter]:
    """Where the parameters of all groups lie, in order.

    A matrix view that was set since they were added and does not fit is every rank's error later.
    Collectives: as ``bind_parameter``.
    """
    found = []
    for index, group in enumerate(groups):
        for name, param in named_members(groups, index):
            blocks: tuple[Block, ...] = ()
            problem = None
            try:
                blocks = parameter_blocks(name, param.shape, group)
            except ValueError as error:
                problem = str(error)
            bound = bind_parameter(name, param, index, replica_group, blocks)
            found.append(bound if problem is None else replace(bound, problem=problem))
    return found


def make_state(state: State, named: Sequence[tuple[str, Tensor]], group: Mapping[str, Any]) -> None:
    """Initial states of some parameters of a group."""
    for name, param in named:
        blocks = parameter_blocks(name, full_shape(param), group)
        state[param].update(init_state(param, group, blocks))


def renew_state(state: State, groups: Groups) -> None:
    """State of parameters that came, or moved, after the optimizer was made.

    Unused state of parameters that left the groups is dropped.

    Raises:
        ValueError: A parameter is on the meta device.
    """
    for index, group in enumerate(groups):
        named = named_members(groups, index)
        for name, param in named:
            if param.is_meta:
                raise ValueError(
                    f"{name} is on the meta device; make the optimizer after to_empty(), which "
                    "makes new parameters"
                )
        new = [(name, param) for name, param in named if _is_elsewhere(state.get(param), param)]
        for _, param in new:
            state.pop(param, None)
        make_state(state, new, group)
    present = {param for group in groups for param in group["params"]}
    for param in [p for p, own in state.items() if p not in present and not _has_stepped(own)]:
        del state[param]


def complete_state(state: State, groups: Groups) -> None:
    """Initial values of states that a checkpoint lacks: torch.optim.Muon has a momentum."""
    for index, group in enumerate(groups):
        for name, param in named_members(groups, index):
            blocks = parameter_blocks(name, param.shape, group)
            own = state[param]
            if not set(own) >= state_names(group, blocks):
                own.update({**init_state(param, group, blocks), **own})


def _is_elsewhere(state: Mapping[str, Any] | None, param: Tensor) -> bool:
    """Whether a parameter has no state, or an unused one of another device or sharding."""
    if not state:
        return True
    kept = [v for k, v in state.items() if k != "step" and isinstance(v, Tensor)]
    moved = any(value.device != param.device for value in kept)
    return moved and not _has_stepped(state)


def _has_stepped(state: Mapping[str, Any]) -> bool:
    """Whether a parameter with this state has been updated."""
    step = state.get("step", 0)
    return not (isinstance(step, Tensor) and step.is_meta) and float(step) > 0
