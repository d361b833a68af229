"""Joining and leaving the processes of a run."""

from __future__ import annotations

import subprocess
import sys

from tests.launch.test_train import ROOT

SCRIPT = """
import atexit
from launch.world import leave_process
atexit.register(lambda: print("interpreter taken apart"))
print("work done", end="")
leave_process()
"""


def test_a_process_leaves_with_its_output_and_without_the_interpreters_end():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "work done"
