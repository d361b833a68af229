"""Shared fixtures: one pool of ranks for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashns_dist.testing.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()
