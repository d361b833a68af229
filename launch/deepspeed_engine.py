"""The main job's engine on DeepSpeed: ZeRO as a JSON config says, FlashMuon by its name there."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.engine import Batch, StepResult
from launch.model import Transformer
from launch.optimizers import DEFAULT_LR, OptimizerConfig, adamw_groups
from launch.stopwatch import Stopwatch
from launch.world import World

OF_THE_CONFIG = {
    "optimizer": (
        "optimizer",
        "method",
        "ns_dtype",
        "lr",
        "aux_lr",
        "weight_decay",
        "momentum",
    ),
    "gradient_clipping": ("clip",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "torch_autocast": ("dtype",),
}
"""Keys of a config, and the settings that each decides instead of the command line."""

_PRECISIONS = OF_THE_CONFIG.keys() - {"optimizer", "gradient_clipping"}
_TAG = "deepspeed"


class DeepSpeedEngine:
    """ZeRO stages 0 to 3. See `launch.engine.Engine`.

    Args:
        model: Not yet sharded.
        world: From torchrun; DeepSpeed uses its process group.
        optimizer: Becomes the config's "optimizer" where that has none.
        dtype: bf16 is switched on in the config where that says nothing about precision.
        clip: Becomes "gradient_clipping" where the config has none.
        config: Path of a DeepSpeed JSON config; None trains with ZeRO stage 2.
        micro_batch_size: Sequences of this rank's parts of a batch.
        num_parts: Parts of a batch, one by one.

    Raises:
        ValueError: There is no process group, the config has a scheduler, or the optimizer is not
            one for DeepSpeed.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        world: World,
        optimizer: OptimizerConfig,
        dtype: torch.dtype,
        clip: float,
        config: Path | None,
        micro_batch_size: int,
        num_parts: int,
    ) -> None:
        if not world.distributed:
            raise ValueError(
                "--engine deepspeed: there is no process group. "
                "Start with torchrun --nproc-per-node N launch/train.py."
            )
        deepspeed = _deepspeed(world)
        settings = json.loads(config.read_text()) if config is not None else _default()
        if "scheduler" in settings:
            raise ValueError(
                "--deepspeed-config: it has a scheduler, and train.py sets the learning rates of "
                "every step itself. Leave it out and use --warmup and --cooldown."
            )
        parameters: Any = model.parameters()
        if "optimizer" not in settings:
            settings["optimizer"] = _optimizer(optimizer)
            if optimizer.name == "adamw":
                parameters = adamw_groups(list(parameters), optimizer.weight_decay)
        settings.setdefault("gradient_clipping", clip)
        if dtype == torch.bfloat16 and not _PRECISIONS & settings.keys():
            settings["bf16"] = {"enabled": True}
        settings["train_micro_batch_size_per_gpu"] = micro_batch_size
        settings["gradient_accumulation_steps"] = num_parts
        settings["train_batch_size"] = micro_batch_size * num_parts * world.size
        settings.setdefault("steps_per_print", 10**9)
        self.world = world
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self.engine: Any = deepspeed.initialize(
            model=model, model_parameters=parameters, config=settings
        )[0]
        self._rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        self._stopwatch = Stopwatch(world.device)

    def train_step(self, parts: Sequence[Batch], lr_factor: float) -> StepResult:
        """See `Engine`. The optimizer's time includes DeepSpeed's clipping and all-gathers."""
        self.engine.train()
        for group, rate in zip(self.engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr_factor
        loss = torch.zeros((), device=self.world.device)
        for index, part in enumerate(parts):
            part_loss = self._loss(part)
            self.engine.backward(part_loss)
            loss += part_loss.detach() / len(parts)
            if index < len(parts) - 1:
                self.engine.step()
        with self._stopwatch:
            self.engine.step()
        norm = self.engine.get_global_grad_norm()  # none in stage 0 in fp32
        return StepResult(
            self.world.mean(loss),
            float("nan") if norm is None else float(norm),
            self._stopwatch.read(),
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """See `Engine`."""
        self.engine.eval()
        losses = [self._loss(batch) for batch in batches]
        return self.world.mean(torch.stack(losses).mean())

    def save(self, path: Path) -> None:
        """See `Engine`. DeepSpeed's own format, for the same number of ranks."""
        self.engine.save_checkpoint(str(path), tag=_TAG)
        self.world.barrier()
        if self.world.is_first:
            # As PyTorch's checkpoints have it: written last, it says that the rest is complete.
            (path / ".metadata").write_text(f"DeepSpeed {self._kind}")

    def load(self, path: Path) -> None:
        """See `Engine`.

        Raises:
            ValueError: It was written under another ZeRO stage or precision, which DeepSpeed does
                not convert.
        """
        _, _, kind = (path / ".metadata").read_text().partition(" ")
        if kind and kind != self._kind:  # older ones do not say
            raise ValueError(
                f"{path}: DeepSpeed's {kind} wrote the checkpoint, and this run's {self._kind} "
                "cannot read it. Resume with the ZeRO stage and precision that wrote it "
                "(--deepspeed-config), or start a new run without --resume."
            )
        loaded, _ = self.engine.load_checkpoint(str(path), tag=_TAG)
        if loaded is None:
            raise FileNotFoundError(f"{path}: no DeepSpeed checkpoint there")

    @property
    def _kind(self) -> str:
        """The optimizer wrapper, which decides what a checkpoint holds; stages 1 and 2 share it."""
        return type(self.engine.optimizer).__name__

    def _loss(self, batch: Batch) -> Tensor:
        inputs, targets = (tokens.to(self.world.device, non_blocking=True) for tokens in batch)
        logits = self.engine(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _deepspeed(world: World) -> Any:
    """Import DeepSpeed and teach it FlashMuon."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "--engine deepspeed: DeepSpeed is not installed. DS_BUILD_OPS=0 pip install deepspeed"
        ) from None

    importlib.import_module("flashns_dist.integrations.deepspeed")
    if world.device.type == "cpu":
        # Else a shared-memory op is compiled, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _default() -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}}


def _optimizer(config: OptimizerConfig) -> dict[str, Any]:
    lr = DEFAULT_LR[config.name] if config.lr is None else config.lr
    if config.name == "flashmuon":
        params = {
            "lr": lr,
            "aux_lr": config.aux_lr,
            "weight_decay": config.weight_decay,
            "momentum": config.momentum,
            "betas": list(config.betas),
            "ns_dtype": config.ns_dtype,
        }
        if config.method != "auto":  # which in a config means that something is to fill it in
            params["method"] = config.method
        return {"type": "FlashMuon", "params": params}
    if config.name == "adamw":
        params = {"lr": lr, "weight_decay": config.weight_decay, "betas": list(config.betas)}
        return {"type": "AdamW", "params": {**params, "torch_adam": True}}
    raise ValueError(
        f"--optimizer {config.name} with --engine deepspeed: use flashmuon or adamw, or write "
        'the "optimizer" into --deepspeed-config.'
    )
