"""Checkpoints that any number of processes, on any mesh, can continue from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from launch.model import ModelConfig


def save_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write the model and the optimizers, each rank its own shards. Called on every rank."""
    save(_state(model, optimizers), checkpoint_id=str(path))


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Read a checkpoint into the model and the optimizers. Called on every rank.

    The mesh may differ from the one that wrote it: every rank reads what it needs.
    """
    state = _state(model, optimizers)
    load(state, checkpoint_id=str(path))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizers, state["optimizer"])


def describe_checkpoint(
    path: Path, step: int, config: ModelConfig, *, tokens: int, engine: str, optimizer: str
) -> None:
    """Write beside a checkpoint how far it is, what wrote it and its model. One rank calls it."""
    path.mkdir(parents=True, exist_ok=True)
    described = {
        "step": step,
        "tokens": tokens,
        "engine": engine,
        "optimizer": optimizer,
        "model": asdict(config),
    }
    (path / "run.json").write_text(json.dumps(described, indent=2))


def find_checkpoint(resume: Path) -> Path:
    """Return `resume` if it is a checkpoint, else the last complete one of that run.

    Raises:
        FileNotFoundError: There is none.
    """
    if _is_complete(resume):
        return resume
    complete = [path for path in (resume / "checkpoints").glob("step-*") if _is_complete(path)]
    if not complete:
        raise FileNotFoundError(
            f"--resume {resume}: no complete checkpoint there. Give a run that wrote one."
        )
    return max(complete, key=_step)


def check_last(checkpoint: Path, run: Path) -> None:
    """Refuse to continue a run in its own folder from a checkpoint that is not its last.

    Raises:
        ValueError: A later one is there; the next `--resume` would take it for the new run's.
    """
    last = find_checkpoint(run)
    if _step(last) > _step(checkpoint):
        raise ValueError(
            f"--resume {checkpoint}: {run} goes on to {last.name}, which a later --resume would "
            "continue from. Give another --name for the run from here on, or remove the later "
            "checkpoints."
        )


def checkpoint_step(path: Path, config: ModelConfig, *, engine: str, optimizer: str) -> int:
    """Return the step that a checkpoint continues at.

    Raises:
        ValueError: It is of another engine or optimizer, or holds a model of another shape.
    """
    described = json.loads((path / "run.json").read_text())
    # Older ones name neither.
    theirs = described.get("engine", engine)
    if theirs != engine:
        raise ValueError(
            f"{path}: the checkpoint is of --engine {theirs}, and --engine {engine} cannot read "
            f"it. Resume with --engine {theirs}, or start a new run without --resume."
        )
    theirs = described.get("optimizer", optimizer)
    if theirs != optimizer:
        raise ValueError(
            f"{path}: the checkpoint holds the state of the optimizer {theirs}, and this run has "
            f"{optimizer}. Resume with --optimizer {theirs} (or that type in --deepspeed-config), "
            "or start a new run without --resume."
        )
    mine = asdict(config)
    for name, value in described["model"].items():
        if mine.get(name) != value:
            raise ValueError(
                f"{path}: the model there has {name}={value}, and this run has {mine.get(name)}. "
                "Resume with the arguments of the run that wrote it."
            )
    return int(described["step"])


def checkpoint_tokens(path: Path) -> int | None:
    """Return how many tokens a checkpoint was trained on; older ones do not say."""
    tokens: int | None = json.loads((path / "run.json").read_text()).get("tokens")
    return tokens


def _is_complete(path: Path) -> bool:
    # DCP writes .metadata last: a checkpoint without it was cut short.
    return (path / ".metadata").is_file() and (path / "run.json").is_file()


def _step(path: Path) -> int:
    return int(json.loads((path / "run.json").read_text())["step"])


def _state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizers),
    }
