"""Learning-rate scales by matrix shape."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, sqrt
from typing import TypeAlias

AdjustLr: TypeAlias = "str | Callable[[int, int], float] | None"

_SCALES: dict[str, Callable[[int, int], float]] = {
    # As torch.optim.Muon: the update's spectral norm grows with tall matrices only.
    "original": lambda rows, cols: sqrt(max(1.0, rows / cols)),
    # Moonshot (arXiv 2502.16982): the update's RMS matches AdamW's, so that its lr can be kept.
    "match_rms_adamw": lambda rows, cols: 0.2 * sqrt(max(rows, cols)),
    # Modular duality (arXiv 2410.21265): spectral norm sqrt(out / in).
    "spectral": lambda rows, cols: sqrt(rows / cols),
    "none": lambda rows, cols: 1.0,
}


def check_adjust_lr(adjust_lr_fn: AdjustLr) -> None:
    """Raise ValueError for what is neither None, a known name nor a function."""
    if adjust_lr_fn is None or callable(adjust_lr_fn):
        return
    if isinstance(adjust_lr_fn, str) and adjust_lr_fn in _SCALES:
        return
    raise ValueError(
        f"adjust_lr_fn={adjust_lr_fn!r} is unknown; use one of {sorted(_SCALES)}, None (as "
        '"original", as in torch.optim.Muon) or a function of two numbers, rows and cols'
    )


def learning_rate_scale(adjust_lr_fn: AdjustLr, shape: tuple[int, int]) -> float:
    """The factor on the learning rate of a ``(rows, cols)`` = (out, in) matrix.

    The learning rate times this factor is the spectral norm of one step's change.

    Args:
        adjust_lr_fn: As FlashMuon's: ``"match_rms_adamw"`` is of arXiv 2502.16982, ``"spectral"``
            of arXiv 2410.21265.
        shape: Of the matrix, global.

    Raises:
        ValueError: A function fails, or its result is no finite number, or negative.
    """
    if adjust_lr_fn is None:
        adjust_lr_fn = "original"
    if callable(adjust_lr_fn):
        try:
            scale = float(adjust_lr_fn(*shape))
        except Exception as error:  # the user's
            raise ValueError(
                f"adjust_lr_fn{shape} failed ({type(error).__name__}: {error}); it takes two "
                "numbers, rows and cols, and returns a number"
            ) from error
        if not (isfinite(scale) and scale >= 0):
            raise ValueError(f"adjust_lr_fn{shape} is {scale}; it must be finite and not negative")
        return scale
    return _SCALES[adjust_lr_fn](*shape)
