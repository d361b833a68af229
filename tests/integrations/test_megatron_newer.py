"""The telling Megatron tests once more with a newer megatron-core, in a process of its own.

Its wheel is for Python 3.12; `make` unpacks it beside the environment (`.venv/megatron-newer`), and
`megatron_cpu.py` adds what Python 3.11 lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NEWER = Path(sys.prefix) / "megatron-newer"
HERE = Path(__file__).parent
TESTS = {
    "test_megatron.py": [
        "test_losses_equal_those_of_one_process[dp4, small buckets, overlapped]",
        "test_losses_equal_those_of_one_process[dp2 x tp2, sequence parallel]",
        "test_losses_equal_those_of_one_process[dp2, replicated]",
        "test_losses_equal_those_of_one_process[tp2 x cp2, sequence parallel]",
        "test_losses_equal_those_of_one_process[experts, ep2 x edp2]",
        "test_losses_equal_those_of_one_process[experts, tp2, edp2]",
        "test_weights_equal_separately_stored_matrices[dp2 x tp2]",
        "test_weights_equal_separately_stored_matrices[dp2, replicated, bf16]",
        "test_weights_equal_separately_stored_matrices[adamuon, tp2]",
        "test_groups_of_mixed_precision_and_ranks_with_nothing[4]",
        "test_an_infinity_skips_the_step_and_halves_the_loss_scale",
    ],
    "test_megatron_checkpoint.py": [
        "test_losses_go_on_as_without_a_break[tensor to pipeline]",
        "test_losses_go_on_as_without_a_break[replicated]",
        "test_the_loss_scale_and_half_precision_come_back[None]",
    ],
    "test_megatron_settings.py": ["test_the_command_line_of_megatron_training"],
}


def version() -> str:
    code = "import tests.integrations.megatron_cpu, megatron.core as m; print(m.__version__)"
    return run("-c", code).stdout.split()[-1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(NEWER), str(HERE.parents[1])])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.skipif(not NEWER.is_dir(), reason="no newer megatron-core beside the environment")
def test_a_newer_megatron_passes() -> None:
    installed = pytest.importorskip("megatron.core").__version__
    assert version() != installed
    chosen = [f"{HERE / file}::{name}" for file, names in TESTS.items() for name in names]
    result = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert f"{len(chosen)} passed" in result.stdout
