"""Moving fragments to owners and results back, and agreeing across ranks."""

from flashns_dist.exchange.agreement import (
    agree_on_largest,
    check_same_setup,
    explain_on_every_rank,
    gather_flags,
)
from flashns_dist.exchange.exchange import Exchange, Transfer, connect
from flashns_dist.exchange.narrowing import Narrowing, Selection, borders, matrix_box
from flashns_dist.exchange.reduction import reduce_largest_, reduce_sum_
from flashns_dist.exchange.rounds import rounds_needed
from flashns_dist.exchange.schedule import Route, Schedule, Segment, make_schedule

__all__ = [
    "Exchange",
    "Narrowing",
    "Route",
    "Schedule",
    "Segment",
    "Selection",
    "Transfer",
    "agree_on_largest",
    "borders",
    "check_same_setup",
    "connect",
    "explain_on_every_rank",
    "gather_flags",
    "make_schedule",
    "matrix_box",
    "reduce_largest_",
    "reduce_sum_",
    "rounds_needed",
]
