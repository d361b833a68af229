"""Orthogonalization of matrices on one device: methods, coefficients, restarts and their cost.

``orthogonalize`` is the function that everything else in ``flashns_dist`` calls.
"""

from flashns_dist.orthogonalize.coefficients import (
    AOL,
    AOL_FLASH,
    FAST,
    KELLER_JORDAN,
    POLAR_EXPRESS,
    PRESETS,
    UNBIASED,
    YOU,
    Coefficients,
    resolve_coefficients,
)
from flashns_dist.orthogonalize.cost import choose_method, flop_count
from flashns_dist.orthogonalize.entry import CoefficientsLike, check_backend, orthogonalize
from flashns_dist.orthogonalize.methods import METHODS
from flashns_dist.orthogonalize.solver import polar_express
from flashns_dist.orthogonalize.workspace import workspace_bytes

__all__ = [
    "AOL",
    "AOL_FLASH",
    "FAST",
    "KELLER_JORDAN",
    "METHODS",
    "POLAR_EXPRESS",
    "PRESETS",
    "UNBIASED",
    "YOU",
    "Coefficients",
    "CoefficientsLike",
    "check_backend",
    "choose_method",
    "flop_count",
    "orthogonalize",
    "polar_express",
    "resolve_coefficients",
    "workspace_bytes",
]
