"""Comparing optimizers by training: tuned on one grid, repeated over seeds, told with its noise.

Every contestant trains all parameters with one learning rate. Matrices get its rule, with the
learning-rate scale that makes an update as large as AdamW's (``match_rms_adamw``), so that one grid
suits all; the others get AdamW with the same rate. The rate with the lowest final loss of the
tuning seed is taken; its runs with other seeds are what is reported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from flashns_dist import FlashMuon, parameter_groups
from flashns_dist.optim import ParameterGroups
from flashns_dist.optim.rules import MATRIX_RULES
from flashns_dist.orthogonalize import METHODS
from launch.bench.outcome import TUNING_SEED, best_lr
from launch.bench.timing import environment
from launch.schedule import learning_rate_factor
from launch.stopwatch import Stopwatch

Builder: TypeAlias = "Callable[[nn.Module, float, Mapping[str, str]], list[torch.optim.Optimizer]]"

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1  # of what is orthogonalized by some contestant; nothing else decays
MOMENTUM = 0.95


Curve: TypeAlias = "list[dict[str, float]]"  # evaluations: step, seconds, loss, and more


class Task(Protocol):
    """What is trained.

    Attributes:
        name: Tells its runs in a file from others'.
        facts: Written into every line.
        overrides: For ``parameter_groups``.
    """

    name: str
    facts: dict[str, Any]
    overrides: dict[str, str]

    def run(self, build: Callable[[nn.Module], list[torch.optim.Optimizer]], seed: int) -> Curve:
        """Train from the start; the seed draws the weights and the order of the data."""
        ...


def contestants() -> dict[str, Builder]:
    """Every optimizer that there is, by name."""
    found: dict[str, Builder] = {"adamw": _adamw, "torch-muon": _torch_muon}
    for method in METHODS:
        found[f"muon-{method}"] = _flash_muon(update_rule="muon", method=method)
    for rule in MATRIX_RULES:
        if rule != "muon":
            found[rule] = _flash_muon(update_rule=rule)
    return found


def _groups(model: nn.Module, overrides: Mapping[str, str]) -> ParameterGroups:
    present = {name for name, _ in model.named_parameters()}
    return parameter_groups(model, overrides={k: v for k, v in overrides.items() if k in present})


def _adamw(
    model: nn.Module, lr: float, overrides: Mapping[str, str]
) -> list[torch.optim.Optimizer]:
    decisions = _groups(model, overrides).decisions
    matrices = [d.param for d in decisions if d.update_rule == "muon"]
    others = [d.param for d in decisions if d.update_rule == "adamw"]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=lr, betas=BETAS)]


def _torch_muon(
    model: nn.Module, lr: float, overrides: Mapping[str, str]
) -> list[torch.optim.Optimizer]:
    decisions = _groups(model, overrides).decisions
    matrices = [d.param for d in decisions if d.update_rule == "muon"]
    muon = torch.optim.Muon(
        matrices,
        lr=lr,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    others = [d.param for d in decisions if d.update_rule == "adamw"]
    return [muon, torch.optim.AdamW(others, lr=lr, betas=BETAS, weight_decay=0.0)]


def _flash_muon(**arguments: Any) -> Builder:
    def build(
        model: nn.Module, lr: float, overrides: Mapping[str, str]
    ) -> list[torch.optim.Optimizer]:
        optimizer = FlashMuon(
            _groups(model, overrides),
            lr=lr,
            weight_decay=WEIGHT_DECAY,
            momentum=MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
            aux_lr=lr,
            betas=BETAS,
            **arguments,
        )
        return [optimizer]

    return build


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        names: Contestants.
        lrs: The grid, ascending.
        seeds: Of the runs that are reported.
    """

    names: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]


def compare(task: Task, plan: Plan, path: Path) -> list[dict[str, Any]]:
    """Make the runs that the file at ``path`` lacks, and append each as one line.

    Returns:
        All runs of this task in the file, those of earlier calls too.
    """
    known = contestants()
    unknown = [name for name in plan.names if name not in known]
    if unknown:
        raise ValueError(f"--only {unknown}: choose from {', '.join(known)}")
    runs = read_runs(path, task)
    done = {(run["name"], run["lr"], run["seed"]) for run in runs}
    where = environment()
    path.parent.mkdir(parents=True, exist_ok=True)

    def make(name: str, lr: float, seed: int) -> None:
        if (name, lr, seed) in done:
            return
        curve = task.run(lambda model: known[name](model, lr, task.overrides), seed)
        curve = [{key: round(value, 5) for key, value in point.items()} for point in curve]
        run = {"task": task.name, "name": name, "lr": lr, "seed": seed, "curve": curve}
        runs.append(run)
        with path.open("a") as file:
            file.write(json.dumps({**run, **task.facts, **where}) + "\n")
        last = curve[-1]
        print(
            f"{name:14s} lr {lr:<8g} seed {seed:<3d} loss {last['loss']:.4f} "
            f"in {last['seconds']:.1f} s",
            flush=True,
        )

    for name in plan.names:
        for lr in plan.lrs:
            make(name, lr, TUNING_SEED)
        for seed in plan.seeds:
            make(name, best_lr(runs, name), seed)
    return runs


def read_runs(path: Path, task: Task) -> list[dict[str, Any]]:
    """The runs of a task in a file, with the same facts; none if there is no file."""
    if not path.is_file():
        return []
    expected = json.loads(json.dumps({"task": task.name, **task.facts}))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if expected.items() <= line.items()]


def train(
    optimizers: list[torch.optim.Optimizer],
    loss_of: Callable[[int], Tensor],
    evaluate: Callable[[], dict[str, float]],
    parameters: list[nn.Parameter],
    *,
    steps: int,
    evaluations: int,
    device: torch.device,
) -> Curve:
    """The loop of every task: warm up, constant, cool down; gradients clipped to the norm 1.

    Args:
        optimizers: Stepped one after the other.
        loss_of: The training loss of a step.
        evaluate: What to note now, with ``"loss"``.
        parameters: All that is trained.
        steps: Number of updates.
        evaluations: How often to evaluate, besides before the first step.
        device: Where it runs.

    Returns:
        The evaluations, with ``seconds`` of training so far and ``optimizer_seconds`` of them, on
        the CPU those of this process alone: use one thread. The first step counts as an average
        one: it pays for plans, allocation and compilation.
    """
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    whole, part = (Stopwatch(device, time.process_time) for _ in range(2))
    seconds = optimizer_seconds = 0.0
    curve: Curve = [{"step": 0, "seconds": 0.0, "optimizer_seconds": 0.0, **evaluate()}]
    for step in range(steps):
        factor = learning_rate_factor(step, num_steps=steps, warmup=steps // 10, cooldown=0.5)
        with whole:
            loss_of(step).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            with part:
                for optimizer, own in zip(optimizers, rates, strict=True):
                    for group, rate in zip(optimizer.param_groups, own, strict=True):
                        group["lr"] = rate * factor
                    optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        if step == 0:
            whole.read(), part.read()
        if step + 1 in at:
            seconds += whole.read()
            optimizer_seconds += part.read()
            scale = (step + 1) / max(step, 1)
            times = {"seconds": scale * seconds, "optimizer_seconds": scale * optimizer_seconds}
            curve.append({"step": step + 1, **times, **evaluate()})
    return curve
