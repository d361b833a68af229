"""The command line of the main job."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.model import SIZES
from launch.optimizers import NAMES, OptimizerConfig

# What belongs to the machine and not to the run: a resumed run may choose it anew.
_OF_THE_MACHINE = frozenset({"resume", "runs", "name", "mesh", "device", "threads", "stop_after"})


def read_settings(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; under `--resume`, over the settings of the resumed run.

    Raises:
        SystemExit: A bad argument, as argparse reports it.
    """
    parser = _parser()
    first, _ = parser.parse_known_args(arguments)
    if first.resume is not None:
        saved = saved_settings(first.resume)
        parser.set_defaults(**{k: v for k, v in saved.items() if k not in _OF_THE_MACHINE})
    settings = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "seq_len", "accumulate", "eval_batches"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return settings


def saved_settings(resume: Path) -> dict[str, Any]:
    """Read the settings of a run from its folder or from one of its checkpoints."""
    for folder in (resume, resume.parent.parent):
        path = folder / "settings.json"
        if path.is_file():
            settings: dict[str, Any] = json.loads(path.read_text())
            return settings
    raise SystemExit(
        f"--resume {resume}: no settings.json there, so it is no run of this program. "
        "Give a folder like runs/NAME or runs/NAME/checkpoints/step-000100."
    )


def optimizer_config(settings: argparse.Namespace) -> OptimizerConfig:
    """Select what the optimizers need."""
    return OptimizerConfig(
        name=settings.optimizer,
        lr=settings.lr,
        aux_lr=settings.aux_lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        description="Train a decoder-only transformer: torchrun --nproc-per-node 2 launch/train.py",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_run(parser.add_argument_group("run"))
    _add_training(parser.add_argument_group("training"))
    _add_model(parser.add_argument_group("model"))
    return parser


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--name", help="of the run; a time stamp if not given")
    group.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
    group.add_argument(
        "--resume", type=Path, metavar="DIR", help="run or checkpoint to continue, on any mesh"
    )
    group.add_argument("--engine", choices=["torch"], default="torch", help="what shards and steps")
    group.add_argument(
        "--mesh",
        help="axes ddp, replicate, fsdp, tp with sizes, as in 'fsdp', 'ddp=2', "
        "'replicate=2,fsdp=2' (HSDP) or 'fsdp=2,tp=2'; 'fsdp' over all processes if not given",
    )
    group.add_argument("--device", choices=["cpu", "cuda"], help="cuda where present")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on cuda")
    group.add_argument("--threads", type=int, help="CPU threads per process")
    group.add_argument("--compile", action="store_true", help="torch.compile each block")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--checkpoint-every", type=int, default=0, help="steps; 0 means at the end alone"
    )
    group.add_argument("--stop-after", type=int, help="stop at this step, as if interrupted")


def _add_training(group: argparse._ArgumentGroup) -> None:
    defaults = OptimizerConfig()
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        help="text files or .bin token shards of the NanoGPT speedrun; files, folders or patterns "
        "(default: the source of the Python standard library)",
    )
    group.add_argument("--optimizer", choices=NAMES, default=defaults.name)
    group.add_argument("--lr", type=float, default=defaults.lr, help="of the matrices")
    group.add_argument("--aux-lr", type=float, default=defaults.aux_lr, help="of AdamW")
    group.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    group.add_argument("--momentum", type=float, default=defaults.momentum)
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm; 0 leaves it alone")
    group.add_argument("--steps", type=int, default=240)
    group.add_argument("--warmup", type=int, default=10, help="steps")
    group.add_argument("--cooldown", type=float, default=0.4, help="share of the steps")
    group.add_argument("--batch-size", type=int, default=16, help="sequences, over all processes")
    group.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one by one")
    group.add_argument("--eval-every", type=int, default=40, help="steps")
    group.add_argument("--eval-batches", type=int, default=4)


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--size", choices=list(SIZES), default="tiny")
    group.add_argument("--seq-len", type=int, default=256)
    group.add_argument("--dim", type=int, help="instead of the one of --size; so the next four")
    group.add_argument("--layers", type=int)
    group.add_argument("--heads", type=int)
    group.add_argument("--kv-heads", type=int)
    group.add_argument("--hidden-dim", type=int)
