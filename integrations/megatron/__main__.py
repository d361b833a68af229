"""Runs a training script of Megatron-LM's with the optimizer ``flashmuon`` known to it."""

from __future__ import annotations

import os
import runpy
import sys

USAGE = """\
usage: torchrun ... -m flashns_dist.integrations.megatron SCRIPT [ARGUMENT ...]
Runs a script of Megatron-LM's, such as pretrain_gpt.py, with --optimizer flashmuon."""


def main(argv: list[str]) -> None:
    """Run ``argv[1]`` as a script with the arguments that follow it.

    Raises:
        SystemExit: There is no such script; or ``--help`` was asked for.
    """
    if len(argv) < 2:
        sys.exit(USAGE)
    if argv[1] in ("-h", "--help"):
        print(USAGE)
        sys.exit()
    script = argv[1]
    if not os.path.isfile(script):
        sys.exit(f"{script}: no such script. Give the path of pretrain_gpt.py or another script.")
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    sys.argv = argv[1:]
    from .hooks import install

    install()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv)
