"""Which parameters have gradients, and whether all are finite: agreed before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flashns_dist.exchange import agree_on_largest, explain_on_every_rank, gather_flags
from flashns_dist.layout import Layout
from flashns_dist.optim.binding import BoundParameter

_HAS, _LACKS, _NONFINITE, _LARGEST, _MINUS_LARGEST = range(5)


@dataclass(frozen=True)
class Agreement:
    """What all ranks of one process group know before a step.

    Attributes:
        active: For each parameter, whether some rank has a gradient of it: then all ranks update
            it, and a shard without a gradient counts as zero.
        nonfinite: Names of the parameters with a NaN or an infinity in their gradient.
    """

    active: tuple[bool, ...]
    nonfinite: tuple[str, ...]


def agree_on_gradients(
    bound: Sequence[BoundParameter], gradients: Sequence[Tensor | None], problem: str | None
) -> Agreement:
    """Compare the gradients of one process group's parameters across its ranks.

    Collectives: one ``all_reduce`` of ``5 (len(bound) + 1)`` numbers on the process group; more
    only where the ranks differ. Waits for the device once.

    Args:
        bound: The parameters of one process group, the same on every rank.
        gradients: This rank's parts, None where it has no gradient.
        problem: An error that this rank has already found; then all ranks raise.

    Raises:
        RuntimeError: Replicas disagree about a gradient, or another rank has a problem.
        ValueError: ``problem``, on the ranks that have one.
    """
    group = bound[0].process_group
    device = bound[0].local(bound[0].storage).device
    largest = largest_magnitudes(gradients, device)
    replicated = torch.tensor([b.is_replicated for b in bound], device=device)
    has = torch.tensor([g is not None for g in gradients], device=device)
    values = torch.zeros(5, len(bound) + 1, dtype=torch.float64, device=device)
    values[_HAS, :-1] = has.double()
    values[_LACKS, :-1] = (~has).double()
    values[_NONFINITE, :-1] = (~largest.isfinite()).double()
    shown = torch.where(replicated & largest.isfinite(), largest, 0.0)
    values[_LARGEST, :-1] = shown
    values[_MINUS_LARGEST, :-1] = -shown
    values[_HAS, -1] = float(problem is not None)
    agreed = agree_on_largest(values, group)
    if agreed[_HAS, -1]:
        _raise_problem(problem, group)
    active = tuple(bool(flag) for flag in agreed[_HAS, :-1])
    nonfinite = agreed[_NONFINITE, :-1].bool()
    disputed = [
        i for i in range(len(bound)) if active[i] and agreed[_LACKS, i] and group is not None
    ]
    if disputed:
        _check_replicas_have(bound, disputed, gradients, group, device)
    if not nonfinite.any():
        _check_replicas_equal(bound, agreed)
    return Agreement(active, tuple(b.name for b, bad in zip(bound, nonfinite, strict=True) if bad))


def largest_magnitudes(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Largest absolute value of each gradient, float64 ``(len(gradients),)``; 0 where none."""
    result = torch.zeros(len(gradients), dtype=torch.float64, device=device)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, grad in enumerate(gradients):
        if grad is not None and grad.numel():
            by_dtype.setdefault(grad.dtype, []).append(index)
    for indices in by_dtype.values():
        chosen = [grad for i in indices if (grad := gradients[i]) is not None]
        norms = torch._foreach_norm(chosen, ord=float("inf"))
        where = torch.tensor(indices, device=device)
        result[where] = torch.stack(list(norms)).double()
    return result


def _raise_problem(problem: str | None, group: dist.ProcessGroup | None) -> None:
    found = explain_on_every_rank(problem, group)
    if problem is not None:
        raise ValueError(problem)
    rank, text = found[0]
    raise RuntimeError(f"rank {rank} cannot step, so no rank does: {text}")


def _check_replicas_have(
    bound: Sequence[BoundParameter],
    disputed: Sequence[int],
    gradients: Sequence[Tensor | None],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Raise where one replica of a shard has a gradient and another has none."""
    assert group is not None
    flags = gather_flags([gradients[i] is not None for i in disputed], group, device)
    for column, index in enumerate(disputed):
        for ranks in _replica_sets(bound[index].layout):
            missing = [rank for rank in ranks if not flags[rank, column]]
            if missing and len(missing) < len(ranks):
                names = dist.get_process_group_ranks(group)
                raise RuntimeError(
                    f"{bound[index].name}: ranks {[names[r] for r in missing]} have no gradient, "
                    f"but ranks {[names[r] for r in ranks if r not in missing]} store the same "
                    "shard and have one. Reduce gradients over all replicas (DDP with "
                    "find_unused_parameters=True does) before step()."
                )


def _replica_sets(layout: Layout) -> set[tuple[int, ...]]:
    return {ranks for ranks in layout.holders.values() if len(ranks) > 1}


def _check_replicas_equal(bound: Sequence[BoundParameter], agreed: Tensor) -> None:
    """Raise where replicas hold different gradients: nobody has averaged them."""
    high, low = agreed[_LARGEST, :-1], -agreed[_MINUS_LARGEST, :-1]
    differ = (high - low) > 1e-3 * high
    for index in differ.nonzero().flatten().tolist():
        raise RuntimeError(
            f"{bound[index].name}: its gradient differs between ranks (largest magnitude "
            f"{high[index]:.6g} on one, {low[index]:.6g} on another), but as a plain tensor it "
            "counts as a replica. Wrap the model in DDP or average the gradients; for ranks that "
            "train separate models pass exchange=ExchangeOptions(replica_group=None)."
        )
