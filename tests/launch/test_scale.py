"""Plans on paper: the lines hold what follows from the shapes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashns_dist.plan import CostModel
from launch.bench import scale


def test_lines_count_bytes_and_ranks(tmp_path: Path) -> None:
    page, calibration = tmp_path / "page.md", tmp_path / "calibration.json"
    CostModel(memory_bytes_per_second=1e9, batch_seconds=1.0).save(calibration)
    page.write_text(f"before\n{scale.MARK}\nold\n{scale.MARK}\nafter\n")
    scale.main(
        [
            *("--models", "tiny,tiny-experts", "--ranks", "2,16"),
            *("--cost", str(calibration), scale.DEFAULTS),
            *("--out", str(tmp_path), "--page", str(page)),
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "scale.jsonl").read_text().splitlines()]
    assert [line["cost"] for line in lines] == ["calibration.json", "defaults"] * 4
    for slow, fast in zip(lines[::2], lines[1::2], strict=True):
        assert slow["step_seconds"] > 1 > fast["step_seconds"]  # one batch's launches
        assert slow["sent_bytes"] == fast["sent_bytes"]
    dense, _, whole, rows = lines[1::2]
    # Of its half of every matrix, a rank sends half to the other, and as many results; bf16.
    assert dense["sent_bytes"] == pytest.approx(dense["elements"], rel=0.2)
    assert dense["balance"] >= 1
    assert whole["sent_bytes"] == 0  # eight experts on two ranks
    assert rows["ranks"] == 16
    assert rows["sent_bytes"] > 0  # two ranks share an expert
    bytes_moved = 28 * whole["elements"] / 2
    assert whole["adamw_seconds"] == pytest.approx(bytes_moved / scale.ADAMW_RATE)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| tiny-experts | 16 | 1.33 (1.33) | 16 |" in text
    assert (tmp_path / "scale.png").stat().st_size > 0
