"""Which optimizer trains the main job's model fastest, by steps and by time.

    python -m launch.bench.training --size cpu --out training-cpu
    python -m launch.bench.training --size gpt2-small --only adamw,torch-muon --out training-h200

Trains the transformer of launch/model.py on local text with every optimizer, at its best learning
rate of one grid, with several seeds. Runs are appended to ``OUT.jsonl``; the next call does not
repeat them, so a comparison may be split over several; ``OUT.md`` and ``OUT.png`` are of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench.comparison import Curve, Plan, compare, contestants, train
from launch.bench.outcome import conclude
from launch.data import Dataset, load_dataset
from launch.model import ModelConfig, Transformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Size:
    """Model, budget and grid.

    Attributes:
        model: Its vocabulary is the data's.
        steps: Updates of a run.
        batch_size: Sequences of a step.
        seq_len: Tokens of a sequence.
        lrs: Grid of learning rates.
        validation_batches: Of the same shape, for each evaluation.
    """

    model: ModelConfig
    steps: int
    batch_size: int
    seq_len: int
    lrs: tuple[float, ...]
    validation_batches: int = 4


SIZES = {
    "test": Size(
        ModelConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=24),
        steps=4,
        batch_size=2,
        seq_len=16,
        lrs=(1e-3, 4e-3),
        validation_batches=1,
    ),
    "cpu": Size(
        ModelConfig(dim=64, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=176),
        steps=150,
        batch_size=16,
        seq_len=64,
        lrs=(4e-3, 8e-3, 1.6e-2, 3.2e-2),
    ),
    # As many weights in its blocks as GPT-2 small, 85 million. A run reads 3.3 million bytes.
    "gpt2-small": Size(
        ModelConfig(
            dim=768,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            hidden_dim=2048,
            max_seq_len=1024,
        ),
        steps=200,
        batch_size=32,
        seq_len=512,
        lrs=(1.5e-3, 3e-3, 6e-3, 1.2e-2),
        validation_batches=2,
    ),
}


class Text:
    """Next-byte prediction; bf16 products on a GPU, everything else in fp32."""

    def __init__(self, name: str, size: Size, dataset: Dataset) -> None:
        dataset.check(size.seq_len)
        self.name = f"text-{name}"
        self.overrides: dict[str, str] = {}
        self.facts: dict[str, Any] = {"size": asdict(size), "data": dataset.description}
        self._size = size
        self._dataset = dataset
        self._starts: dict[int, Transformer] = {}  # drawing 85 million weights takes a second

    def run(self, build: Callable[[nn.Module], list[torch.optim.Optimizer]], seed: int) -> Curve:
        """See `Task`."""
        size = self._size
        if seed not in self._starts:
            config = replace(size.model, vocab_size=self._dataset.vocab_size)
            self._starts[seed] = Transformer(config, seed=seed).to(DEVICE)
        model = deepcopy(self._starts[seed])
        shape = {"batch_size": size.batch_size, "seq_len": size.seq_len}

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            inputs, targets = (tokens.to(DEVICE, non_blocking=True) for tokens in batch)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                logits = model(inputs)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        def loss_of(step: int) -> Tensor:
            return loss(self._dataset.train_batch(step, seed=seed, part=slice(None), **shape))

        @torch.no_grad()
        def evaluate() -> dict[str, float]:
            count = size.validation_batches
            batches = (
                self._dataset.validation_batch(i, num_batches=count, part=slice(None), **shape)
                for i in range(count)
            )
            return {"loss": float(torch.stack([loss(batch) for batch in batches]).mean())}

        return train(
            build(model),
            loss_of,
            evaluate,
            list(model.parameters()),
            steps=size.steps,
            evaluations=min(20, size.steps),
            device=DEVICE,
        )


def read_arguments(arguments: Sequence[str] | None, sizes: Sequence[str]) -> argparse.Namespace:
    """The arguments of a comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sizes, default=sizes[0])
    parser.add_argument("--only", help="contestants, separated by commas (default: all)")
    parser.add_argument("--lrs", help="another grid, separated by commas")
    parser.add_argument("--steps", type=int, help="another length of a run; kept apart in the file")
    parser.add_argument("--seeds", type=int, default=3, help="runs that are reported")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace, names: Sequence[str], lrs: Sequence[float]) -> Plan:
    """What the arguments ask for."""
    chosen = tuple(options.only.split(",")) if options.only else tuple(names)
    grid = tuple(map(float, options.lrs.split(","))) if options.lrs else tuple(lrs)
    return Plan(chosen, tuple(sorted(grid)), tuple(range(options.seeds)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on text."""
    options = read_arguments(arguments, tuple(SIZES))
    size = SIZES[options.size]
    size = replace(size, steps=options.steps or size.steps)
    dataset = load_dataset([])
    path = options.out.with_suffix(".jsonl")
    task = Text(f"{options.size}-{size.steps}", size, dataset)
    runs = compare(task, plan_of(options, tuple(contestants()), size.lrs), path)
    title = (
        f"{options.size}: {size.steps} steps of {size.batch_size} x {size.seq_len} bytes, "
        f"{DEVICE.type}"
    )
    print(conclude(runs, title, options.out, None))


if __name__ == "__main__":
    main()
