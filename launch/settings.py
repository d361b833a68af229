"""The command line of the main job."""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.deepspeed_engine import OF_THE_CONFIG
from launch.model import SIZES
from launch.optimizers import DEFAULT_LR, NAMES, OptimizerConfig

# What belongs to the machine and not to the run: a resumed run may choose it anew.
_OF_THE_MACHINE = frozenset({"resume", "runs", "name", "mesh", "device", "threads", "stop_after"})

# The least and the most that makes sense.
_COUNT, _FROM_ZERO, _SHARE = (1, math.inf), (0, math.inf), (0, 1)
_BOUNDS: dict[str, tuple[float, float]] = {
    "threads": _COUNT,
    "checkpoint_every": _FROM_ZERO,
    "stop_after": _COUNT,
    "lr": _FROM_ZERO,
    "aux_lr": _FROM_ZERO,
    "weight_decay": _FROM_ZERO,
    "momentum": _SHARE,
    "clip": _FROM_ZERO,
    "steps": _COUNT,
    "warmup": _FROM_ZERO,
    "cooldown": _SHARE,
    "batch_size": _COUNT,
    "accumulate": _COUNT,
    "eval_every": _COUNT,
    "eval_batches": _COUNT,
    "seq_len": _COUNT,
    "dim": _COUNT,
    "layers": _COUNT,
    "heads": _COUNT,
    "kv_heads": _COUNT,
    "hidden_dim": _COUNT,
}


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
    _check_bounds(parser, settings)
    # argparse leaves what has a value already, so this one gets no defaults.
    bare = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(settings))))
    given = {name for name, value in vars(bare).items() if value is not None}
    _check_engine(parser, settings, given)
    # A resumed run may be started elsewhere.
    settings.data = [_from_anywhere(pattern) for pattern in settings.data]
    if settings.deepspeed_config is not None:
        settings.deepspeed_config = settings.deepspeed_config.absolute()
    return settings


def _from_anywhere(pattern: str) -> str:
    """A file, folder or pattern that names the same from every working directory."""
    if os.path.isabs(os.path.expanduser(pattern)):
        return pattern
    here = os.getcwd()
    return os.path.join(here if os.path.exists(pattern) else glob.escape(here), pattern)


def saved_settings(resume: Path) -> dict[str, Any]:
    """Read the settings of a run from its folder or from one of its checkpoints."""
    for folder in (resume, resume.absolute().parent.parent):  # also of a bare step-000100
        path = folder / "settings.json"
        if path.is_file():
            settings: dict[str, Any] = json.loads(path.read_text())
            return settings
    raise SystemExit(
        f"--resume {resume}: no settings.json there, so it is no run of this program. "
        "Give a folder like runs/NAME or runs/NAME/checkpoints/step-000100."
    )


def optimizer_name(settings: argparse.Namespace) -> str:
    """Return the name of what trains: `--optimizer`, or the type in `--deepspeed-config`."""
    section = _deepspeed_config(settings).get("optimizer", {})
    return str(section.get("type", settings.optimizer)).lower()


def optimizer_params(settings: argparse.Namespace) -> dict[str, Any]:
    """Return the params of the optimizer in `--deepspeed-config`; empty if there are none."""
    params: dict[str, Any] | None = _deepspeed_config(settings).get("optimizer", {}).get("params")
    return params or {}


def optimizer_config(settings: argparse.Namespace) -> OptimizerConfig:
    """Select what the optimizers need."""
    return OptimizerConfig(
        name=settings.optimizer,
        lr=settings.lr,
        aux_lr=settings.aux_lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        method=settings.method,
        ns_dtype=settings.ns_dtype,
    )


def _check_bounds(parser: argparse.ArgumentParser, settings: argparse.Namespace) -> None:
    for name, (least, most) in _BOUNDS.items():
        value = getattr(settings, name)
        # NaN is not within any bounds.
        if value is not None and not least <= value <= most:
            limit = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            parser.error(f"{_option(name)} {value}: it must be {limit}")


def _check_engine(
    parser: argparse.ArgumentParser, settings: argparse.Namespace, given: set[str]
) -> None:
    """Refuse what was given on the command line and would have no effect."""
    path = settings.deepspeed_config
    if settings.engine != "deepspeed":
        if "deepspeed_config" in given:
            parser.error(
                f"--deepspeed-config {path}: --engine {settings.engine} does not read it. "
                "Add --engine deepspeed, or leave it out."
            )
        return
    if "compile" in given:
        parser.error("--compile: --engine deepspeed does not compile the blocks. Leave it out.")
    try:
        config = _deepspeed_config(settings)
    except (OSError, ValueError) as error:
        parser.error(f"--deepspeed-config {path}: {error}")
    for key, names in OF_THE_CONFIG.items():
        for name in names:
            if key in config and name in given:
                parser.error(
                    f'{_option(name)} {getattr(settings, name)}: the "{key}" of '
                    f"--deepspeed-config {path} decides it. Leave one of them out."
                )


