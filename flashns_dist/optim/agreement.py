"""Which parameters have gradients, and whether all are finite: agreed before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from flashns_dist.exchange import (
    agree_on_largest,
    explain_on_every_rank,
    gather_flags,
    reduce_largest_,
    rounds_needed,
)
from flashns_dist.layout import Layout
from flashns_dist.optim.binding import BoundParameter

_HAS, _LACKS, _NONFINITE, _LARGEST, _MINUS_LARGEST, _IS_REPLICATED = range(6)
_ERROR, _OUTDATED, _BAD_VALUE, _FOUND_INF, _SEVERAL, _SETTINGS, _MINUS_SETTINGS = range(7)


@dataclass(frozen=True)
class Verdict:
    """What all ranks know before a step.

    Attributes:
        active: For each parameter, whether some rank has a gradient of it: then all ranks update
            it, and a shard without a gradient counts as zero.
        nonfinite: Names of the parameters known here to have a NaN or an infinity in a gradient.
        is_finite: Whether no rank has one.
        found_inf: Whether a GradScaler found an overflow on some rank.
        is_simple: Whether every rank that stores an active parameter has a gradient of it, and one
            process group, the world's, holds all parameters of all ranks.
        is_outdated: Whether some rank has other parameters now: all are to bind theirs anew, and
            to agree again.
    """

    active: tuple[bool, ...]
    nonfinite: tuple[str, ...]
    is_finite: bool
    found_inf: bool
    is_simple: bool
    is_outdated: bool


def agree_on_gradients(
    bound: Sequence[BoundParameter],
    members: Sequence[Sequence[int]],
    gradients: Sequence[Tensor | None],
    problem: str | None,
    found_inf: Tensor | None,
    settings: Settings,
    unaveraged: Collection[int] = (),
    observe: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> Verdict:
    """Compare the gradients across ranks.

    Collectives: one small ``all_reduce`` on each process group, from the smallest to the largest so
    that what one group finds reaches the others; where none spans the world, one more on each, back
    to the smallest, and so on for as many rounds as are needed; more only where ranks differ. Waits
    for the device once per process group.

    Args:
        bound: All parameters.
        members: Indices of the parameters of each process group, smallest group first.
        gradients: This rank's parts, None where it has no gradient.
        problem: An error that this rank has already found; then all ranks raise.
        found_inf: A GradScaler's flag, if there is one.
        settings: Of the parameter groups, as they are now.
        unaveraged: Indices of the parameters whose replicas may have different gradients.
        observe: Brings what a process group has agreed on, as ``can_step`` takes it, to the host.

    Raises:
        RuntimeError: Ranks disagree about a gradient or a setting, or another has a problem.
        ValueError: ``problem``, on the ranks that have one.
    """
    device = bound[0].local(bound[0].storage).device
    flags = [0.0] * 7
    flags[_ERROR] = float(problem is not None)
    flags[_OUTDATED] = float(settings.is_outdated)
    flags[_SEVERAL] = float(len(members) > 1)
    if found_inf is not None:
        flags[_FOUND_INF] = float(found_inf.max())
    error: Exception | None = None if problem is None else ValueError(problem)
    active = [False] * len(bound)
    nonfinite: list[str] = []
    is_complete = True
    for indices, number in zip(members, settings.numbers, strict=True):
        chosen = [bound[i] for i in indices]
        flags[_SETTINGS], flags[_MINUS_SETTINGS] = number, -number
        values = _summary(chosen, [gradients[i] for i in indices], flags)
        reduce_largest_(values, chosen[0].process_group)
        agreed = observe(values)
        is_complete = is_complete and not (agreed[_HAS, :-1] * agreed[_LACKS, :-1]).any()
        for index, is_active in zip(indices, agreed[_HAS].bool().tolist(), strict=False):
            active[index] = is_active
        bad = agreed[_NONFINITE, :-1].bool().tolist()
        nonfinite += [b.name for b, is_bad in zip(chosen, bad, strict=True) if is_bad]
        try:
            if not agreed[_OUTDATED, -1] and _disagree(agreed):
                settings.compare(indices)
            _check_replicas(*_compared(indices, chosen, gradients, agreed, unaveraged), device)
        except RuntimeError as found:
            error = error or found
        flags = agreed[:, -1].tolist()
        flags[_BAD_VALUE] = max(flags[_BAD_VALUE], float(bool(nonfinite)))
        flags[_ERROR] = max(flags[_ERROR], float(error is not None))
    groups = [bound[indices[0]].process_group for indices in members]
    flags = _spread(flags, groups, device, settings.rounds)
    if flags[_ERROR]:
        _raise(error, groups, several=bool(flags[_SEVERAL]))
    return Verdict(
        tuple(active),
        tuple(nonfinite),
        not flags[_BAD_VALUE],
        bool(flags[_FOUND_INF]),
        bool(is_complete) and _spans_world(groups[-1]) and not flags[_SEVERAL],
        bool(flags[_OUTDATED]),
    )


@dataclass(frozen=True)
class Settings:
    """What a rank knows of its parameter groups' settings before a step.

    Attributes:
        numbers: Of each process group's parameters: equal where their settings are.
        is_outdated: Whether groups have other parameters, or other settings that plans depend on,
            than those that were bound.
        rounds: See ``rounds_of``.
        compare: Compares the settings of a process group's parameters, by their indices, across
            its ranks. Raises RuntimeError, naming where they differ.
    """

    numbers: Sequence[float]
    is_outdated: bool
    rounds: int
    compare: Callable[[Sequence[int]], None]


def rounds_of(groups: Sequence[dist.ProcessGroup | None]) -> int:
    """How often flags must go through the groups and back, to reach every rank.

    Collectives: none where a group spans the world, else those of ``rounds_needed``.

    Args:
        groups: This rank's, sorted by size, then by ranks.
    """
    if _spans_world(groups[-1]):
        return 1
    return rounds_needed([group for group in groups if group is not None])


def raise_together(
    groups: Sequence[dist.ProcessGroup | None],
    device: torch.device,
    error: Exception | None,
    rounds: int,
) -> None:
    """Raise on every rank if one has an error.

    Collectives: one small ``all_reduce`` on each process group, and more where none spans the
    world, or where there is an error.

    Args:
        groups: This rank's, smallest first.
        device: Of the parameters.
        error: This rank's.
        rounds: See ``rounds_of``.

    Raises:
        RuntimeError: Another rank has an error.
    """
    flags = [0.0] * 7
    flags[_ERROR], flags[_SEVERAL] = float(error is not None), float(len(groups) > 1)
    for group in groups:
        flags = _agreed(flags, group, device)
    flags = _spread(flags, groups, device, rounds)
    if flags[_ERROR]:
        _raise(error, groups, several=bool(flags[_SEVERAL]))


def _spread(
    flags: list[float],
    groups: Sequence[dist.ProcessGroup | None],
    device: torch.device,
    rounds: int,
) -> list[float]:
    """Flags that came from the smallest to the largest group, sent back, and on where they must."""
    if _spans_world(groups[-1]):
        return flags
    way = [*reversed(groups), *(rounds - 1) * [*groups, *reversed(groups)]]
    for group in way:
        flags = _agreed(flags, group, device)
    return flags


def _agreed(
    flags: list[float], group: dist.ProcessGroup | None, device: torch.device
) -> list[float]:
    values = torch.tensor(flags, dtype=torch.float64, device=device)
    return agree_on_largest(values, group).tolist()  # type: ignore[no-any-return]


def _spans_world(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == dist.get_world_size()


def can_step(agreed: Tensor, expected: Tensor) -> Tensor:
    """Whether ranks that agreed on this can step, and with the gradients that were expected.

    Where it is not, ``agree_on_gradients`` may still find that they can.

    Args:
        agreed: ``(7, parameters + 1)`` float64, of all parameters of one process group.
        expected: ``(parameters,)`` float64: 1 where every rank is to have a gradient, 0 where none.

    Returns:
        A boolean on the device of both.
    """
    facts, flags = agreed[:, :-1], agreed[:_SEVERAL, -1]
    wrong = (facts[_HAS] != expected) | (facts[_LACKS] == expected) | (facts[_NONFINITE] != 0)
    return ~((wrong | _differ(facts)).any() | flags.any() | _disagree(agreed))


def _disagree(agreed: Tensor) -> Tensor:
    """Whether ranks have different settings."""
    return agreed[_SETTINGS, -1] != -agreed[_MINUS_SETTINGS, -1]


def _differ(facts: Tensor) -> Tensor:
    """For each parameter, whether the largest entries of replicas' gradients differ."""
    return facts[_LARGEST] + facts[_MINUS_LARGEST] > 1e-3 * facts[_LARGEST]


