"""The optimizers that ``step.py`` measures, each made for the same parameters."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from flashns_dist import FlashMuon
from flashns_dist.optim.options import ExchangeOptions
from flashns_dist.plan import CostModel
from launch.bench.case import Problem
from launch.bench.peers import CARRIED

Make = Callable[[Problem], Optimizer]

SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
DION, DION_GRAM, ADAMW, TORCH_MUON = "dion", "dion gram", "fused AdamW", "torch.optim.Muon"
PEERS = (DION, DION_GRAM, ADAMW, TORCH_MUON)


def variants(text: str) -> dict[str, dict[str, Any]]:
    """FlashMuon's keywords by the variant's name.

    Args:
        text: JSON: an object, or a list of them. Each holds keywords of FlashMuon; ``"name"``, and
            ``"exchange"`` with those of ExchangeOptions (``"wire_dtype"`` by its name in torch,
            ``"cost"`` as the path of a calibration), and ``"cases"`` (a part of the names of the
            cases that the variant is for), are optional.
    """
    given = json.loads(text)
    found = {}
    for keywords in given if isinstance(given, list) else [given]:
        rest = {key: value for key, value in keywords.items() if key != "name"}
        found[keywords.get("name") or json.dumps(rest)] = rest
    return found


def exchange_options(keywords: Mapping[str, Any]) -> ExchangeOptions:
    """The exchange options of a variant."""
    options = dict(keywords.get("exchange", {}))
    if "wire_dtype" in options:
        options["wire_dtype"] = getattr(torch, options["wire_dtype"])
    if isinstance(options.get("cost"), str):
        options["cost"] = CostModel.load(options["cost"])
    return ExchangeOptions(**options)


def flash(keywords: Mapping[str, Any]) -> Make:
    """FlashMuon with some keywords."""
    rest = {key: value for key, value in keywords.items() if key != "exchange"}
    if isinstance(rest.get("ns_dtype"), str):
        rest["ns_dtype"] = getattr(torch, rest["ns_dtype"])

    def make(problem: Problem) -> Optimizer:
        return FlashMuon(problem.named, **{**SETTINGS, **rest}, exchange=exchange_options(keywords))

    return make


def peer(name: str) -> Make:
    """Another optimizer; making it raises ImportError where it is not there."""
    makes: dict[str, Make] = {
        DION: lambda problem: _dion(problem, {}),
        DION_GRAM: lambda problem: _dion(
            problem, {"use_gram_newton_schulz": True, "use_triton": True}
        ),
        ADAMW: lambda problem: torch.optim.AdamW(problem.parameters, fused=True, **SETTINGS),
        TORCH_MUON: lambda problem: torch.optim.Muon(problem.parameters, **SETTINGS),
    }
    if name not in makes:
        raise ValueError(f"no candidate {name!r}; use FlashMuon or one of {PEERS}")
    return makes[name]


def _dion(problem: Problem, keywords: Mapping[str, Any]) -> Optimizer:
    """dion's Muon over the shards; replicas repeat its work."""
    if CARRIED.is_dir() and str(CARRIED) not in sys.path:
        sys.path.append(str(CARRIED))
    module = importlib.import_module("dion.muon")
    made: Optimizer = module.Muon(
        problem.parameters,
        distributed_mesh=problem.mesh["shard"] if problem.mesh.ndim > 1 else problem.mesh,
        mu=0.95,
        nesterov=True,
        **SETTINGS,
        **keywords,
    )
    return made


__all__ = ["PEERS", "exchange_options", "flash", "peer", "variants"]
