"""FlashMuon's arguments, from Megatron's config and FlashMuon's own flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import sqrt
from typing import Any

import torch

from flashns_dist.layout import leading_blocks
from flashns_dist.optim import ExchangeOptions, FlashMuon, learning_rate_scale
from flashns_dist.optim.options import WIRE_DTYPES
from flashns_dist.optim.rules import AUXILIARY_RULES, MATRIX_RULES, RULES
from flashns_dist.optim.settings import RULE_SETTINGS, check_rule, state_names

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The rows of --muon-coefficient-type: Jordan et al. 2024, and You 2025.
_COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


@dataclass(frozen=True)
class Settings:
    """What Megatron's config does not know; each is a flag ``--flashmuon-...``.

    Attributes:
        method, ns_coefficients, backend, cautious, nonfinite: As FlashMuon's.
        ns_dtype: Of the iteration: ``"fp32"``, ``"bf16"``, ``"fp16"`` or None.
        adjust_lr_fn: As FlashMuon's; None for ``--muon-scale-mode`` times
            ``--muon-extra-scale-factor``.
        update_rule: Of the matrices: ``"muon"``, ``"adamuon"`` or ``"dion2"``.
        rule_settings: Settings that only some rules have, as ``fraction``, for the rules that have
            them.
        aux_update_rule: Of auxiliary parameters: ``"adamw"`` or ``"lion"``.
        aux_lr: Peak learning rate of auxiliary parameters; None for that of the matrices.
        split_qkv: Orthogonalize query, key and value of a fused projection by themselves.
        split_gate_up: Likewise gate and up projection of a gated ``linear_fc1``.
        overrides: From name patterns to ``"muon"`` (a matrix), ``"adamw"`` (auxiliary) or another
            update rule.
        wire_dtype, memory_bytes, bucket_bytes, replicas: As ExchangeOptions'; the dtype by name:
            ``"bf16"`` or ``"fp32"``.
    """

    method: str = "auto"
    ns_coefficients: str | None = None
    ns_dtype: str | None = None
    backend: str = "auto"
    adjust_lr_fn: str | None = None
    update_rule: str = "muon"
    rule_settings: Mapping[str, Any] = field(default_factory=dict)
    aux_update_rule: str = "adamw"
    aux_lr: float | None = None
    cautious: bool = False
    nonfinite: str = "raise"
    split_qkv: bool = True
    split_gate_up: bool = True
    overrides: Mapping[str, str] = field(default_factory=dict)
    wire_dtype: str = "bf16"
    memory_bytes: int | None = None
    bucket_bytes: int | None = None
    replicas: str = "auto"

    def rule(self, kind: str) -> str:
        """The update rule that an override, or the kind of a parameter, stands for."""
        return {"muon": self.update_rule, "adamw": self.aux_update_rule}.get(kind, kind)


@dataclass(frozen=True)
class ScaleMode:
    """Megatron's ``--muon-scale-mode`` times ``--muon-extra-scale-factor``.

    ``lr`` times the result is the spectral norm of a step of a (rows, cols) matrix.
    """

    mode: str
    extra: float

    def __call__(self, rows: int, cols: int) -> float:
        factor = {
            "spectral": sqrt(max(rows, cols)),
            "unit_rms_norm": sqrt(rows / cols),
            "shape_scaling": sqrt(max(1.0, rows / cols)),
        }[self.mode]
        return factor * self.extra


@dataclass(frozen=True)
class Transposed:
    """A learning-rate scale for matrices that are stored as (in, out)."""

    adjust_lr_fn: Any

    def __call__(self, rows: int, cols: int) -> float:
        return learning_rate_scale(self.adjust_lr_fn, (cols, rows))


@dataclass(frozen=True)
class Resolved:
    """Everything decided.

    Attributes:
        settings: As given, with ``split_qkv`` as both flags say.
        arguments: FlashMuon's keyword arguments.
        groups: From the update rules that parameters may have to the settings of their groups.
        lines: For people: what each flag resolves to.
    """

    settings: Settings
    arguments: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    lines: tuple[str, ...]


def resolve(config: Any, settings: Settings) -> Resolved:
    """Combine Megatron's ``OptimizerConfig`` and ours.

    ``muon_momentum``, Nesterov, scale mode, extra scale factor and the split of QKV are taken from
    the config. The number of steps, the coefficients and the matmul precision are taken from it
    where they are not Megatron's defaults; else FlashMuon's method decides.

    Raises:
        ValueError: A flag of Megatron's Muon cannot be honoured, or a setting is unsuitable; the
            message names it.
        NotImplementedError: An update rule has a state that checkpoints would lose.
    """
    muon = _MuonFlags(config)
    method, coefficients, steps_line = _iteration(muon, settings)
    ns_dtype = settings.ns_dtype
    precision = muon.value("fp32_matmul_prec", "medium")
    if ns_dtype is None and precision == "high":
        ns_dtype = "fp32"
    adjust = settings.adjust_lr_fn or ScaleMode(
        muon.value("scale_mode", "spectral"), float(muon.value("extra_scale_factor", 1.0))
    )
    _refuse(muon)
    exchange = ExchangeOptions(
        wire_dtype=_dtype("wire-dtype", settings.wire_dtype),
        memory_bytes=settings.memory_bytes,
        bucket_bytes=settings.bucket_bytes,
        replicas=settings.replicas,
    )
    arguments = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": muon.value("momentum", 0.95),
        "nesterov": bool(muon.value("nesterov", muon.value("use_nesterov", False))),
        "adjust_lr_fn": adjust,
        "method": method,
        "ns_coefficients": coefficients,
        "ns_dtype": None if ns_dtype is None else _dtype("ns-dtype", ns_dtype),
        "backend": settings.backend,
        "aux_lr": config.lr if settings.aux_lr is None else settings.aux_lr,
        "aux_weight_decay": config.weight_decay,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "cautious": settings.cautious,
        "nonfinite": settings.nonfinite,
        "exchange": exchange,
        "update_rule": settings.update_rule,
        **settings.rule_settings,
    }
    groups = _groups(settings, arguments)
    split_qkv = settings.split_qkv and bool(muon.value("split_qkv", True))
    resolved = Settings(
        **{f.name: getattr(settings, f.name) for f in fields(Settings) if f.name != "split_qkv"},
        split_qkv=split_qkv,
    )
    lines = [
        *(
            f"{key} = {value}"
            for key, value in arguments.items()
            if key not in ("exchange", "update_rule", *settings.rule_settings)
        ),
        *_rule_lines(settings, groups),
        f"wire_dtype = {settings.wire_dtype}, memory_bytes = {settings.memory_bytes}, "
        f"bucket_bytes = {settings.bucket_bytes}, replicas = {settings.replicas}",
        f"split_qkv = {split_qkv}, split_gate_up = {settings.split_gate_up}",
        *(f"overrides: {k} = {v}" for k, v in settings.overrides.items()),
        *steps_line,
        f"--muon-tp-mode {muon.value('tp_mode', 'duplicated')}: matrices are orthogonalized whole "
        "in every mode, each on one rank",
    ]
    if muon.value("use_syrk", False):
        lines.append("--muon-use-syrk: the backend has symmetric products and chooses by itself")
    return Resolved(resolved, arguments, groups, tuple(lines))


def _groups(settings: Settings, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the groups of each update rule are told, checked by FlashMuon itself."""
    for flag, rule, known in (
        ("update-rule", settings.update_rule, MATRIX_RULES),
        ("aux-update-rule", settings.aux_update_rule, AUXILIARY_RULES),
    ):
        if rule not in tuple(known):
            raise ValueError(f"--flashmuon-{flag} {rule}: use one of {sorted(known)}")
    for pattern, rule in settings.overrides.items():
        try:
            check_rule(rule)
        except ValueError as error:
            raise ValueError(f"--flashmuon-overrides {pattern}={rule}: {error}") from None
    for key in settings.rule_settings:
        if key not in RULE_SETTINGS:
            raise ValueError(
                f"--flashmuon-rule-settings {key}: the update rules have {sorted(RULE_SETTINGS)}"
            )
    kinds = ("muon", "adamw", *settings.overrides.values())
    rules = dict.fromkeys(settings.rule(kind) for kind in kinds)
    checked = FlashMuon([{"params": [], "update_rule": rule} for rule in rules], **arguments)
    for group in checked.param_groups:
        rule = group["update_rule"]
        cut = {"step", *RULES[rule].local_states}
        for name in state_names(group, leading_blocks((1, 1))) - cut:
            raise NotImplementedError(
                f"FlashMuon does not support update_rule={rule!r} under Megatron: its state "
                f"{name!r} is not cut as the parameters are, and the checkpoints of Megatron's "
                'optimizers hold only states that are. Use "muon", "adamuon", or "dion2" without '
                "normuon."
            )
    return {
        group["update_rule"]: {k: v for k, v in group.items() if k != "params"}
        for group in checked.param_groups
    }


