"""The optimizers that the main job compares, behind one list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NAMES = ("flashmuon", "torch-muon", "adamw")

DEFAULT_LR = {"flashmuon": 0.02, "torch-muon": 0.02, "adamw": 6e-3}
"""What `--lr` is when it is not given."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters, the same meaning for every optimizer.

    Attributes:
        name: One of `NAMES`.
        lr: Learning rate of the matrices; with `adamw`, of all parameters. None takes `DEFAULT_LR`.
        aux_lr: Learning rate of what Muon leaves to AdamW.
        weight_decay: Decoupled weight decay of the matrices; with `adamw`, embedding and head too.
        momentum: Momentum of Muon.
        betas: Decay rates of AdamW's moments.
        method: How FlashMuon orthogonalizes.
        ns_dtype: Name of the dtype of its iteration; None for the device's default.
    """

    name: str = "flashmuon"
    lr: float | None = None
    aux_lr: float = 1e-2
    weight_decay: float = 0.1
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    method: str = "auto"
    ns_dtype: str | None = None


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Create the optimizers of a run, over the sharded parameters of `model`.

    Raises:
        ValueError: An unknown name.
        NotImplementedError: `torch-muon` with a PyTorch that has none.
    """
    if config.name not in NAMES:
        raise ValueError(f"--optimizer {config.name}: unknown. Choose from {', '.join(NAMES)}.")
    lr = DEFAULT_LR[config.name] if config.lr is None else config.lr
    if config.name == "flashmuon":
        return [_flashmuon(model, lr, config)]
    if config.name == "torch-muon":
        return _torch_muon(model, lr, config)
    return [_adamw(list(model.parameters()), lr, config.weight_decay, config.betas)]


def parameter_table(model: nn.Module, params: Mapping[str, Any] | None = None) -> str:
    """Say which update rule FlashMuon applies to which parameters, and why.

    Args:
        model: Not yet sharded.
        params: Of the optimizer in a DeepSpeed config, which may have overrides and views.
    """
    from flashns_dist import parameter_groups
    from flashns_dist.layout import named_view

    params = params or {}
    views = {
        pattern: view if view is None else named_view(view)
        for pattern, view in (params.get("matrix_views") or {}).items()
    }
    return parameter_groups(model, overrides=params.get("overrides"), matrix_views=views).table()


def adamw_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters of AdamW: norms do not decay."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _flashmuon(model: nn.Module, lr: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    from flashns_dist import FlashMuon, parameter_groups

    return FlashMuon(
        parameter_groups(model),
        lr=lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        aux_lr=config.aux_lr,
        betas=config.betas,
        method=config.method,
        ns_dtype=None if config.ns_dtype is None else getattr(torch, config.ns_dtype),
    )


def _torch_muon(
    model: nn.Module, lr: float, config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        raise NotImplementedError(
            f"--optimizer torch-muon: PyTorch {torch.__version__} has no torch.optim.Muon. "
            "Install PyTorch 2.9 or newer, or use flashmuon."
        )
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not name.startswith(("embedding.", "head."))
        (matrices if is_matrix else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
    return [muon, _adamw(rest, config.aux_lr, 0.0, config.betas)]


def _adamw(
    parameters: list[nn.Parameter],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.AdamW:
    return torch.optim.AdamW(adamw_groups(parameters, weight_decay), lr=lr, betas=betas)
