"""Who orthogonalizes what, and when."""

from flashns_dist.plan.cost import CostModel
from flashns_dist.plan.plan import Matrix, Plan, Prediction
from flashns_dist.plan.planner import DEFAULT_MEMORY_BYTES, make_plan
from flashns_dist.plan.timeline import Stages, plan_stages, step_seconds

__all__ = [
    "DEFAULT_MEMORY_BYTES",
    "CostModel",
    "Matrix",
    "Plan",
    "Prediction",
    "Stages",
    "make_plan",
    "plan_stages",
    "step_seconds",
]
