"""Other implementations of orthogonalization, as far as they are installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Orthogonalize = Callable[[Tensor], Tensor]
CARRIED = Path(__file__).parents[2] / ".carry"
"""Where packages may lie that are not installed (dion's sources, say)."""

COMPILED = "gram-newton-schulz compiled"
SLOW = (COMPILED, "dion triton", "torch.optim.Muon")
"""Peers that tune or compile for up to a minute per shape, or run matrix by matrix."""


class _PerShape:
    """A compiled function made anew for every shape, so that no limit on recompiling is reached."""

    def __init__(self, make: Callable[[], Orthogonalize]) -> None:
        self._make = make
        self._shape: torch.Size | None = None
        self._call: Orthogonalize | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._call is None or x.shape != self._shape:
            torch.compiler.reset()
            self._call, self._shape = self._make(), x.shape
        return self._call(x)


def peers(compiled: bool) -> tuple[dict[str, Orthogonalize], list[str]]:
    """What is installed, and a line about everything that is not.

    Args:
        compiled: Whether to add the ones that ``torch.compile`` themselves, which takes long.
    """
    if CARRIED.is_dir() and str(CARRIED) not in sys.path:
        sys.path.append(str(CARRIED))
    found: dict[str, Orthogonalize] = {}
    missing: list[str] = []
    try:
        module = importlib.import_module("gram_newton_schulz")
        found["gram-newton-schulz"] = module.GramNewtonSchulz(compile_kwargs=None)
        if compiled:
            # fullgraph and CUDA graphs, as upstream would have it.
            found[COMPILED] = _PerShape(module.GramNewtonSchulz)
    except Exception as error:
        missing.append(f"gram-newton-schulz: {type(error).__name__}: {error}")
    try:
        module = importlib.import_module("dion.newton_schulz_triton")
        function = module.newton_schulz_triton
        found["dion triton"] = lambda x: function(x, epsilon=1e-7)
    except Exception as error:
        missing.append(f"dion: {type(error).__name__}: {error}")
    try:
        muon = importlib.import_module("torch.optim._muon")
        function_torch = muon._zeropower_via_newtonschulz
        found["torch.optim.Muon"] = lambda x: torch.stack(
            [function_torch(one, (3.4445, -4.775, 2.0315), 5, 1e-7) for one in x]
        )
    except Exception as error:
        missing.append(f"torch.optim.Muon: {type(error).__name__}: {error}")
    return found, missing
