"""Update rules on top of one step loop."""

from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.classification import ParameterGroups, parameter_groups
from flashns_dist.optim.converters import load_foreign_state
from flashns_dist.optim.flash_muon import FlashMuon
from flashns_dist.optim.learning_rate import learning_rate_scale
from flashns_dist.optim.options import ExchangeOptions
from flashns_dist.optim.qk_clip import Attention, QKClip, largest_logits

__all__ = [
    "Attention",
    "BoundParameter",
    "ExchangeOptions",
    "FlashMuon",
    "ParameterGroups",
    "QKClip",
    "largest_logits",
    "learning_rate_scale",
    "load_foreign_state",
    "parameter_groups",
]
