"""The methods that ``orthogonalize`` offers, and which of them ``auto`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flashns_dist.orthogonalize.aol import aol
from flashns_dist.orthogonalize.coefficients import (
    AOL,
    FAST,
    FAST_BFLOAT16,
    POLAR_EXPRESS,
    UNBIASED,
    UNBIASED_BFLOAT16,
    Coefficients,
)
from flashns_dist.orthogonalize.gram import gram
from flashns_dist.orthogonalize.kernels.interface import Kernels
from flashns_dist.orthogonalize.spectral import fast, unbiased
from flashns_dist.orthogonalize.standard import standard


class Iteration(Protocol):
    """Orthogonalizes a batch ``(batch, rows, columns)``; see ``gram.gram``."""

    def __call__(
        self,
        kernels: Kernels,
        x: Tensor,
        coefficients: Coefficients,
        *,
        dtype: torch.dtype,
        transpose: bool,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """One algorithm.

    Attributes:
        iteration: Carries it out.
        default: Its coefficients when nothing is asked for.
        bfloat16: Those for iterations in bfloat16, if others.
        normalizations: Which coefficients it accepts.
        biased: Whether it approximates something else than the polar factor of its input.
    """

    iteration: Iteration
    default: Coefficients
    normalizations: tuple[str, ...]
    bfloat16: Coefficients | None = None
    biased: bool = False

    def default_for(self, dtype: torch.dtype) -> Coefficients:
        """The default coefficients of an iteration in ``dtype``."""
        return self.bfloat16 if self.bfloat16 and dtype == torch.bfloat16 else self.default


METHODS = {
    "standard": Method(standard, POLAR_EXPRESS, ("frobenius",)),
    "gram": Method(gram, POLAR_EXPRESS, ("frobenius",)),
    "unbiased": Method(unbiased, UNBIASED, ("ws8",), bfloat16=UNBIASED_BFLOAT16),
    "fast": Method(fast, FAST, ("ws8",), bfloat16=FAST_BFLOAT16),
    "aol": Method(aol, AOL, ("aol", "aol_unguarded"), biased=True),
}


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        ValueError: If there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown. Choose one of auto, {', '.join(METHODS)}.")
    return METHODS[name]


def check_coefficients(name: str, coefficients: Coefficients) -> None:
    """Raises ValueError if a method cannot use coefficients of that normalization."""
    accepted = find_method(name).normalizations
    if coefficients.normalization not in accepted:
        raise ValueError(
            f"coefficients={coefficients.name!r} are designed for the normalization "
            f"{coefficients.normalization!r}, and method={name!r} normalizes by "
            f"{' or '.join(accepted)}. Choose the method that they were designed for."
        )
