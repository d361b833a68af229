"""What update rules allocate, on the owner and where the pieces lie: for the planner."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from flashns_dist.optim.fused.passes import has_fused_rule, is_fused_dtype
from flashns_dist.optim.rules import MATRIX_RULES
from flashns_dist.optim.rules.muon import Muon, resolve_ns_coefficients
from flashns_dist.orthogonalize import workspace_bytes


def owner_bytes(shape: tuple[int, int], group: Mapping[str, Any], wire_dtype: torch.dtype) -> int:
    """Bytes that ``on_owner`` allocates per matrix of a batch, the result included.

    Args:
        shape: Of the matrix.
        group: Its parameter group.
        wire_dtype: Its dtype.
    """
    rows, cols = shape
    dtype = group["ns_dtype"] or torch.float16
    coefficients = resolve_ns_coefficients(group)
    found = workspace_bytes(group["method"], rows, cols, coefficients, dtype, wire_dtype)
    rule = type(MATRIX_RULES[group["update_rule"]])
    scales = (
        rule.on_owner is not Muon.on_owner or group["renormalize"] != "none" or group["equilibrate"]
    )
    # Two copies and their squares in fp32 (scaling.py): fewer where a batch is large.
    return max(found, rows * cols * (wire_dtype.itemsize + 12)) if scales else found


@cache
def _of_passes(dtype: torch.dtype) -> int:
    return 3 * torch.promote_types(dtype, torch.float32).itemsize


def pass_bytes(dtype: torch.dtype, group: Mapping[str, Any]) -> int:
    """Bytes per element that ``before`` and ``after`` allocate at once, for stored pieces.

    None where the fused kernels take them. Otherwise as much as three copies, as of the gradient,
    its multiple and the direction.

    Args:
        dtype: Of the weights.
        group: Their parameter group.
    """
    if has_fused_rule(group) and is_fused_dtype(dtype, group["rounding"]):
        return 0
    return _of_passes(dtype)


__all__ = ["owner_bytes", "pass_bytes"]