def _rule_lines(settings: Settings, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Update rules with their own settings."""
    lines = []
    for rule, group in groups.items():
        own = "".join(f", {key} = {group[key]}" for key in RULES[rule].settings)
        kind = "matrices" if rule in MATRIX_RULES else "auxiliary parameters"
        lines.append(f"update_rule of {kind} = {rule}{own}")
    if "dion2" in groups and groups["dion2"]["nesterov"]:
        lines.append("--muon-nesterov: dion2 has no Nesterov momentum")
    return lines


class _MuonFlags:
    """The ``muon_*`` fields of a config, and which of them differ from Megatron's defaults."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._defaults = {f.name: f.default for f in fields(config)}

    def value(self, name: str, default: Any) -> Any:
        return getattr(self._config, f"muon_{name}", default)

    def is_changed(self, name: str) -> bool:
        key = f"muon_{name}"
        return key in self._defaults and getattr(self._config, key) != self._defaults[key]


def _iteration(muon: _MuonFlags, settings: Settings) -> tuple[str, Any, list[str]]:
    """Method, coefficients, and a line about flags of Megatron's that were not followed."""
    flags = "--muon-num-ns-steps and --muon-coefficient-type"
    if not (muon.is_changed("num_ns_steps") or muon.is_changed("coefficient_type")):
        line = f"{flags}: not given, FlashMuon's method = {settings.method} decides"
        return settings.method, settings.ns_coefficients, [line]
    if settings.method != "auto" or settings.ns_coefficients is not None:
        raise ValueError(
            f"{flags} choose Newton-Schulz steps, and so do --flashmuon-method and "
            "--flashmuon-ns-coefficients. Give one pair only."
        )
    kind, steps = muon.value("coefficient_type", "quintic"), int(muon.value("num_ns_steps", 5))
    rows = _COEFFICIENTS.get(kind, ())
    if not rows or steps % len(rows):
        raise ValueError(
            f"--muon-coefficient-type {kind} with --muon-num-ns-steps {steps}: FlashMuon takes "
            + ", ".join(f"{name} with a multiple of {len(r)}" for name, r in _COEFFICIENTS.items())
            + " steps; others with --flashmuon-method and --flashmuon-ns-coefficients"
        )
    line = f"{flags}: {steps} standard Newton-Schulz steps, {kind} coefficients"
    return "standard", list(rows) * (steps // len(rows)), [line]


def _refuse(muon: _MuonFlags) -> None:
    """Raise ValueError for what is asked of Megatron's Muon and cannot be done."""
    if muon.is_changed("tp_mode") and muon.value("tp_mode", "") == "blockwise":
        raise ValueError(
            "--muon-tp-mode blockwise orthogonalizes each tensor-parallel shard by itself, so that "
            "the weights depend on the degree. FlashMuon orthogonalizes whole matrices; leave the "
            "flag out."
        )
    scalar = muon.value("scalar_optimizer", "adam")
    if scalar != "adam":
        raise ValueError(
            f"--muon-scalar-optimizer {scalar}: FlashMuon's flag for auxiliary parameters is "
            "--flashmuon-aux-update-rule (adamw or lion). Leave this one out."
        )


def _dtype(flag: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        allowed = WIRE_DTYPES if flag == "wire-dtype" else _DTYPES.values()
        names = sorted(known for known, dtype in _DTYPES.items() if dtype in allowed)
        raise ValueError(f"--flashmuon-{flag} {name}: use one of {names}")
    return _DTYPES[name]
