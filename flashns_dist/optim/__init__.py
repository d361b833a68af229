"""Update rules on top of one step loop."""

from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.classification import ParameterGroups, parameter_groups
from flashns_dist.optim.flash_muon import FlashMuon
from flashns_dist.optim.learning_rate import learning_rate_scale
from flashns_dist.optim.step import ExchangeOptions

__all__ = [
    "BoundParameter",
    "ExchangeOptions",
    "FlashMuon",
    "ParameterGroups",
    "learning_rate_scale",
    "parameter_groups",
]
