"""Which of Megatron's parameters are matrices, and what their groups are told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from flashns_dist.optim import parameter_groups
from flashns_dist.optim.rules import MATRIX_RULES

from .matrices import is_convolution, is_packed_experts
from .settings import Settings


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and the precision wrapper."""
    while isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def parameter_names(chunks: Sequence[nn.Module]) -> dict[Tensor, str]:
    """Names as in the model, preceded by the chunk's number where there are many."""
    return {
        param: f"chunk{index}.{name}" if len(chunks) > 1 else name
        for index, chunk in enumerate(chunks)
        for name, param in unwrapped(chunk).named_parameters()
    }


def owners(chunks: Sequence[nn.Module]) -> dict[Tensor, list[nn.Module]]:
    """For each parameter, the module that holds it, the one that holds that, and so on."""
    found: dict[Tensor, list[nn.Module]] = {}
    for chunk in chunks:
        model = unwrapped(chunk)
        modules = dict(model.named_modules())
        for name, param in model.named_parameters():
            parts = name.split(".")[:-1]
            paths = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
            found[param] = [modules[path] for path in paths]
    return found


def group_settings(
    chunks: Sequence[nn.Module], config: Any, settings: Settings
) -> dict[Tensor, dict[str, Any]]:
    """What the group of each trainable parameter is told.

    Matrices are what ``parameter_groups`` takes for one, except where ``use_muon`` or
    ``is_embedding_or_output_parameter`` on a parameter, or an override, say otherwise.

    Raises:
        ValueError: An override matches no parameter on any rank, or what is no matrix, stack of
            matrices or convolution is to be one.
    """
    names, owned = parameter_names(chunks), owners(chunks)
    rules: dict[Tensor, str] = {}
    for chunk in chunks:
        for decision in parameter_groups(unwrapped(chunk)).decisions:
            rules[decision.param] = decision.update_rule
    for param in rules:
        if getattr(param, "is_embedding_or_output_parameter", False):
            rules[param] = "adamw"
        wanted = getattr(param, "use_muon", None)
        if wanted is not None and param.ndim >= 2:
            rules[param] = "muon" if wanted else "adamw"
    used = _apply_overrides(rules, names, settings.overrides)
    _check_everywhere(_no_matrix(rules, names, owned, settings), used, settings.overrides)
    result = {}
    for param, name in names.items():
        if param.requires_grad:
            told: dict[str, Any] = {"update_rule": settings.rule(rules[param])}
            is_matrix = told["update_rule"] in MATRIX_RULES
            if is_matrix and is_packed_experts(name, owned[param]):
                told["is_transposed"] = True
            if not is_matrix and settings.aux_lr is not None:
                told.update(_own_learning_rate(param, config, settings.aux_lr))
            result[param] = told
    return result


def _own_learning_rate(param: Tensor, config: Any, aux_lr: float) -> dict[str, float]:
    """Peak and lowest learning rate; a decoupled one of Megatron's goes before ours."""
    decoupled = getattr(config, "decoupled_lr", None) is not None
    if decoupled and getattr(param, "is_embedding_or_output_parameter", False):
        return {}
    lowest = (config.min_lr or 0.0) * aux_lr / config.lr if config.lr else 0.0
    return {"max_lr": aux_lr, "min_lr": lowest}


def _apply_overrides(
    rules: dict[Tensor, str], names: Mapping[Tensor, str], overrides: Mapping[str, str]
) -> set[str]:
    """Change the rules; the patterns that a parameter of this rank matches."""
    used = set()
    for param in rules:
        pattern = _pattern(names[param], overrides)
        if pattern is not None:
            used.add(pattern)
            rules[param] = overrides[pattern]
    return used


def _pattern(name: str, overrides: Mapping[str, str]) -> str | None:
    return next((pattern for pattern in overrides if fnmatchcase(name, pattern)), None)


def _no_matrix(
    rules: Mapping[Tensor, str],
    names: Mapping[Tensor, str],
    owned: Mapping[Tensor, list[nn.Module]],
    settings: Settings,
) -> str:
    """What is wrong with the first parameter that has a matrices' rule and no matrices."""
    for param, rule in rules.items():
        is_one = 2 <= param.ndim <= 3 or (param.ndim > 3 and is_convolution(owned[param]))
        if rule in MATRIX_RULES and not is_one:
            pattern = _pattern(names[param], settings.overrides)
            asked = "use_muon=True"
            advice = "Leave it to AdamW: use_muon=False."
            if pattern is not None:
                asked = f"--flashmuon-overrides {pattern}={rule}"
                advice = "Write a narrower pattern."
            return (
                f"{asked}: {names[param]} of shape {tuple(param.shape)} is not a matrix, a stack "
                f"of matrices or a convolution's weight. {advice}"
            )
    return ""


def _check_everywhere(problem: str, used: set[str], overrides: Mapping[str, str]) -> None:
    """Raise what one rank found wrong on all of them.

    Collectives: an ``all_gather_object`` on the world.
    """
    everywhere: list[tuple[set[str], str]] = [(used, problem)] * dist.get_world_size()
    dist.all_gather_object(everywhere, (used, problem))
    for _, found in everywhere:
        if found:  # on all ranks, of which not all have that parameter
            raise ValueError(found)
    unused = [pattern for pattern in overrides if not any(pattern in u for u, _ in everywhere)]
    if unused:
        raise ValueError(
            f"--flashmuon-overrides {unused} match no trainable parameter on any rank. Names are "
            "as in the model, for example decoder.layers.0.mlp.linear_fc1.weight."
        )


def rules_by_kin(
    names: Mapping[Tensor, str], told: Mapping[Tensor, Mapping[str, Any]]
) -> dict[Tensor, frozenset[str]]:
    """For each parameter, the update rules of its kind of parameter in all layers.

    Megatron's checkpoints stack the layers: a state that one of them has, all must have.

    Collectives: an ``all_gather_object`` on the world.

    Args:
        names: Of all parameters of this rank.
        told: As ``group_settings`` gives.
    """
    kinds = {
        param: re.sub(r"(^chunk|\.|weight)\d+(?=\.|$)", r"\1*", names[param]) for param in told
    }
    here: dict[str, set[str]] = {}
    for param, settings in told.items():
        here.setdefault(kinds[param], set()).add(settings["update_rule"])
    everywhere: list[dict[str, set[str]]] = [here] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return {
        param: frozenset().union(*(found.get(kind, set()) for found in everywhere))
        for param, kind in kinds.items()
    }
