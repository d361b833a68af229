"""The ``params`` of the config's optimizer section, as FlashMuon's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

from flashns_dist.layout import MatrixView, leading_blocks, named_view
from flashns_dist.optim import ExchangeOptions, FlashMuon
from flashns_dist.optim.options import WIRE_DTYPES
from flashns_dist.optim.rules import AUXILIARY_RULES, RULES, MatrixRule
from flashns_dist.optim.settings import RULE_SETTINGS, check_rule

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}
_OF_REFUSED_RULES = {"compressed_gradients", "normuon", "rank_fraction"}
_ARGUMENTS = (
    "lr",
    "weight_decay",
    "momentum",
    "nesterov",
    "adjust_lr_fn",
    "method",
    "ns_coefficients",
    "ns_steps",
    "ns_dtype",
    "backend",
    "aux_lr",
    "betas",
    "eps",
    "aux_weight_decay",
    "cautious",
    "rounding",
    "nonfinite",
    "update_rule",
    *sorted(RULE_SETTINGS - _OF_REFUSED_RULES),
)
_EXCHANGE = ("wire_dtype", "memory_bytes", "bucket_bytes", "replicas")

PARAMS = (*_ARGUMENTS, *_EXCHANGE, "overrides", "matrix_views")
"""The keys that ``"params"`` may hold."""

# The names of DeepSpeed's Muon and of other implementations, for the error message only.
_OTHER_NAMES = {
    "muon_lr": "lr",
    "adam_lr": "aux_lr",
    "ns_method": "method",
    "beta": "momentum",
    "beta1": "betas",
    "adam_betas": "betas",
    "adam_eps": "eps",
    "adam_weight_decay": "aux_weight_decay",
    "max_grad_norm": "gradient_clipping at the top level of the config",
    "patterns": "overrides",
    "torch_adam": "nothing: the auxiliary AdamW is FlashMuon's own",
    "adam_w_mode": "nothing: the auxiliary parameters get AdamW",
    "rank": "rank_fraction",
}


@dataclass(frozen=True)
class Settings:
    """What ``params`` says, checked.

    Attributes:
        arguments: FlashMuon's keyword arguments, ``exchange`` included.
        overrides: From parameter name patterns to update rules, for ``parameter_groups``.
        matrix_views: From such patterns to views, likewise.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    matrix_views: dict[str, MatrixView | None] = field(default_factory=dict)


def read_params(params: Mapping[str, Any] | None) -> Settings:
    """Check the config's ``params`` and turn their strings into values.

    Raises:
        ValueError: A key is unknown or a value is unsuitable; the message names it.
    """
    given = dict(params or {})
    for key, value in given.items():
        _check_key(key, value)
    exchange = {key: given.pop(key) for key in _EXCHANGE if key in given}
    if "wire_dtype" in exchange:
        exchange["wire_dtype"] = _dtype("wire_dtype", exchange["wire_dtype"])
    overrides = given.pop("overrides", None) or {}
    if not isinstance(overrides, Mapping):
        raise ValueError(
            f"optimizer.params.overrides={overrides!r} must map parameter name patterns to "
            'update rules, or "frozen"'
        )
    for pattern, rule in overrides.items():
        if not isinstance(rule, str):
            raise ValueError(
                f"optimizer.params.overrides[{pattern!r}]={rule!r} must be the name of an update "
                'rule, or "frozen"'
            )
    views = _views(given.pop("matrix_views", None) or {})
    if given.get("ns_dtype") is not None:
        given["ns_dtype"] = _dtype("ns_dtype", given["ns_dtype"])
    if isinstance(given.get("betas"), list):
        given["betas"] = tuple(given["betas"])
    for key in ("lr", "weight_decay", "momentum", "eps", "aux_lr", "aux_weight_decay"):
        if key in given:
            given[key] = _number(key, given[key])
    given["exchange"] = ExchangeOptions(**exchange)
    _check_matrix_rule(given.get("update_rule", "muon"))
    rules = {given.get("update_rule", "muon"), *overrides.values()} & set(RULES)
    FlashMuon([{"params": [], "update_rule": rule} for rule in sorted(rules)], **given)
    return Settings(given, dict(overrides), views)


def _check_matrix_rule(update_rule: str) -> None:
    check_rule(update_rule)
    if update_rule in AUXILIARY_RULES:
        raise ValueError(
            f"optimizer.params.update_rule={update_rule!r} is for auxiliary parameters: name the "
            'matrices\' rule there, and use overrides={"*": "adamw"} for no matrices'
        )


def check_states(group: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for an update rule whose state DeepSpeed would lose."""
    block = leading_blocks((1, 1))[0]
    rule = RULES[group["update_rule"]]
    states = rule.block_states(group, block) if isinstance(rule, MatrixRule) else ()
    for name in states:
        raise NotImplementedError(
            f"FlashMuon does not support update_rule={rule.name!r} under DeepSpeed: its state "
            f"{name!r} is not cut as the parameters are, and DeepSpeed's universal checkpoints "
            'would lose it. Use "muon", "adamuon", or "dion2" without normuon.'
        )


def _views(given: object) -> dict[str, MatrixView | None]:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"optimizer.params.matrix_views={given!r} must map parameter name patterns to views, "
            'as {"*.qkv.weight": {"QKV": {"num_heads": 32}}}'
        )
    views = {}
    for pattern, view in given.items():
        try:
            views[pattern] = view if view is None or callable(view) else named_view(view)
        except ValueError as error:
            raise ValueError(f"optimizer.params.matrix_views.{pattern}: {error}") from None
    return views


def _check_key(key: str, value: object) -> None:
    if key not in PARAMS:
        meant = _OTHER_NAMES.get(key) or next(iter(get_close_matches(key, PARAMS, 1)), None)
        hint = f" Did you mean {meant}?" if meant else ""
        raise ValueError(
            f"optimizer.params.{key} is unknown to FlashMuon.{hint} Known: {', '.join(PARAMS)}."
        )
    if value == "auto" and key not in ("method", "backend", "replicas"):  # theirs
        raise ValueError(
            f'optimizer.params.{key}="auto" has not been filled in: Hugging Face does so for lr, '
            "betas, eps and weight_decay only. Write the value, or leave the key out for the "
            "default."
        )


def _number(key: str, value: object) -> float:
    # JSON writers and YAML turn 1e-3 into a string.
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"optimizer.params.{key}={value!r} must be a number") from None


def _dtype(key: str, value: object) -> torch.dtype:
    found = value if isinstance(value, torch.dtype) else _DTYPES.get(str(value).lower())
    if found is None:
        allowed = WIRE_DTYPES if key == "wire_dtype" else _DTYPES.values()
        names = sorted(name for name, dtype in _DTYPES.items() if dtype in allowed)
        raise ValueError(f"optimizer.params.{key}={value!r}: use one of {names}")
    return found
