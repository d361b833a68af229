"""The cost model that was measured for this machine, if one was (``calibration.py``)."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

import torch

from flashns_dist.orthogonalize.kernels.tuning import cache_folder
from flashns_dist.plan import CostModel


def calibration_path(device: torch.device) -> Path:
    """Where the cost model of a device, with the versions at hand, is kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = "-".join([torch.__version__, _version("triton"), _version("flashns-dist")])
    text = f"cost-{name}-{versions}.json"
    return cache_folder() / "".join(c if c.isalnum() or c in "-._" else "_" for c in text)


def calibrated_cost(device: torch.device) -> CostModel | None:
    """What was measured for this device; None if nothing was, with a warning if it is damaged."""
    path = calibration_path(device)
    if not path.is_file():
        return None
    try:
        return CostModel.load(path)
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(
            f"{path} is no calibration ({error}): planning for an H200 instead. Calibrate again or "
            "delete the file.",
            stacklevel=2,
        )
        return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
