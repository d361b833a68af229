"""Make the tests' own modules importable, in the ranks too; ranks on the CPU for Megatron."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashns_dist.testing.pool import RankPool

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="session")
def cpu_ranks() -> Iterator[RankPool]:
    pool = RankPool(4, backend="gloo")
    yield pool
    pool.close()


@pytest.fixture
def ranks(request: pytest.FixtureRequest, ranks: RankPool) -> RankPool:
    """The tests of Megatron keep it from using CUDA, wherever they run."""
    if "megatron" not in request.module.__name__:
        return ranks
    found: RankPool = request.getfixturevalue("cpu_ranks")
    return found
