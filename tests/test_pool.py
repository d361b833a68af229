"""The pool of ranks: groups of changing size, and ranks that hang or die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from flashns_dist.testing.pool import RankError, RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(3, backend="gloo")
    yield pool
    pool.close()


def ranks_of_group() -> list[int]:
    return dist.get_process_group_ranks(dist.group.WORLD)


def sleep_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def test_groups_shrink_and_grow(pool: RankPool) -> None:
    for size in (3, 1, 2, 3):
        assert pool.run(size, ranks_of_group) == [list(range(size))] * size


def test_a_rank_that_hangs_is_told_of_with_its_calls(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 0: no answer(.|\n)*in sleep_on_rank_0"):
        pool.run(2, sleep_on_rank_0, timeout=2.0)
    assert pool.run(3, ranks_of_group)


def test_a_rank_that_dies_is_replaced(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1: died"):
        pool.run(2, die_on_rank_1)
    assert pool.run(3, ranks_of_group)


def answer_late() -> str:
    time.sleep(2)
    return "late"


class LeavesLate:
    """Keeps its rank from answering soon that it has left the group."""

    def __del__(self) -> None:
        time.sleep(2)


def leave_late() -> None:
    cycle = LeavesLate()
    cycle.itself = cycle  # type: ignore[attr-defined]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize(("first", "second"), [(ranks_of_group, answer_late), (leave_late,) * 2])
def test_answers_after_an_interruption_are_the_next_jobs(
    pool: RankPool, first: Callable[[], object], second: Callable[[], object]
) -> None:
    pool.run(2, first)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            pool.run(2, second)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert pool.run(2, ranks_of_group) == [[0, 1]] * 2
