"""Shared fixtures: one pool of ranks for the whole session.

The tests' own modules and `launch`, which is not installed, are importable, in the ranks too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashns_dist.testing.pool import RankPool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()
