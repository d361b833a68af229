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
from flashns_dist.optim.rules.scaling import renormalize_, with_norm


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
        for index, update in zip(indices, updates, strict=True):
            scale_rows_(update, run.block_state(index, "row_moment"), group)
        renormalize_(updates, group["renormalize"])
        return updates

    def end(self, run: Run, group_index: int) -> None:
        share_row_moments(run, run.matrices_of(group_index))


def scale_rows_(update: Tensor, moment: Tensor, group: Mapping[str, Any]) -> None:
    """Divide rows by the root of their second moment, which is updated; keep the norm.

    Args:
        update: ``(rows, cols)``, changed in place.
        moment: ``(rows,)``, changed in place.
        group: Parameter group: ``beta2``, ``eps``.
    """
    full = update.to(moment.dtype)
    moment.lerp_(full.square().mean(dim=1), 1 - float(group["beta2"]))
    scaled = full / (moment.sqrt() + float(group["eps"]))[:, None]
    update.copy_(with_norm(scaled, torch.linalg.vector_norm(full)))


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


__all__ = ["NorMuon", "scale_rows_", "share_row_moments"]