def _deepspeed_config(settings: argparse.Namespace) -> dict[str, Any]:
    """Read the config of `--engine deepspeed`; empty if there is none."""
    if settings.engine != "deepspeed" or settings.deepspeed_config is None:
        return {}
    config: dict[str, Any] = json.loads(settings.deepspeed_config.read_text())
    return config


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _HelpFormatter(argparse.HelpFormatter):
    """Shows defaults, except those that mean 'not given'."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, False, [], argparse.SUPPRESS)
        return f"{text} (default: %(default)s)".lstrip() if shown else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        description="Train a decoder-only transformer with FlashMuon, AdamW or torch.optim.Muon, "
        "on one process or under torchrun: torchrun --nproc-per-node 2 launch/train.py",
        formatter_class=_HelpFormatter,
    )
    _add_run(parser.add_argument_group("run"))
    _add_training(parser.add_argument_group("training"))
    _add_model(parser.add_argument_group("model"))
    return parser


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--name", help="of the run; a time stamp if not given")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs")
    add("--resume", type=Path, metavar="DIR", help="run or checkpoint to continue, on any mesh")
    add("--engine", choices=["torch", "deepspeed"], default="torch", help="what shards and steps")
    add(
        "--deepspeed-config",
        type=Path,
        metavar="JSON",
        help="config of --engine deepspeed; ZeRO stage 2 if not given. Batch sizes come from here",
    )
    add(
        "--mesh",
        metavar="AXES",
        help="axes ddp, replicate, fsdp, tp with sizes, as in 'fsdp', 'ddp=2', "
        "'replicate=2,fsdp=2' (HSDP) or 'fsdp=2,tp=2'; 'fsdp' over all processes if not given",
    )
    add("--device", choices=["cpu", "cuda"], help="cuda if there is a GPU for each process")
    add("--dtype", choices=["float32", "bfloat16"], help="of the passes; bfloat16 on cuda")
    add("--threads", type=int, metavar="N", help="CPU threads per process; shares the cores")
    add("--compile", action="store_true", help="torch.compile each block; --engine torch")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and the batches")
    add("--checkpoint-every", type=int, default=0, metavar="N", help="steps; 0: at the end alone")
    add("--stop-after", type=int, metavar="N", help="end at this step, as if interrupted")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add, defaults = group.add_argument, OptimizerConfig()
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="text files or .bin token shards of the NanoGPT speedrun; files, folders or patterns. "
        "The source of the Python standard library if not given",
    )
    add("--optimizer", choices=NAMES, default=defaults.name, help="of the matrices")
    rates = ", ".join(f"{rate:g} with {name}" for name, rate in DEFAULT_LR.items())
    add("--method", default=defaults.method, help="of flashmuon's orthogonalization")
    add(
        "--ns-dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of flashmuon's iteration; float16 on cuda, float32 on the CPU if not given",
    )
    add("--lr", type=float, metavar="X", help=f"of the matrices (adamw: of all); {rates}")
    add(
        "--aux-lr",
        type=float,
        default=defaults.aux_lr,
        metavar="X",
        help="of what Muon leaves to AdamW",
    )
    add(
        "--weight-decay",
        type=float,
        default=defaults.weight_decay,
        metavar="X",
        help="decoupled, of the matrices",
    )
    add("--momentum", type=float, default=defaults.momentum, metavar="X", help="of Muon")
    add("--clip", type=float, default=1.0, metavar="X", help="gradient norm; 0 leaves it alone")
    add("--steps", type=int, default=300, metavar="N", help="updates of the weights")
    add("--warmup", type=int, default=10, metavar="N", help="steps")
    add("--cooldown", type=float, default=0.4, metavar="X", help="share of the steps")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences, over all processes")
    add("--accumulate", type=int, default=1, metavar="N", help="parts of a batch, one by one")
    add("--eval-every", type=int, default=50, metavar="N", help="steps")
    add("--eval-batches", type=int, default=8, metavar="N", help="batches of the same size")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--size", choices=list(SIZES), default="tiny", help="shape of the model")
    add("--seq-len", type=int, default=256, metavar="N", help="tokens of context")
    add(
        "--dim", type=int, metavar="N", help="width, instead of the one of --size; so the next four"
    )
    add("--layers", type=int, metavar="N", help="blocks")
    add("--heads", type=int, metavar="N", help="of queries")
    add("--kv-heads", type=int, metavar="N", help="of keys and values")
    add("--hidden-dim", type=int, metavar="N", help="width of the feed-forward layer")
