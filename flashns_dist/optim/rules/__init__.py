"""Update rules, by the name that a parameter group's ``"update_rule"`` gives."""

from flashns_dist.optim.rules.adamuon import AdaMuon
from flashns_dist.optim.rules.adamw import AdamW
from flashns_dist.optim.rules.dion import Dion
from flashns_dist.optim.rules.dion2 import Dion2
from flashns_dist.optim.rules.lion import Lion
from flashns_dist.optim.rules.muon import Muon
from flashns_dist.optim.rules.normuon import NorMuon
from flashns_dist.optim.rules.rule import AuxiliaryRule, MatrixRule

MATRIX_RULES: dict[str, MatrixRule] = {
    rule.name: rule for rule in (Muon(), NorMuon(), AdaMuon(), Dion2(), Dion())
}
AUXILIARY_RULES: dict[str, AuxiliaryRule] = {rule.name: rule for rule in (AdamW(), Lion())}
RULES: dict[str, MatrixRule | AuxiliaryRule] = {**MATRIX_RULES, **AUXILIARY_RULES}
MOMENTUM_SUMS = ("dion", "dion2")  # the other matrix rules' momentum is an average

__all__ = [
    "AUXILIARY_RULES",
    "MATRIX_RULES",
    "MOMENTUM_SUMS",
    "RULES",
    "AuxiliaryRule",
    "MatrixRule",
]
