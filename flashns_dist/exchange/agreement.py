"""What the ranks of a group must agree on before anything changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def check_same_setup(
    entries: Sequence[tuple[str, str]], digest: str, group: dist.ProcessGroup | None
) -> None:
    """Compare the parameters and the plan across a group.

    Collectives: one ``all_gather_object`` on ``group`` (two where the ranks disagree).

    Args:
        entries: (name, digest) of each parameter of the group, in order.
        digest: Digest of the plan.
        group: The process group; None means a single process, and nothing is compared.

    Raises:
        RuntimeError: On every rank: names the ranks that disagree with rank 0 of the group and the
            first parameter that differs.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    size = dist.get_world_size(group)
    digests: list[str] = [""] * size
    text = repr((digest, [tuple(entry) for entry in entries]))
    mine = hashlib.sha256(text.encode()).hexdigest()[:16]
    dist.all_gather_object(digests, mine, group=group)
    if len(set(digests)) == 1:
        return
    everyone: list[list[tuple[str, str]]] = [[]] * size
    dist.all_gather_object(everyone, list(entries), group=group)
    ranks = dist.get_process_group_ranks(group)
    differing = [ranks[i] for i in range(size) if digests[i] != digests[0]]
    raise RuntimeError(
        f"ranks {differing} disagree with rank {ranks[0]} about the parameters to optimize: "
        f"{_first_difference(everyone, ranks)}. Pass the same parameters, in the same order and "
        "with the same settings, to the optimizer on every rank."
    )


def _first_difference(everyone: list[list[tuple[str, str]]], ranks: list[int]) -> str:
    reference = everyone[0]
    best: tuple[int, str] | None = None
    for rank, entries in zip(ranks[1:], everyone[1:], strict=True):
        for position in range(max(len(reference), len(entries))):
            ours = reference[position] if position < len(reference) else ("no parameter", "")
            theirs = entries[position] if position < len(entries) else ("no parameter", "")
            if ours != theirs and (best is None or position < best[0]):
                same = ours[0] == theirs[0]
                what = (
                    f"{ours[0]!r} has another shape, dtype, placement or setting on rank {rank}"
                    if same
                    else f"{ours[0]!r} on rank {ranks[0]} and {theirs[0]!r} on rank {rank}"
                )
                best = (position, f"the first difference is parameter {position}: {what}")
    return best[1] if best else "the parameters are equal, but the plans are not"


def agree_on_largest(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise largest value over the group, on the CPU.

    Collectives: one ``all_reduce`` on ``group``. Waits for the device once.
    """
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values.cpu()


def gather_flags(flags: Sequence[bool], group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Every rank's flags: bool ``(group_size, num_flags)`` on the CPU.

    Collectives: one ``all_gather`` on ``group``.
    """
    mine = torch.tensor(flags, dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).bool().cpu()


def explain_on_every_rank(
    message: str | None, group: dist.ProcessGroup | None
) -> list[tuple[int, str]]:
    """The messages of all ranks that have one, as (global rank, message).

    For errors that one rank sees and all raise. Collectives: one ``all_gather_object``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return [(0, message)] if message else []
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, message, group=group)
    ranks = dist.get_process_group_ranks(group)
    return [(rank, text) for rank, text in zip(ranks, found, strict=True) if text]
