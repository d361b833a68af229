"""Makes ``optimizer="flashmuon"`` known to megatron.core and megatron.training."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .command_line import NAME, install_arguments
from .grouping import group_settings, parameter_names, rules_by_kin
from .internals import (
    add_overrides,
    built_as_adam,
    check_version,
    intercepted_builder,
    replace_factories,
)
from .optimizer import adopt
from .settings import Resolved, Settings, resolve
from .support import check_skipping, check_supported

_installed = False
_command_line: Settings | None = None


def install() -> None:
    """Teach Megatron the optimizer ``flashmuon``; again is harmless.

    ``get_megatron_optimizer`` of megatron.core then takes ``OptimizerConfig(optimizer=
    "flashmuon")``; settings that the config does not know are taken from a ``Settings`` object on
    it (``config.flashmuon``). Where megatron.training has been imported, or is importable, its
    command line gets ``--optimizer flashmuon`` and ``--flashmuon-...``.

    Raises:
        RuntimeError: This version of megatron-core lacks what is needed; names it.
    """
    global _installed
    if _installed:
        return
    check_version()
    replace_factories(_factory)
    install_arguments(remember)
    _installed = True


def remember(settings: Settings) -> None:
    """Keep what the command line said, for configs without settings of their own."""
    global _command_line
    _command_line = settings


def _factory(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_megatron_optimizer(
        config: Any,
        model_chunks: Sequence[Any],
        config_overrides: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if getattr(config, "optimizer", None) != NAME:
            return original(config, model_chunks, config_overrides, *args, **kwargs)
        resolved = resolve(config, settings_of(config))
        check_supported(config, model_chunks)
        skips = resolved.settings.nonfinite == "skip"
        if skips:
            check_skipping(config, model_chunks)
        added = group_settings(model_chunks, config, resolved.settings)
        overrides = add_overrides(config, config_overrides, added)
        kin = rules_by_kin(parameter_names(model_chunks), added)
        _print(resolved, added)
        with (
            built_as_adam(config, skips_nonfinite=skips),
            intercepted_builder(lambda part, built: adopt(part, built, resolved, kin)),
        ):
            return original(config, model_chunks, overrides, *args, **kwargs)

    return get_megatron_optimizer


def settings_of(config: Any) -> Settings:
    """The settings on a config, else those of the command line, else the defaults."""
    found = getattr(config, NAME, None)
    if found is not None and not isinstance(found, Settings):
        raise ValueError(f"config.flashmuon={found!r} must be a Settings object")
    return found or _command_line or Settings()


def _print(resolved: Resolved, added: Mapping[Tensor, Mapping[str, Any]]) -> None:
    if dist.get_rank() != 0:
        return
    counts = Counter(told["update_rule"] for told in added.values())
    found = ", ".join(f"{count} by {rule}" for rule, count in sorted(counts.items()))
    print(f"FlashMuon: tensors on rank 0: {found}")
    for line in resolved.lines:
        print(f"  {line}")