def _compared(
    indices: Sequence[int],
    bound: Sequence[BoundParameter],
    gradients: Sequence[Tensor | None],
    agreed: Tensor,
    unaveraged: Collection[int],
) -> tuple[Sequence[BoundParameter], list[Tensor | None], Tensor]:
    """What ``_check_replicas`` takes, without the parameters whose replicas may differ."""
    if not unaveraged:
        return bound, [gradients[i] for i in indices], agreed
    kept = [column for column, index in enumerate(indices) if index not in unaveraged]
    columns = [*kept, len(indices)]
    chosen = [gradients[indices[column]] for column in kept]
    return [bound[column] for column in kept], chosen, agreed[:, columns]


def _summary(
    bound: Sequence[BoundParameter], gradients: Sequence[Tensor | None], flags: Sequence[float]
) -> Tensor:
    """``(7, len(bound) + 1)``: what to compare about each parameter, and the flags so far."""
    device = bound[0].local(bound[0].storage).device
    on_host = partial(torch.tensor, dtype=torch.float64, device="cpu")
    known = torch.zeros(7, len(bound) + 1, dtype=torch.float64, device="cpu")
    known[_HAS, :-1] = on_host([g is not None for g in gradients])
    known[_LACKS, :-1] = 1 - known[_HAS, :-1]
    known[:, -1] = on_host(flags)
    known[_IS_REPLICATED, :-1] = on_host([b.is_replicated for b in bound])
    values = known.to(device)
    largest = _largest_magnitudes(gradients, device)
    finite = largest.isfinite()
    values[_NONFINITE, :-1] = (~finite).double()
    values[_LARGEST, :-1] = torch.where(finite, largest * values[_IS_REPLICATED, :-1], 0.0)
    values[_MINUS_LARGEST, :-1] = -values[_LARGEST, :-1]
    return values


