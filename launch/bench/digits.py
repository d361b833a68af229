"""Which optimizer trains a small convolutional network on scikit-learn's digits fastest.

    python -m launch.bench.digits --out digits-cpu

The method of the CIFAR-10 speedruns on 1797 images of 8 x 8 that need no download: convolutions are
orthogonalized as ``(out, in * k * k)`` matrices, except for the first; everything else gets AdamW.
Four passes over the data: longer ones end at 99 percent with every optimizer.
``torch.optim.Muon`` is not among the contestants: it takes no convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench.comparison import Curve, compare, contestants, train
from launch.bench.outcome import conclude
from launch.bench.training import plan_of, read_arguments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_TEST = 497


@dataclass(frozen=True)
class Size:
    """Width of the network, budget and grid."""

    width: int
    steps: int
    batch_size: int
    lrs: tuple[float, ...]


SIZES = {
    "cpu": Size(width=16, steps=50, batch_size=100, lrs=(4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "test": Size(width=4, steps=4, batch_size=10, lrs=(2e-3, 8e-3)),
}


class Network(nn.Module):
    """Images ``(batch, 1, 8, 8)`` to logits of ten digits."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.GELU())

        self.first = layer(1, width)
        self.second = layer(width, 2 * width)
        self.third = layer(2 * width, 2 * width)
        self.fourth = layer(2 * width, 4 * width)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)``."""
        x = F.max_pool2d(self.second(self.first(images)), 2)
        x = F.max_pool2d(self.fourth(self.third(x)), 2)
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits


class Digits:
    """1300 training and 497 test images, the same split for every seed."""

    overrides: dict[str, str] = {  # noqa: RUF012
        f"{name}.0.weight": "muon" for name in ("second", "third", "fourth")
    }

    def __init__(self, name: str, size: Size) -> None:
        from sklearn.datasets import load_digits

        self.name = f"digits-{name}"
        self.facts: dict[str, Any] = {"size": asdict(size), "data": "sklearn.datasets.load_digits"}
        self._size = size
        bunch = load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32)[:, None]
        images = (images - images.mean()) / images.std()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self._images = images[order].to(DEVICE)
        self._labels = torch.tensor(bunch.target)[order].to(DEVICE)

    def run(self, build: Callable[[nn.Module], list[torch.optim.Optimizer]], seed: int) -> Curve:
        """See `Task`."""
        torch.manual_seed(seed)
        model = Network(self._size.width).to(DEVICE)
        count = len(self._images) - NUM_TEST
        images, labels = self._images, self._labels

        def loss_of(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
            chosen = torch.randint(count, (self._size.batch_size,), generator=generator) + NUM_TEST
            model.train()
            return F.cross_entropy(model(images[chosen]), labels[chosen])

        @torch.no_grad()
        def evaluate() -> dict[str, float]:
            model.eval()
            logits = model(images[:NUM_TEST])
            correct = (logits.argmax(1) == labels[:NUM_TEST]).double().mean()
            loss = F.cross_entropy(logits, labels[:NUM_TEST])
            return {"loss": float(loss), "accuracy": float(correct)}

        return train(
            build(model),
            loss_of,
            evaluate,
            list(model.parameters()),
            steps=self._size.steps,
            evaluations=min(20, self._size.steps),
            device=DEVICE,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on digits."""
    options = read_arguments(arguments, tuple(SIZES))
    size = SIZES[options.size]
    names = [name for name in contestants() if name != "torch-muon"]
    size = replace(size, steps=options.steps or size.steps)
    task = Digits(f"{options.size}-{size.steps}", size)
    runs = compare(task, plan_of(options, names, size.lrs), options.out.with_suffix(".jsonl"))
    title = f"digits: {size.steps} steps of {size.batch_size} images, {DEVICE.type}"
    print(conclude(runs, title, options.out, "accuracy"))


if __name__ == "__main__":
    main()
