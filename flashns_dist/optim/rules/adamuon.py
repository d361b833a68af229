"""The AdaMuon update rule: Muon, with elements scaled by their second moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import frexp, ldexp, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashns_dist.exchange import reduce_sum_
from flashns_dist.optim.pieces import Pieces
from flashns_dist.optim.rules.muon import MUON_SETTINGS, Muon, update_weights
from flashns_dist.optim.rules.rule import check_fraction, check_positive

_BITS = 30  # of a square, relative to the largest that there can be


class AdaMuon(Muon):
    """AdaMuon (arXiv 2507.11005), with norms of whole matrices whatever their sharding.

    ``O = polar(sign(m))``, ``v <- beta2 v + (1 - beta2) O^2``, ``O' = O / (sqrt(v) + eps)``, scaled
    to the Frobenius norm ``sqrt(min(rows, cols))``; the paper's root mean square of 0.2 is
    ``adjust_lr_fn="match_rms_adamw"``. The second moment is sharded as the parameter is. Sums of
    squares are of integers, so that their order does not matter.
    """

    name = "adamuon"
    settings: ClassVar[Mapping[str, Any]] = {**MUON_SETTINGS, "beta2": 0.95}
    local_states = ("momentum_buffer", "second_moment")

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check_fraction("beta2", group["beta2"])
        check_positive("eps", group["eps"])

    def before(self, pieces: Pieces) -> list[Tensor]:
        return [direction.sign() for direction in super().before(pieces)]

    def after(self, pieces: Pieces, updates: Sequence[Tensor]) -> None:
        """Collectives: one ``all_reduce`` on the process group, of a number per matrix."""
        run, beta2, eps = pieces.run, float(pieces.group["beta2"]), float(pieces.group["eps"])
        bound = run.bound[run.matrix(pieces.matrices[0]).tensor]
        # v >= (1 - beta2) O^2, so no square exceeds 1 / (1 - beta2).
        unit = ldexp(1.0, frexp(1 / (1 - beta2))[1] - _BITS)
        number = {index: i for i, index in enumerate(pieces.matrices)}
        device = bound.local(bound.storage).device
        sums = torch.zeros(len(number), dtype=torch.int64, device=device)
        scaled = []
        for (index, piece), update, moment in zip(
            pieces.held, updates, pieces.state("second_moment"), strict=True
        ):
            full = update.to(moment.dtype)
            moment.mul_(beta2).add_(full.square().mul_(1 - beta2))
            full = full / (moment.sqrt() + eps)
            scaled.append(full)
            if run.matrix(index).layout.holders[piece.fragment.box][0] == bound.group_rank:
                squares = full.square().mul_(1 / unit).to(torch.int32)
                sums[number[index]] += squares.sum(dtype=torch.int64)
        reduce_sum_(sums, bound.process_group)
        norms = (sums.double() * unit).sqrt()
        wanted = [sqrt(min(run.matrix(index).block.shape)) for index in pieces.matrices]
        factors = torch.tensor(wanted, dtype=torch.float64, device=device) / norms
        factors = torch.where(sums > 0, factors, 0.0)
        for (index, _), full in zip(pieces.held, scaled, strict=True):
            full.mul_(factors[number[index]].to(full.dtype))
        update_weights(pieces, scaled)


__all__ = ["AdaMuon"]
