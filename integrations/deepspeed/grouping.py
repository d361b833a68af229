"""The optimizer's groups: matrices and auxiliary parameters of a model, sorted by module and name.

Hyper-parameters of a group are FlashMuon's. Its ``"lr"`` is what schedulers see and change, the
same for all groups of a config, because DeepSpeed's schedulers give all groups one learning rate;
``"lr_ratio"`` times it is the group's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from flashns_dist.optim import FlashMuon, parameter_groups
from flashns_dist.optim.rules import MATRIX_RULES, RULES
from flashns_dist.optim.settings import RULE_SETTINGS, check_parameter

from .settings import Settings, check_states

_HYPERPARAMETERS = ("lr", "weight_decay", "betas", "eps", "momentum")


def groups_from_config(
    model: nn.Module, model_parameters: Iterable[Any], settings: Settings
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Groups for the parameters that the user passed to ``deepspeed.initialize``.

    Args:
        model: Names and sorts the parameters.
        model_parameters: Parameters, (name, parameter) pairs or groups; a group's hyper-parameters
            hold for its matrices and its auxiliary parameters, except that its ``lr`` is that of
            its matrices (the auxiliary ones keep their ratio).
        settings: From the config. What its overrides freeze no longer requires a gradient.

    Returns:
        One group per given group and update rule, matrices first, and the names by ``id``.

    Raises:
        ValueError: A parameter does not belong to the model, an override makes a matrix of what is
            none, or a group has a setting that only the config may have.
    """
    sorted_groups = parameter_groups(
        model, overrides=settings.overrides, matrix_views=settings.matrix_views
    )
    decisions = sorted_groups.decisions
    views = {d.name: d.view for d in decisions if d.view is not None}
    matrix_rule = settings.arguments.get("update_rule", "muon")
    rules = {
        id(d.param): matrix_rule if d.update_rule == "muon" else d.update_rule for d in decisions
    }
    names = {id(d.param): d.name for d in decisions}
    for decision in decisions:
        if decision.update_rule == "frozen":  # else stage 0 alone clips by its gradient too
            decision.param.requires_grad_(False)
    by_rule: dict[str, list[dict[str, Any]]] = {rule: [] for rule in RULES}
    for given in _as_groups(model_parameters):
        chosen: dict[str, list[Tensor]] = {rule: [] for rule in RULES}
        for param in given["params"]:
            if param.requires_grad:
                _check_known(param, rules)
                chosen[rules[id(param)]].append(param)
        extra = {key: value for key, value in given.items() if key != "params"}
        view = extra.pop("matrix_view", None) or views
        for rule, groups in by_rule.items():
            if chosen[rule]:
                complete = _completed(rule, extra, settings)
                if rule in MATRIX_RULES and view:
                    complete["matrix_view"] = view
                # What is rounded is DeepSpeed's copy, in another dtype.
                checked = {**complete, "rounding": "nearest"}
                for param in chosen[rule]:
                    check_parameter(names[id(param)], param, checked)
                same = next((g for g in groups if _settings(g) == complete), None)
                if same is None:
                    groups.append({"params": chosen[rule], **complete})
                else:  # matrices in one group are exchanged together
                    same["params"] += chosen[rule]
    return [group for rule in RULES for group in by_rule[rule]], names


def groups_from_optimizer(
    model: nn.Module, optimizer: FlashMuon
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The groups of a FlashMuon that the user made, the very same dicts, and names by ``id``.

    Raises:
        ValueError: The optimizer has state already, holds parameters of another model, or has a
            learning rate of 0 and no scheduler.
    """
    names = {id(param): name for name, param in model.named_parameters()}
    for state in optimizer.state.values():
        if float(state["step"]) > 0:
            raise ValueError(
                "the FlashMuon passed to deepspeed.initialize has made steps; pass a new one and "
                "load its state with engine.load_checkpoint"
            )
    scheduled = any("initial_lr" in group for group in optimizer.param_groups)
    base = next(
        (g["lr"] for g in optimizer.param_groups if g["update_rule"] in MATRIX_RULES),
        optimizer.param_groups[0]["lr"],
    )
    if not scheduled:
        _check_peak("FlashMuon's lr", base)
    for group in optimizer.param_groups:
        check_states(group)
        group.pop("param_names", None)
        for param in group["params"]:
            _check_known(param, names)
        group["params"] = [param for param in group["params"] if param.requires_grad]
        # A scheduler that the user has attached knows each group's own lr; others may not.
        group["lr_ratio"] = 1.0 if scheduled else group["lr"] / base
        if not scheduled:
            group["lr"] = base
    return [group for group in optimizer.param_groups if group["params"]], names


def _completed(rule: str, extra: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """All hyper-parameters of one group, checked by FlashMuon itself."""
    foreign = RULE_SETTINGS - set(RULES[rule].settings)
    arguments = {key: value for key, value in settings.arguments.items() if key not in foreign}
    given = {key: value for key, value in extra.items() if key in _HYPERPARAMETERS}
    others = {key: value for key, value in extra.items() if key not in _HYPERPARAMETERS}
    lr = given.pop("lr", None)
    template = FlashMuon([{"params": [], **given}], **{**arguments, "update_rule": rule})
    group = dict(template.param_groups[0])
    group.pop("params")
    group.pop("param_names", None)
    for key in sorted(others.keys() & group.keys()):
        raise ValueError(
            f"a group of model_parameters has {key}={others[key]!r}, which FlashMuon reads from "
            'optimizer.params alone (an update rule from its "overrides"). Write it there, or pass '
            "FlashMuon(groups) to deepspeed.initialize as optimizer."
        )
    base = template.defaults["lr"]
    _check_peak("optimizer.params.lr", base)
    group["lr_ratio"] = group["lr"] / base
    group["lr"] = base if lr is None else float(lr)
    check_states(group)
    return {**others, **group}


def _check_peak(name: str, lr: float) -> None:
    if not lr:
        raise ValueError(
            f"{name}=0: FlashMuon keeps aux_lr as a ratio to lr, so that schedulers "
            "that give all groups one learning rate are right. Write the peak learning rate; the "
            "scheduler sets the rest."
        )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _as_groups(model_parameters: Iterable[Any]) -> list[dict[str, Any]]:
    entries = list(model_parameters)
    if entries and isinstance(entries[0], dict):
        return [{**entry, "params": _tensors(entry["params"])} for entry in entries]
    return [{"params": _tensors(entries)}]


def _tensors(entries: object) -> list[Tensor]:
    if isinstance(entries, Tensor):
        return [entries]
    assert isinstance(entries, Iterable)
    return [entry[1] if isinstance(entry, Sequence) else entry for entry in entries]


def _check_known(param: Tensor, known: dict[int, str]) -> None:
    if id(param) not in known:
        shape = tuple(getattr(param, "ds_shape", param.shape))
        raise ValueError(
            f"a parameter of shape {shape} is not one of the model's named parameters, so "
            "FlashMuon cannot tell whether it is a matrix. Pass the model that owns it to "
            "deepspeed.initialize."
        )