def _largest_magnitudes(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Largest absolute value of each gradient, float64 ``(len(gradients),)``; 0 where none."""
    result = torch.zeros(len(gradients), dtype=torch.float64, device=device)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for index, grad in enumerate(gradients):
        if grad is not None and grad.numel():
            by_dtype.setdefault(grad.dtype, []).append(index)
    for indices in by_dtype.values():
        chosen = [grad for i in indices if (grad := gradients[i]) is not None]
        norms = torch._foreach_norm(chosen, ord=float("inf"))
        found = torch.stack(list(norms)).double()
        if len(indices) == len(gradients):
            return found
        result[torch.tensor(indices, device=device)] = found
    return result


def _check_replicas(
    bound: Sequence[BoundParameter],
    gradients: Sequence[Tensor | None],
    agreed: Tensor,
    device: torch.device,
) -> None:
    """Raise RuntimeError where replicas differ: nobody has averaged their gradients."""
    if not bound or bound[0].process_group is None:
        return
    group = bound[0].process_group
    disputed = (agreed[_HAS, :-1] * agreed[_LACKS, :-1]).nonzero().flatten().tolist()
    if disputed:
        _check_replicas_have(bound, disputed, gradients, group, device)
    high, low = agreed[_LARGEST, :-1], -agreed[_MINUS_LARGEST, :-1]
    differ = _differ(agreed[:, :-1]).nonzero().flatten().tolist()
    if differ and not agreed[_NONFINITE, :-1].any():
        index = differ[0]
        raise RuntimeError(
            f"{bound[index].name}: its gradient differs between ranks (largest magnitude "
            f"{high[index]:.6g} on one, {low[index]:.6g} on another), but as a plain tensor it "
            "counts as a replica. Wrap the model in DDP or average the gradients; for ranks that "
            "train separate models pass exchange=ExchangeOptions(replica_group=None)."
        )


def _check_replicas_have(
    bound: Sequence[BoundParameter],
    disputed: Sequence[int],
    gradients: Sequence[Tensor | None],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Raise where one replica of a shard has a gradient and another has none."""
    flags = gather_flags([gradients[i] is not None for i in disputed], group, device)
    names = dist.get_process_group_ranks(group)
    for column, index in enumerate(disputed):
        for ranks in _replica_sets(bound[index].layout):
            missing = [rank for rank in ranks if not flags[rank, column]]
            if missing and len(missing) < len(ranks):
                raise RuntimeError(
                    f"{bound[index].name}: ranks {[names[r] for r in missing]} have no gradient, "
                    f"but ranks {[names[r] for r in ranks if r not in missing]} store the same "
                    "shard and have one. Reduce gradients over all replicas (DDP with "
                    "find_unused_parameters=True does) before step()."
                )


def _replica_sets(layout: Layout) -> list[tuple[int, ...]]:
    return sorted({ranks for ranks in layout.holders.values() if len(ranks) > 1})


def _raise(
    error: Exception | None, groups: Sequence[dist.ProcessGroup | None], *, several: bool
) -> None:
    """Raise on every rank; where it can, with the message of the rank that has one."""
    # Of a group that not all of its ranks take for their largest, some would not come.
    group = groups[-1] if _spans_world(groups[-1]) or not several else None
    found = explain_on_every_rank(None if error is None else str(error), group)
    if error is not None:
        raise error
    if found:
        rank, text = found[0]
        raise RuntimeError(f"rank {rank} cannot step, so no rank does: {text}")
    raise RuntimeError(
        "a rank of another process group cannot step, so no rank does: see its error"
    )
