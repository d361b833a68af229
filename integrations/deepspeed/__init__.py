"""DeepSpeed: importing this makes ``"optimizer": {"type": "FlashMuon"}`` work in its JSON config.

``deepspeed.initialize`` then also takes a ``FlashMuon`` object as ``optimizer=``. See
``docs/deepspeed.md``.
"""

from .hooks import install
from .optimizer import FlashNS
from .settings import PARAMS

install()

__all__ = ["PARAMS", "FlashNS", "install"]
