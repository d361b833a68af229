"""The Muon update rule: momentum, then the polar factor of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashns_dist.optim.pieces import Pieces, Run
from flashns_dist.optim.rules.rule import MatrixRule
from flashns_dist.optim.rules.scaling import RENORMALIZE, equilibrate_, renormalize_
from flashns_dist.orthogonalize import (
    POLAR_EXPRESS,
    Coefficients,
    orthogonalize,
    resolve_coefficients,
)

MUON_SETTINGS: dict[str, Any] = {
    "equilibrate": False,
    "renormalize": "none",
    "independent_decay": False,
}
_NS_STEPS = 5  # FlashMuon's and torch.optim.Muon's default, which counts as not given


class Muon(MatrixRule):
    """Muon (arXiv 2502.16982), with ``torch.optim.Muon``'s momentum.

    Settings: ``equilibrate`` rows before, ``renormalize`` after orthogonalization (see
    ``scaling.py``), and ``independent_decay``: weights decay by ``weight_decay`` per step, whatever
    the learning rate.
    """

    name = "muon"
    settings: ClassVar[Mapping[str, Any]] = MUON_SETTINGS

    def check(self, group: Mapping[str, Any]) -> None:
        if group["renormalize"] not in RENORMALIZE:
            raise ValueError(f"renormalize={group['renormalize']!r}: use one of {RENORMALIZE}")
        if group["independent_decay"] and not float(group["weight_decay"]) < 1:
            raise ValueError(
                f"weight_decay={group['weight_decay']} with independent_decay=True is the fraction "
                "of the weights that one step takes away: it must be below 1 (1e-5, say)"
            )
        given = group["ns_coefficients"]
        if int(group["ns_steps"]) != _NS_STEPS and not _is_single_row(given):
            raise ValueError(
                f"ns_steps={group['ns_steps']} is how often a single row of coefficients is used, "
                f"and ns_coefficients={given!r} is no such row: its number of steps is its own. "
                "Leave ns_steps out, or give one row ns_coefficients=(a, b, c)"
            )

    def before(self, pieces: Pieces) -> list[Tensor]:
        momenta = pieces.state("momentum_buffer")
        return momentum_direction(pieces.gradients(momenta), momenta, pieces.group)

    def on_owner(
        self, run: Run, indices: Sequence[int], batch: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        updates = orthogonalized_(batch, group)
        renormalize_(updates, group["renormalize"])
        return updates

    def after(self, pieces: Pieces, updates: Sequence[Tensor]) -> None:
        update_weights(pieces, updates)


def early_direction(pieces: Pieces) -> list[Tensor]:
    """What ``Muon.before`` will return; the momenta stay as they are."""
    momenta = pieces.state("momentum_buffer")
    return momentum_direction(pieces.gradients(momenta), momenta, pieces.group, keep=True)


def momentum_direction(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    group: Mapping[str, Any],
    *,
    keep: bool = False,
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
        keep: Leave the momenta as they are.
    """
    if not momenta:
        return []
    mu = float(group["momentum"])
    cast = [g.to(m.dtype) for g, m in zip(gradients, momenta, strict=True)]
    scaled = torch._foreach_mul(cast, 1 - mu)
    if keep:
        updated = list(torch._foreach_mul(list(momenta), mu))
    else:
        updated = list(momenta)
        torch._foreach_mul_(updated, mu)
    torch._foreach_add_(updated, scaled)
    if not group["nesterov"]:
        return updated
    directions = torch._foreach_mul(updated, mu)
    torch._foreach_add_(directions, scaled)
    return list(directions)


def update_weights(pieces: Pieces, updates: Sequence[Tensor]) -> None:
    """Weight decay and update of this rank's pieces, rounded as the group asks."""
    group = pieces.group
    weights = pieces.weights()
    full = [w if w.dtype in (torch.float32, torch.float64) else w.float() for w in weights]
    by_scale: dict[float, list[int]] = {}
    for position, scale in enumerate(pieces.scales()):
        by_scale.setdefault(scale, []).append(position)
    for scale, positions in by_scale.items():
        decay, rate = decay_and_rate(group, scale)
        apply_update(
            [full[p] for p in positions],
            [updates[p] for p in positions],
            rate=rate,
            decay=decay,
            cautious=bool(group["cautious"]),
        )
    pieces.write(weights, full)


def decay_and_rate(group: Mapping[str, Any], scale: float) -> tuple[float, float]:
    """What ``apply_update`` takes, for matrices whose shape scales the learning rate so."""
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    return decay if group["independent_decay"] else lr * decay, lr * scale


def apply_update(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    rate: float,
    decay: float,
    cautious: bool,
) -> None:
    """``w <- (1 - decay) w - rate u``, in place, in the weights' dtype.

    Args:
        weights: fp32 or fp64 pieces.
        updates: Orthogonalized pieces of the same shapes, any float dtype.
        rate: Learning rate times the factor for the shape: spectral norm of the change.
        decay: Fraction of the weights that decays.
        cautious: Decay only where the update moves a weight towards zero too (arXiv 2510.12402).
    """
    changes = torch._foreach_mul(
        [u.to(w.dtype) for u, w in zip(updates, weights, strict=True)], rate
    )
    if decay and cautious:
        shrinks = [(c * w > 0) for c, w in zip(changes, weights, strict=True)]
        for weight, shrink in zip(weights, shrinks, strict=True):
            weight.sub_(weight * shrink * decay)
    elif decay:
        torch._foreach_mul_(list(weights), 1 - decay)
    torch._foreach_sub_(list(weights), changes)


def resolve_ns_coefficients(group: Mapping[str, Any]) -> Coefficients | None:
    """The group's coefficients as an object; None for the method's own."""
    given = group["ns_coefficients"]
    if given is None:
        return None
    if _is_single_row(given):
        given = [given] * int(group["ns_steps"])
    return resolve_coefficients(given, POLAR_EXPRESS)


def _is_single_row(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(v, int | float) for v in given)


def orthogonalized_(batch: Tensor, group: Mapping[str, Any]) -> Tensor:
    """``orthogonalize_batch``, of equilibrated matrices if the group asks; may change the batch."""
    if group["equilibrate"]:
        equilibrate_(batch)
    return orthogonalize_batch(batch, group)


def orthogonalize_batch(batch: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Orthogonalize a ``(batch, rows, cols)`` stack as a parameter group asks."""
    return orthogonalize(
        batch,
        method=group["method"],
        coefficients=resolve_ns_coefficients(group),
        dtype=group["ns_dtype"],
        backend=group["backend"],
    )


__all__ = [
    "MUON_SETTINGS",
    "Muon",
    "apply_update",
    "decay_and_rate",
    "early_direction",
    "momentum_direction",
    "orthogonalize_batch",
    "orthogonalized_",
    "update_weights",
]
