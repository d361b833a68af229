"""Which GPU a rank gets."""

import os

import pytest
import torch

from flashns_dist.testing.gpus import has_gpus, rank_gpu


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("FLASHNS_DIST_SHARE_GPUS", raising=False)
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    return monkeypatch


def test_each_rank_has_a_gpu_of_its_own(two_gpus: pytest.MonkeyPatch) -> None:
    assert [has_gpus(n) for n in (1, 2, 3)] == [True, True, False]
    assert [rank_gpu(rank).index for rank in (0, 1)] == [0, 1]
    assert "NCCL_HOSTID" not in os.environ


def test_ranks_that_share_a_gpu_are_on_different_hosts(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setenv("FLASHNS_DIST_SHARE_GPUS", "1")
    two_gpus.setenv("NCCL_HOSTID", "")  # put back afterwards
    assert has_gpus(4)
    places = []
    for rank in range(4):
        gpu = rank_gpu(rank).index
        places.append((os.environ["NCCL_HOSTID"], gpu))
    assert [gpu for _, gpu in places] == [0, 1, 0, 1]
    assert len(set(places)) == 4
    assert places[0][0] == places[1][0] != places[2][0] == places[3][0]


def test_without_gpus_nothing_is_shared(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setattr(torch.cuda, "device_count", lambda: 0)
    two_gpus.setenv("FLASHNS_DIST_SHARE_GPUS", "1")
    assert not has_gpus(1)
