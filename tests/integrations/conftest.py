"""Ranks on the CPU for Megatron."""

from collections.abc import Iterator

import pytest

from flashns_dist.testing.pool import RankPool


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
