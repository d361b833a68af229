"""What the cost model says of measured shapes, and the timeline of a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.tensor import Shard

from flashns_dist.layout import leading_blocks, placements_layout
from flashns_dist.plan import CostModel, Matrix, Stages, make_plan, plan_stages, step_seconds

MEASURED = CostModel(
    measured=(
        (1024, 1024, 4, 4e-3),
        (1024, 1024, 16, 8e-3),
        (1024, 4096, 16, 32e-3),
        (2048, 2048, 16, 64e-3),
    )
)


def test_measured_shapes_take_what_was_measured() -> None:
    assert MEASURED.orthogonalize_batch_seconds(1024, 4096, 16) == pytest.approx(32e-3)
    assert MEASURED.orthogonalize_batch_seconds(4096, 1024, 16) == pytest.approx(32e-3)
    assert MEASURED.orthogonalize_seconds(1024, 1024) == pytest.approx(8e-3 / 16)


def test_other_batches_lie_between_or_beyond_the_measured_ones() -> None:
    def of(batch: int) -> float:
        return MEASURED.orthogonalize_batch_seconds(1024, 1024, batch)

    assert of(10) == pytest.approx(6e-3)
    assert of(32) == pytest.approx(16e-3)
    assert of(1) == pytest.approx(4e-3)  # a device that is not full is no faster with less


def test_other_shapes_follow_the_formula_and_their_neighbours() -> None:
    """Measured at twice what the formula says everywhere: so are the shapes between."""
    plain = CostModel()
    slow = replace(
        plain,
        measured=tuple(
            (n, m, 8, 16 * plain.orthogonalize_seconds(n, m))
            for n, m in ((512, 512), (1024, 4096), (2048, 2048), (4096, 8192))
        ),
    )
    for shape in ((700, 900), (1024, 2048), (3000, 8192)):
        twice = 2 * plain.orthogonalize_seconds(*shape)
        assert slow.orthogonalize_seconds(*shape) == pytest.approx(twice)
        assert slow.orthogonalize_batch_seconds(*shape, 3) == pytest.approx(8 * twice)


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    MEASURED.save(tmp_path / "folder" / "cost.json", ranks=4)
    assert CostModel.load(tmp_path / "folder" / "cost.json") == MEASURED


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"cost": {"flops_per_second": null}}', '{"cost": {"no_such_field": 1}}', "{"],
)
def test_what_is_no_cost_model_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(content)
    with pytest.raises(ValueError):
        CostModel.load(path)


FREE = CostModel(step_seconds=0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flops_per_second": 0.0}, "flops_per_second=0.0 of a cost model must be positive"),
        ({"link_bytes_per_second": float("nan")}, "link_bytes_per_second=nan"),
        ({"memory_bytes_per_second": None}, "memory_bytes_per_second=None"),
        ({"matrix_seconds": -1e-6}, "matrix_seconds=-1e-06 .* finite and not negative"),
        ({"measured": ((64, 64, 0, 1.0),)}, r"measured has \(64, 64, 0, 1.0\)"),
        ({"measured": ((64, 64, 1),)}, r"measured has \(64, 64, 1\)"),
    ],
)
def test_numbers_that_cannot_be_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostModel(**values)


def test_one_bucket_does_one_thing_after_the_other() -> None:
    assert step_seconds([Stages(1.0, 2.0, 4.0, 8.0, 16.0, 0.0)], FREE, 3) == pytest.approx(31.0)


def test_the_wire_is_hidden_but_for_the_first_gather_and_the_last_scatter() -> None:
    stages = [Stages(0.0, 1.0, 10.0, 1.0, 0.0, 0.0)] * 5
    assert step_seconds(stages, FREE, 3) == pytest.approx(52.0)


def test_fewer_buckets_under_way_hide_less_of_the_wire() -> None:
    stages = [Stages(0.0, 1.0, 10.0, 1.0, 0.0, 0.0)] * 5
    assert step_seconds(stages, FREE, 2) == pytest.approx(1 + 5 * 11)  # gathers, but for the first
    assert step_seconds(stages, FREE, 1) == pytest.approx(5 * 12)
    assert step_seconds(stages[:1], FREE, 1) == step_seconds(stages[:1], FREE, 3)


def test_a_slow_wire_hides_the_computation() -> None:
    stages = [Stages(0.0, 10.0, 1.0, 10.0, 0.0, 0.0)] * 5
    assert step_seconds(stages, FREE, 3) == pytest.approx(100.0)


def test_a_slow_host_is_what_a_step_waits_for() -> None:
    stages = [Stages(0.0, 1.0, 1.0, 1.0, 0.0, 50.0)] * 2
    assert step_seconds(stages, replace(FREE, step_seconds=3.0), 3) == pytest.approx(103.0)


def test_a_plan_counts_its_passes_copies_and_launches() -> None:
    """Four equal matrices on two ranks, one bucket: everything by hand."""
    layout = placements_layout((64, 32), (Shard(0),), (2,))
    matrices = [Matrix(str(i), i, layout, leading_blocks((64, 32))[0]) for i in range(4)]
    cost = CostModel(
        measured=((32, 64, 2, 0.5),),
        memory_bytes_per_second=1e3,
        before_bytes=3.0,
        after_bytes=5.0,
        copy_bytes=7.0,
        link_bytes_per_second=1e3,
        exchange_seconds=100.0,
        batch_seconds=0.25,
        bucket_seconds=0.125,
        step_seconds=9.0,
    )
    plan = make_plan(matrices, 2, cost=cost)
    (stage,) = plan_stages(plan, cost)
    stored = owned = 2 * 64 * 32
    assert stage.before == pytest.approx(3 * stored / 1e3)
    assert stage.after == pytest.approx(5 * stored / 1e3)
    assert stage.owner == pytest.approx(0.5 + 7 * owned / 1e3)
    assert stage.gather == stage.scatter == pytest.approx(100.0 + 2 * (stored / 2) / 1e3)
    assert stage.host == pytest.approx(0.25 + 0.125)
    assert plan.prediction.step_seconds == pytest.approx(step_seconds([stage], cost, plan.depth))
    assert plan.prediction.step_seconds > 9.0
