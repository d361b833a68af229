"""flashns-dist: Muon for sharded models, the same weights under every sharding."""

from flashns_dist.optim import ExchangeOptions, FlashMuon, parameter_groups
from flashns_dist.orthogonalize import Coefficients, orthogonalize

__version__ = "0.1.0"
__all__ = [
    "Coefficients",
    "ExchangeOptions",
    "FlashMuon",
    "__version__",
    "orthogonalize",
    "parameter_groups",
]
