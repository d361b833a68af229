"""The benchmark of a step under Megatron: it runs on the CPU, and says what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"size": "tiny", "dtype": "fp32", "seq-len": 16, "global-batch": 4}


@pytest.mark.slow
def test_layouts_and_optimizers_are_measured_or_say_why_not(tmp_path: Path) -> None:
    """As it is run; Megatron's own Muon needs a package that may not be there."""
    names = ("FlashMuon", "Megatron Adam", "Megatron Muon")
    options = {"device": "cpu", "warmup": 1, "steps": 1, "optimizers": ";".join(names), **SIZES}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "launch/bench/megatron_step.py", "--out", str(tmp_path)]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-4000:]
    lines = (tmp_path / "megatron_step-2.jsonl").read_text().splitlines()
    found = {(line["layout"], line["optimizer"]): line for line in map(json.loads, lines)}
    assert set(found) == {(layout, n) for layout in ("DP2 x TP1", "DP1 x TP2") for n in names}
    for (_, name), line in found.items():
        if "error" in line:
            assert name == "Megatron Muon"
            assert "emerging" in line["error"].lower()
            continue
        assert 0 < line["optimizer_seconds"] < line["step_seconds"]
        first = found["DP2 x TP1", name]["losses"]
        # Matrices travel in bf16: 10 times what was seen, a hundredth of the change of one step.
        assert line["losses"] == pytest.approx(first, abs=3e-4)
        assert line["losses"][0] - line["losses"][-1] > 0.03
