"""The Muon update rule: momentum, then the polar factor of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def momentum_direction(
    gradients: Sequence[Tensor], momenta: Sequence[Tensor], group: dict[str, Any]
) -> list[Tensor]:
    """Update the momenta in place and return what is to be orthogonalized.

    The momentum is ``torch.optim.Muon``'s exponential average, ``m <- mu m + (1 - mu) g`` (Keller
    Jordan's and dion's is the sum: larger by ``1 / (1 - mu)``, which orthogonalization does not
    see). With Nesterov the direction is ``mu m + (1 - mu) g``, else ``m``.

    Every operation is elementwise and rounds the same wherever the element lies.

    Args:
        gradients: This rank's pieces, any float dtype.
        momenta: Pieces of ``momentum_buffer``, fp32 (fp64 for fp64 parameters); changed in place.
        group: Parameter group: ``momentum``, ``nesterov``.
    """
    mu = float(group["momentum"])
    cast = [g.to(m.dtype) for g, m in zip(gradients, momenta, strict=True)]
    scaled = torch._foreach_mul(cast, 1 - mu)
    torch._foreach_mul_(list(momenta), mu)
    torch._foreach_add_(list(momenta), scaled)
    if not group["nesterov"]:
        return list(momenta)
    directions = torch._foreach_mul(list(momenta), mu)
    torch._foreach_add_(directions, scaled)
    return list(directions)


def apply_update(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    cautious: bool,
) -> None:
    """``w <- (1 - lr weight_decay) w - lr scale u``, in place, in the weights' dtype.

    Args:
        weights: fp32 or fp64 pieces.
        updates: Orthogonalized pieces of the same shapes, any float dtype.
        lr: Learning rate; ``lr * scale`` is the spectral norm of the change.
        scale: Factor for the matrix's shape.
        weight_decay: Decoupled: multiplied by the learning rate, not by the scale.
        cautious: Decay only where the update moves a weight towards zero too (arXiv 2510.12402).
    """
    changes = torch._foreach_mul(
        [u.to(w.dtype) for u, w in zip(updates, weights, strict=True)], lr * scale
    )
    if weight_decay and cautious:
        shrinks = [(c * w > 0) for c, w in zip(changes, weights, strict=True)]
        for weight, shrink in zip(weights, shrinks, strict=True):
            weight.sub_(weight * shrink * (lr * weight_decay))
    elif weight_decay:
        torch._foreach_mul_(list(weights), 1 - lr * weight_decay)
    torch._foreach_sub_(list(weights), changes)
