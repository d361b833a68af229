"""The benchmark of training under FSDP2: it runs, and what it compares trains alike."""

from __future__ import annotations

import json
from pathlib import Path

from launch.bench import fsdp_step


def test_overlap_trains_as_without_and_every_optimizer_is_measured(ranks, tmp_path: Path) -> None:
    arguments = [
        *("--device", "cpu", "--size", "tiny", "--seq-len", "16", "--batch", "2"),
        *("--warmup", "1", "--steps", "1", "--rounds", "1", "--out", str(tmp_path)),
    ]
    ranks.run(2, fsdp_step.main, arguments)
    lines = [json.loads(line) for line in (tmp_path / "fsdp_step.jsonl").read_text().splitlines()]
    found = {line["optimizer"]: line for line in lines}
    assert set(found) == {"FlashMuon", "FlashMuon, overlap_backward", "fused AdamW"}
    for line in lines:
        assert line["optimizer_seconds"] > 0
        assert 0 < line["step_seconds"] == min(line["step_seconds_rounds"])
        assert line["losses"][-1] < line["losses"][0]
        assert (line["ranks"], line["size"], line["warnings"]) == (2, "tiny", [])
    plain, overlapped = found["FlashMuon"], found["FlashMuon, overlap_backward"]
    assert overlapped["losses"] == plain["losses"]
