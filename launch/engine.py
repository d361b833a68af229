"""What runs a training step: the seam between the main job and a framework."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from launch.checkpoint import load_checkpoint, save_checkpoint
from launch.mesh import MeshSpec
from launch.model import Transformer
from launch.optimizers import OptimizerConfig, build_optimizers
from launch.parallelize import parallelize
from launch.stopwatch import Stopwatch
from launch.world import World

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one training step did.

    Attributes:
        loss: Mean over the global batch, in nats per token, before the update.
        grad_norm: Norm of the whole gradient before clipping.
        optimizer_seconds: Time in the optimizer, on this rank.
    """

    loss: float
    grad_norm: float
    optimizer_seconds: float


class Engine(Protocol):
    """What the main job asks of a framework. Every method is called on every rank."""

    def train_step(self, parts: Sequence[Batch], lr_factor: float) -> StepResult:
        """Accumulate the gradients of this rank's parts of the batch and update the weights."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss over all ranks' batches."""
        ...

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        ...

    def load(self, path: Path) -> None:
        """Read a checkpoint."""
        ...


class TorchEngine:
    """DDP, FSDP2, HSDP and FSDP2 with tensor parallelism, or one process without any of them."""

    def __init__(
        self,
        model: Transformer,
        *,
        world: World,
        mesh: MeshSpec,
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        clip: float,
        compile_blocks: bool = False,
    ) -> None:
        self.world = world
        self.clip = clip
        self.raw_model = model.to(world.device)
        if compile_blocks:
            for block in model.blocks:
                block.compile()
        self.model = parallelize(model, mesh, mesh.build(world.device.type), dtype)
        self.optimizers = build_optimizers(self.raw_model, optimizer)
        self._rates = [
            [group["lr"] for group in instance.param_groups] for instance in self.optimizers
        ]
        # FSDP2 casts by its own policy.
        self._autocast = dtype if not isinstance(self.model, FSDPModule) else torch.float32
        self._stopwatch = Stopwatch(world.device)

    def train_step(self, parts: Sequence[Batch], lr_factor: float) -> StepResult:
        """See `Engine`."""
        self.model.train()
        loss = torch.zeros((), device=self.world.device)
        for index, part in enumerate(parts):
            with self._gradient_sync(last=index == len(parts) - 1):
                part_loss = self._loss(part) / len(parts)
                part_loss.backward()
            loss += part_loss.detach()
        parameters = list(self.raw_model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._set_learning_rates(lr_factor)
        with self._stopwatch:
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return StepResult(self.world.mean(loss), float(norm), self._stopwatch.read())

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """See `Engine`."""
        self.model.eval()
        losses = [self._loss(batch) for batch in batches]
        return self.world.mean(torch.stack(losses).mean())

    def save(self, path: Path) -> None:
        """See `Engine`."""
        save_checkpoint(path, self.raw_model, self.optimizers)

    def load(self, path: Path) -> None:
        """See `Engine`."""
        groups = [group for instance in self.optimizers for group in instance.param_groups]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        load_checkpoint(path, self.raw_model, self.optimizers)
        # From this run's arguments, so that a resumed run can change them; as the learning rates.
        groups = [group for instance in self.optimizers for group in instance.param_groups]
        for group, values in zip(groups, settings, strict=True):
            group.update(values)

    def _set_learning_rates(self, factor: float) -> None:
        for instance, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(instance.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = (tokens.to(self.world.device, non_blocking=True) for tokens in batch)
        with torch.autocast(
            self.world.device.type, self._autocast, enabled=self._autocast != torch.float32
        ):
            logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[object]:
        """Exchange gradients after the last part of the batch alone."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()
