"""Wraps the engine's methods that choose an optimizer. DeepSpeed has no entry point for others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from flashns_dist.optim import FlashMuon

from .grouping import groups_from_config, groups_from_optimizer
from .internals import allow_under_zero, engine_methods
from .optimizer import FlashNS
from .settings import read_params
from .support import check_supported


def install() -> None:
    """Teach ``deepspeed.initialize`` the optimizer type FlashMuon; again is harmless.

    Raises:
        RuntimeError: This DeepSpeed lacks a method that is wrapped.
    """
    if getattr(DeepSpeedEngine, "_flashns_installed", False):
        return
    originals = engine_methods()
    wrappers: dict[str, Callable[..., Any]] = {
        "_is_supported_optimizer": _is_supported_optimizer,
        "_configure_basic_optimizer": _configure_basic_optimizer,
        "_configure_optimizer": _configure_optimizer,
    }
    for name, original in originals.items():
        wrapped = functools.partial(wrappers[name], original)
        setattr(DeepSpeedEngine, name, _method(original, wrapped))
    allow_under_zero(FlashNS)
    DeepSpeedEngine._flashns_installed = True


def _method(original: Callable[..., Any], wrapped: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    return method


def _is_flash_muon(optimizer_name: object) -> bool:
    return isinstance(optimizer_name, str) and optimizer_name.lower() == "flashmuon"


def _is_supported_optimizer(
    original: Callable[..., bool], engine: Any, optimizer_name: str
) -> bool:
    return _is_flash_muon(optimizer_name) or original(engine, optimizer_name)


def _configure_basic_optimizer(
    original: Callable[..., Any], engine: Any, model_parameters: Any
) -> Any:
    if not _is_flash_muon(engine.optimizer_name()):
        return original(engine, model_parameters)
    check_supported(engine, from_config=True)
    settings = read_params(engine.optimizer_params())
    params = engine.module.parameters() if model_parameters is None else model_parameters
    groups, names = groups_from_config(engine.module, params, settings)
    arguments = settings.arguments
    return FlashNS(
        groups,
        names,
        nonfinite=arguments.get("nonfinite", "raise"),
        exchange=arguments["exchange"],
    )


def _configure_optimizer(
    original: Callable[..., Any], engine: Any, client_optimizer: Any, model_parameters: Any
) -> None:
    def converted(optimizer: Any) -> Any:
        if not isinstance(optimizer, FlashMuon):
            return optimizer
        check_supported(engine, from_config=False)
        groups, names = groups_from_optimizer(engine.module, optimizer)
        return FlashNS.from_flash_muon(optimizer, groups, names)

    if isinstance(client_optimizer, FlashMuon):
        client_optimizer = converted(client_optimizer)
    elif callable(client_optimizer):
        make = client_optimizer

        def client_optimizer(params: Any) -> Any:
            return converted(make(params))

    original(engine, client_optimizer, model_parameters)
    if isinstance(engine.basic_optimizer, FlashNS):
        engine.basic_optimizer.attach(engine)
