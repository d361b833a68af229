"""Which configuration of a Triton product is launched: known, measured now, or the default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch import Tensor

from flashns_dist.orthogonalize.kernels.triton_configs import TileConfig
from flashns_dist.orthogonalize.kernels.triton_passes import device_facts
from flashns_dist.orthogonalize.kernels.triton_prepared import Launch
from flashns_dist.orthogonalize.kernels.tuning import (
    TuningCache,
    batch_bucket,
    fastest,
    tuning_requested,
)


def chosen_launch(
    cache: TuningCache,
    tune: bool | None,
    problem: str,
    configs: tuple[TileConfig, ...],
    default: Callable[[], TileConfig],
    launch: Callable[[TileConfig], Launch],
    a: Tensor,
) -> Launch:
    """A launch with the configuration that the cache has, or that is measured and kept now.

    Without tuning the default; while a CUDA graph is captured too, but that is not settled: the
    next launch asks again.

    Args:
        cache: Where choices are kept.
        tune: Whether to measure; None asks the environment.
        problem: The kernel, how it loads and the sizes, but for the batch.
        configs: The candidates, of which there are several.
        default: Makes the configuration of an unmeasured problem.
        launch: Makes a launch with a configuration.
        a: The first factor, on a CUDA device: its batch, dtype and device are the problem's too.
    """
    key = (
        f"triton-{triton.__version__}-{problem}-b{batch_bucket(a.shape[0])}-{str(a.dtype)[6:]}"
        f"-{device_facts(a.get_device())[0]}"
    )
    labels = {config.label(): config for config in configs}
    known = labels.get(str(cache.lookup(key)))
    if known is not None:
        return launch(known)
    if not (tuning_requested() if tune is None else tune):
        return launch(default())
    if torch.cuda.is_current_stream_capturing():
        return replace(launch(default()), settled=False)
    candidates = [(name, _run(launch, config)) for name, config in labels.items()]
    best, seconds = fastest(candidates)
    cache.store(key, configs[best].label(), seconds)
    return launch(configs[best])


def _run(launch: Callable[[TileConfig], Launch], config: TileConfig) -> Callable[[], object]:
    return lambda: launch(config).run()
