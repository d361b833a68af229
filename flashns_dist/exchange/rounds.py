"""How often ranks must pass on what they know, where process groups overlap."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.distributed as dist

Ranks = tuple[int, ...]


def rounds_needed(groups: Sequence[dist.ProcessGroup]) -> int:
    """In how many rounds every rank has heard from all that it shares groups with, also indirectly.

    In a round each rank goes through its groups in their order and back, and the ranks of a group
    tell each other all that they have heard. The same on all of these ranks.

    Collectives: two ``all_gather_object`` on each group in each of these rounds.

    Args:
        groups: This rank's, sorted by size, then by ranks.
    """
    known = {tuple(dist.get_process_group_ranks(group)) for group in groups}
    heard = {dist.get_rank()}
    done, needed = 0, None
    while needed is None or done < needed:
        for group in (*groups, *reversed(groups)):
            answers: list[tuple[set[int], set[Ranks]]] = [(set(), set())] * group.size()
            dist.all_gather_object(answers, (heard, known), group=group)
            heard = set().union(*(ranks for ranks, _ in answers))
            known = set().union(*(found for _, found in answers))
        done += 1
        # All groups are known as soon as nobody is known who has not been heard from; how long that
        # takes the others can then be computed.
        if needed is None and heard.issuperset(rank for ranks in known for rank in ranks):
            needed = simulated_rounds(known)
    return needed


def simulated_rounds(groups: Collection[Ranks]) -> int:
    """The same from all groups, of ranks that are connected by them."""
    order = sorted(groups, key=lambda ranks: (len(ranks), ranks))
    everyone = sorted({rank for ranks in order for rank in ranks})
    heard = {rank: 1 << position for position, rank in enumerate(everyone)}
    all_of_them = (1 << len(everyone)) - 1
    rounds = 0
    while any(found != all_of_them for found in heard.values()):
        for ranks in (*order, *reversed(order)):
            together = 0
            for rank in ranks:
                together |= heard[rank]
            heard.update(dict.fromkeys(ranks, together))
        rounds += 1
    return max(rounds, 1)


__all__ = ["rounds_needed", "simulated_rounds"]
