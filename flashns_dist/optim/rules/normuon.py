"""The NorMuon update rule: Muon, with rows scaled by their second moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashns_dist.exchange import reduce_largest_
from flashns_dist.layout import Block
from flashns_dist.optim.pieces import Run
from flashns_dist.optim.rules.muon import MUON_SETTINGS, Muon, orthogonalized_
from flashns_dist.optim.rules.rule import check_fraction, check_positive
from flashns_dist.optim.rules.scaling import (
    chunks,
    fold_sum_,
    nonzero,
    renormalize_,
    square_sums,
)


class NorMuon(Muon):
    """NorMuon (arXiv 2510.05491), with norms of whole matrices whatever their sharding.

    ``v <- beta2 v + (1 - beta2) mean_cols(O^2)``, ``O' = O / (sqrt(v) + eps)``, scaled to the
    Frobenius norm of ``O``. The second moments ``row_moment`` are a state by block.
    """

    name = "normuon"
    settings: ClassVar[Mapping[str, Any]] = {**MUON_SETTINGS, "beta2": 0.95}

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        check_fraction("beta2", group["beta2"])
        check_positive("eps", group["eps"])

    def block_states(self, group: Mapping[str, Any], block: Block) -> dict[str, int]:
        return {"row_moment": block.rows}

    def kind(self, group: Mapping[str, Any]) -> str:
        return f"{super().kind(group)}:{group['eps']}"

    def on_owner(
        self, run: Run, indices: Sequence[int], batch: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        updates = orthogonalized_(batch, group)
        moments = [run.block_state(index, "row_moment") for index in indices]
        dtype = moment_dtype(updates)
        stacked = torch.stack([moment.to(dtype) for moment in moments])
        scale_rows_(updates, stacked, group)
        torch._foreach_copy_(moments, list(stacked.unbind()))
        renormalize_(updates, group["renormalize"])
        return updates

    def end(self, run: Run, group_index: int) -> None:
        share_row_moments(run, run.matrices_of(group_index))


def scale_rows_(updates: Tensor, moments: Tensor, group: Mapping[str, Any]) -> None:
    """Divide rows by the root of their second moment, which is updated; keep each matrix's norm.

    Args:
        updates: ``(batch, rows, cols)``, changed in place.
        moments: ``(batch, rows)`` in ``moment_dtype(updates)``, changed in place.
        group: Parameter group: ``beta2``, ``eps``.
    """
    beta2, parts = float(group["beta2"]), chunks(updates)
    for part, moment in zip(parts, moments[..., None].split(len(parts[0])), strict=True):
        sums = square_sums(part, 2)
        moment.mul_(beta2).add_(sums * ((1 - beta2) / part.shape[2]))
        divisors = moment.sqrt().add_(float(group["eps"]))
        scaled_sums = sums.sqrt().div_(divisors).square_()
        norms = fold_sum_(torch.cat([sums, scaled_sums], dim=2), 1).sqrt_()
        kept = norms[..., :1] / nonzero(norms[..., 1:])
        part.copy_((part / divisors).mul_(kept))


def moment_dtype(updates: Tensor) -> torch.dtype:
    """In which row moments are computed: not their own dtype, of which a batch may have several."""
    return torch.promote_types(updates.dtype, torch.float32)


def share_row_moments(run: Run, indices: Sequence[int]) -> None:
    """Give every rank the second moments that the owners have computed.

    Moments are not negative, so the largest of the owner's value and zeros is the owner's.
    Collectives: one ``all_reduce`` on the process group, of a number per row.
    """
    bound = run.bound[run.matrix(indices[0]).tensor]
    if bound.layout.group_size == 1:
        return
    moments = [run.block_state(index, "row_moment") for index in indices]
    owned = [bound.group_rank in run.plan.owners[index] for index in indices]
    values = torch.cat(
        [m if is_owned else torch.zeros_like(m) for m, is_owned in zip(moments, owned, strict=True)]
    )
    reduce_largest_(values, bound.process_group)
    torch._foreach_copy_(moments, list(values.split([m.numel() for m in moments])))


__all__ = ["NorMuon", "moment_dtype", "scale_rows_", "share_row_moments"]
