"""What ranks compare before anything changes, on real process groups."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from flashns_dist.exchange import (
    agree_on_largest,
    check_same_setup,
    explain_on_every_rank,
    gather_flags,
)
from flashns_dist.testing.pool import RankPool, rank_device

Entries = list[tuple[str, str]]
BASE: Entries = [("wq", "a"), ("wk", "b"), ("wo", "c")]


def setup_error(everyone: list[tuple[Entries, str]], members: tuple[int, ...]) -> str | None:
    """What ``check_same_setup`` raises on this rank, in a group of some ranks."""
    group = dist.new_group(list(members))
    if dist.get_rank() not in members:
        return None
    entries, digest = everyone[dist.get_rank()]
    try:
        check_same_setup(entries, digest, group)
    except RuntimeError as error:
        return str(error)
    return None


def errors(
    ranks: RankPool, everyone: list[tuple[Entries, str]], members: tuple[int, ...] | None = None
) -> list[str | None]:
    size = len(everyone)
    return ranks.run(size, setup_error, everyone, members or tuple(range(size)))


def test_equal_setups_pass(ranks: RankPool) -> None:
    assert errors(ranks, [(BASE, "plan")] * 3) == [None] * 3
    assert errors(ranks, [([], "none")] * 2) == [None] * 2


CASES: dict[str, tuple[list[tuple[Entries, str]], str, str]] = {
    "other setting": (
        [(BASE, "p"), (BASE, "p"), ([BASE[0], ("wk", "x"), BASE[2]], "q")],
        "ranks [2] disagree with rank 0",
        "parameter 1: 'wk' has another shape, dtype, placement or setting on rank 2",
    ),
    "other setting, same plan": (
        [(BASE, "p"), (BASE, "p"), ([BASE[0], ("wk", "x"), BASE[2]], "p")],
        "ranks [2] disagree with rank 0",
        "parameter 1: 'wk' has another shape, dtype, placement or setting on rank 2",
    ),
    "other order": (
        [(BASE, "p"), ([BASE[0], BASE[2], BASE[1]], "q"), (BASE, "p")],
        "ranks [1] disagree with rank 0",
        "parameter 1: 'wk' on rank 0 and 'wo' on rank 1",
    ),
    "one parameter less": (
        [(BASE, "p"), (BASE[:2], "q")],
        "ranks [1] disagree with rank 0",
        "parameter 2: 'wo' on rank 0 and 'no parameter' on rank 1",
    ),
    "one parameter more": (
        [(BASE, "p"), ([*BASE, ("extra", "d")], "q")],
        "ranks [1] disagree with rank 0",
        "parameter 3: 'no parameter' on rank 0 and 'extra' on rank 1",
    ),
    "none on one rank": (
        [(BASE, "p"), ([], "none")],
        "ranks [1] disagree with rank 0",
        "parameter 0: 'wq' on rank 0 and 'no parameter' on rank 1",
    ),
    "rank 0 is the odd one": (
        [([("xx", "a"), *BASE[1:]], "q"), (BASE, "p"), (BASE, "p")],
        "ranks [1, 2] disagree with rank 0",
        "parameter 0: 'xx' on rank 0 and 'wq' on rank 1",
    ),
    "the first of several differences": (
        [(BASE, "p"), ([*BASE[:2], ("late", "c")], "q"), ([("early", "a"), *BASE[1:]], "r")],
        "ranks [1, 2] disagree with rank 0",
        "parameter 0: 'wq' on rank 0 and 'early' on rank 2",
    ),
    "only the plan": (
        [(BASE, "p"), (BASE, "q")],
        "ranks [1] disagree with rank 0",
        "the parameters are equal, but the plans are not",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_rank_learns_the_first_difference(ranks: RankPool, case: str) -> None:
    everyone, who, what = CASES[case]
    found = errors(ranks, everyone)
    assert found[0] is not None
    assert who in found[0]
    assert what in found[0]
    assert set(found) == {found[0]}, "every rank raises the same"


def test_ranks_of_a_subgroup_are_named_globally(ranks: RankPool) -> None:
    everyone = [([], "other"), (BASE, "p"), ([], "other"), (BASE[::-1], "q")]
    found = errors(ranks, everyone, members=(1, 3))
    assert found[0] is None
    assert found[2] is None
    assert found[1] is not None
    assert found[1] == found[3]
    assert "ranks [3] disagree with rank 1" in found[1]
    assert "'wq' on rank 1 and 'wo' on rank 3" in found[1]


def test_one_process_has_nothing_to_compare() -> None:
    check_same_setup(BASE, "plan", None)
    assert explain_on_every_rank("a problem", None) == [(0, "a problem")]
    assert explain_on_every_rank(None, None) == []
    assert agree_on_largest(torch.tensor([1.0, 2.0]), None).tolist() == [1.0, 2.0]


def largest() -> list[float]:
    rank = dist.get_rank()
    values = torch.tensor([float(rank), -float(rank), float("-inf")], dtype=torch.float64)
    agreed = agree_on_largest(values.to(rank_device()), dist.group.WORLD)
    assert agreed.device.type == "cpu"
    return agreed.tolist()


def test_the_largest_value_is_found_elementwise(ranks: RankPool) -> None:
    assert ranks.run(3, largest) == [[2.0, 0.0, float("-inf")]] * 3


def flags() -> list[list[bool]]:
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    mine = [rank == 0, rank == 2, True]
    return gather_flags(mine, dist.group.WORLD, rank_device()).tolist()


def test_flags_are_gathered_in_the_order_of_the_ranks(ranks: RankPool) -> None:
    expected = [[True, False, True], [False, False, True], [False, True, True]]
    assert ranks.run(3, flags) == [expected] * 3


def explanations(members: tuple[int, ...]) -> list[tuple[int, str]] | None:
    group = dist.new_group(list(members))
    if dist.get_rank() not in members:
        return None
    rank = dist.get_rank()
    return explain_on_every_rank(f"problem {rank}" if rank % 2 else None, group)


def test_messages_come_with_the_global_rank(ranks: RankPool) -> None:
    expected = [(1, "problem 1"), (3, "problem 3")]
    assert ranks.run(4, explanations, (1, 2, 3)) == [None, expected, expected, expected]
    assert ranks.run(4, explanations, (0, 2)) == [[], None, [], None]
