"""``--optimizer flashmuon`` and ``--flashmuon-...`` in megatron.training's command line."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from flashns_dist.optim.rules import RULES

from .internals import attribute, rebind
from .settings import Settings
from .support import check_arguments

NAME = "flashmuon"


def install_arguments(remember: Callable[[Settings], None]) -> None:
    """Wrap the parser and the validation of megatron.training, if it is there.

    Args:
        remember: Called with the settings once the command line has been parsed.

    Raises:
        RuntimeError: This version lacks a function that is wrapped.
    """
    try:
        training_arguments = import_module("megatron.training.arguments")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        return  # a megatron-core without megatron.training
    add = attribute(training_arguments, "add_megatron_arguments")
    validate = attribute(training_arguments, "validate_args")

    @functools.wraps(add)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_arguments(add(parser))

    @functools.wraps(validate)
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        if args.optimizer != NAME:
            return validate(args, *rest, **kwargs)
        check_arguments(args)
        remember(settings_from(args))
        # Megatron refuses or changes the distributed optimizer for names other than Adam's.
        args.optimizer = "adam"
        try:
            result = validate(args, *rest, **kwargs)
        finally:
            args.optimizer = NAME
        if result is not None:
            result.optimizer = NAME
        return result

    rebind(add, add_megatron_arguments)
    rebind(validate, validate_args)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Allow the name, and add FlashMuon's flags."""
    for action in parser._actions:
        if action.dest == "optimizer" and action.choices is not None:
            action.choices = [*action.choices, NAME]
    group = parser.add_argument_group("FlashMuon", "with --optimizer flashmuon")
    defaults = Settings()

    def option(name: str, help: str, **kwargs: Any) -> None:
        key = name.replace("-", "_")
        default = getattr(defaults, key)
        group.add_argument(f"--flashmuon-{name}", default=default, help=help, **kwargs)

    option("method", "how to orthogonalize: auto, standard, gram, unbiased, fast or aol")
    option("ns-coefficients", "a preset's name; default: the method's own")
    option("ns-dtype", "of the iteration", choices=["fp32", "bf16", "fp16"])
    option("backend", "auto, torch, triton or quack")
    option(
        "adjust-lr-fn",
        "original, match_rms_adamw, spectral or none; default: --muon-scale-mode times "
        "--muon-extra-scale-factor",
    )
    option("update-rule", "of the matrices: muon, adamuon or dion2")
    group.add_argument(
        "--flashmuon-rule-settings",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings that only some update rules have, as fraction=0.5 of dion2",
    )
    option("aux-update-rule", "of auxiliary parameters: adamw or lion")
    option("aux-lr", "peak learning rate of auxiliary parameters; default: --lr", type=float)
    option("nonfinite", "a NaN or infinity in a gradient: raise or skip the step")
    option("wire-dtype", "in which matrices travel", choices=["fp32", "bf16"])
    option(
        "memory-bytes",
        "most bytes that a step takes on a rank; default: 1 GiB where that can be",
        type=int,
    )
    option(
        "bucket-bytes",
        "most bytes buffered for one direction of one bucket; default: the planner's choice",
        type=int,
    )
    option("replicas", "what replicas of a matrix do: auto, share or repeat")
    group.add_argument(
        "--flashmuon-cautious",
        action="store_true",
        help="decay a weight only where the update shrinks it too",
    )
    group.add_argument(
        "--no-flashmuon-split-qkv",
        action="store_false",
        dest="flashmuon_split_qkv",
        help="orthogonalize a fused QKV weight as one matrix",
    )
    group.add_argument(
        "--no-flashmuon-split-gate-up",
        action="store_false",
        dest="flashmuon_split_gate_up",
        help="orthogonalize a gated linear_fc1 as one matrix",
    )
    group.add_argument(
        "--flashmuon-overrides",
        nargs="*",
        default=[],
        metavar="PATTERN=RULE",
        help="muon, adamw or another update rule for parameters whose name matches",
    )
    return parser


def settings_from(args: Any) -> Settings:
    """The settings that parsed arguments hold.

    Raises:
        ValueError: An override is not of the form PATTERN=RULE, or a rule's setting not KEY=VALUE.
    """
    values = {
        key.removeprefix("flashmuon_"): value
        for key, value in vars(args).items()
        if key.startswith("flashmuon_")
    }
    overrides = {}
    for entry in values.pop("overrides", None) or []:
        pattern, separator, rule = entry.rpartition("=")
        if not separator:
            raise ValueError(f"--flashmuon-overrides {entry}: write PATTERN=RULE")
        overrides[pattern] = rule
    entries = values.pop("rule_settings", None) or []
    rule_settings = dict(_rule_setting(entry) for entry in entries)
    return Settings(**values, overrides=overrides, rule_settings=rule_settings)


def _rule_setting(entry: str) -> tuple[str, Any]:
    """``KEY=VALUE``, with the type of the setting's default."""
    key, separator, value = entry.partition("=")
    defaults = {key: default for rule in RULES.values() for key, default in rule.settings.items()}
    if not separator or key not in defaults:
        raise ValueError(
            f"--flashmuon-rule-settings {entry}: write KEY=VALUE with one of {sorted(defaults)}"
        )
    if isinstance(defaults[key], str):
        return key, value
    expected = "true or false" if isinstance(defaults[key], bool) else "a number"
    try:
        if isinstance(defaults[key], bool):
            return key, {"true": True, "false": False}[value.lower()]
        return key, float(value)
    except (KeyError, ValueError):
        raise ValueError(f"--flashmuon-rule-settings {entry}: write {expected}") from None
