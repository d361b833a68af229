"""Megatron: ``install()`` makes ``--optimizer flashmuon`` work on its distributed optimizer.

From the command line: ``torchrun ... -m flashns_dist.integrations.megatron pretrain_gpt.py ...
--optimizer flashmuon``. See ``docs/megatron.md``.
"""

from .hooks import install
from .settings import Settings

__all__ = ["Settings", "install"]
