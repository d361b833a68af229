"""How many rounds flags need, against what ranks would hear one by one."""

import random

import pytest
import torch.distributed as dist

from flashns_dist.exchange.rounds import rounds_needed, simulated_rounds
from flashns_dist.testing.pool import RankPool


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([(0, 1)], 1),
        ([(0, 1), (2, 3), (0, 2), (1, 3)], 1),  # a mesh
        ([(0, 1), (1, 2), (2, 3)], 1),
        ([(0, 1), (0, 3), (1, 2)], 2),
        ([(0, 1), (0, 2), (1, 3), (2, 4), (3, 5)], 2),
        ([(2, 3), (0, 2), (1, 3), (0, 5), (1, 4)], 3),
    ],
)
def test_rounds_of_known_groups(groups, expected):
    assert simulated_rounds(groups) == expected


def compare_rounds(seed: int) -> tuple[int, int]:
    """What the ranks find out together, and what follows from all groups."""
    generator = random.Random(seed)
    size, rank = dist.get_world_size(), dist.get_rank()
    pairs = [(a, b) for a in range(size) for b in range(a + 1, size)]
    tree = [(generator.randrange(i), i) for i in range(1, size)]
    chosen = sorted({*tree, *generator.sample(pairs, 1)})
    made = {pair: dist.new_group(list(pair)) for pair in chosen}
    mine = [made[pair] for pair in chosen if rank in pair]
    found = rounds_needed(mine)
    return found, simulated_rounds(chosen)


@pytest.mark.parametrize("seed", range(4))
def test_all_ranks_find_the_same_number(ranks: RankPool, seed: int) -> None:
    answers = ranks.run(4, compare_rounds, seed)
    assert len(set(answers)) == 1
    assert all(found == expected for found, expected in answers)
