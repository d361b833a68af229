"""A measured cost model: every rank plans with the same one, and one command makes it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from flashns_dist import FlashMuon
from flashns_dist.optim import calibration
from flashns_dist.optim.machine import calibrated_cost, calibration_path
from flashns_dist.plan import CostModel
from flashns_dist.testing.pool import rank_device

CPU = torch.device("cpu")


def stepped(folders: list[str]) -> tuple[int, float, list[torch.Tensor]]:
    """Body: one step with a cache folder of this rank's own."""
    rank = int(os.environ["RANK"])
    os.environ["FLASHNS_DIST_CACHE"] = folders[rank]
    try:
        device = rank_device()
        mesh = init_device_mesh(device.type, (len(folders),))
        parameters = []
        for index in range(12):
            generator = torch.Generator().manual_seed(index + 100 * rank)
            values = [torch.randn(8, 16, generator=generator).to(device) for _ in range(2)]
            weight, gradient = (DTensor.from_local(v, mesh, (Shard(0),)) for v in values)
            parameters.append(nn.Parameter(weight))
            parameters[-1].grad = gradient
        optimizer = FlashMuon(parameters, lr=0.1)
        optimizer.step()
        (cost,) = optimizer._setup._costs.values()
        (made,) = optimizer._steps.values()
        assert cost is not None
        return (
            len(made._plan.buckets),
            cost.link_bytes_per_second,
            [  # type: ignore[union-attr]
                p.detach().to_local().cpu() for p in parameters
            ],
        )
    finally:
        del os.environ["FLASHNS_DIST_CACHE"]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a cost model where a rank's cache folder is; returns the folder."""

    def write(name: str, cost: CostModel | None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("FLASHNS_DIST_CACHE", str(folder))
        if cost is not None:
            device = torch.device("cuda", 0) if torch.cuda.device_count() >= 3 else CPU
            cost.save(calibration_path(device))
        return str(folder)

    return write


def test_ranks_with_different_caches_plan_with_the_first_ranks(ranks, cached) -> None:
    """A link so slow that many buckets pay, one so fast that none do, and nothing measured."""
    slow = CostModel(link_bytes_per_second=1e3, exchange_seconds=0.05)
    fast = CostModel(link_bytes_per_second=1e15, exchange_seconds=0.05)
    mixed = ranks.run(3, stepped, [cached("a", slow), cached("b", fast), cached("c", None)])
    same = ranks.run(3, stepped, [cached("d", fast), cached("e", slow), cached("f", slow)])
    assert {(buckets, link) for buckets, link, _ in mixed} == {(mixed[0][0], 1e3)}
    assert {(buckets, link) for buckets, link, _ in same} == {(same[0][0], 1e15)}
    assert mixed[0][0] > same[0][0]
    for (_, _, one), (_, _, other) in zip(mixed, same, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_damaged_file_counts_as_none(cached) -> None:
    cached("x", CostModel())
    assert calibrated_cost(CPU) == CostModel() or torch.cuda.device_count() >= 3
    calibration_path(CPU).write_text('{"cost": ')
    with pytest.warns(UserWarning, match="is no calibration"):
        assert calibrated_cost(CPU) is None


def test_one_command_measures_and_keeps_a_model(cached, tmp_path: Path) -> None:
    cached("y", None)
    shapes = tmp_path / "shapes.json"
    shapes.write_text("[[2, 24, 16]]")
    out = tmp_path / "cost.json"
    calibration.main(
        ["--device", "cpu", "--seconds", "0.5", "--shapes", str(shapes), "--out", str(out)]
    )
    cost = CostModel.load(out)
    assert calibrated_cost(CPU) == cost
    assert (16, 24, 2) in [point[:3] for point in cost.measured]
    assert all(seconds > 0 for *_, seconds in cost.measured)
    assert cost.link_bytes_per_second == CostModel().link_bytes_per_second  # one process: no wire
    changed = {"measured", "batch_seconds", "bucket_seconds", "step_seconds"}
    kept = {name: getattr(CostModel(), name) for name in changed}
    assert replace(cost, **kept) != CostModel()  # the memory's rate is measured too


def test_latency_and_rate_of_exact_points_are_found() -> None:
    points = [(size, 1e-4 + size / 2e9) for size in (1000, 10**6, 10**8)]
    latency, rate = calibration.fit_line(points)
    assert latency == pytest.approx(1e-4)
    assert rate == pytest.approx(2e9)
