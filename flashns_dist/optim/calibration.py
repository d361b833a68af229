"""Measures what the planner's cost model needs, on the machine at hand.

    torchrun --nproc-per-node 4 -m flashns_dist.optim.calibration

Without torchrun, one process measures what it can alone: all but the wire. The result goes to the
cache folder (``$FLASHNS_DIST_CACHE``), one file per device and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from flashns_dist.exchange.probe import all_to_all_seconds, first_value, gather_values
from flashns_dist.optim.flash_muon import FlashMuon
from flashns_dist.optim.machine import calibration_path
from flashns_dist.optim.options import ExchangeOptions
from flashns_dist.optim.step import MatrixStep
from flashns_dist.orthogonalize import orthogonalize
from flashns_dist.plan import CostModel

Stack = tuple[int, int, int]  # batch, rows, cols

_GPU_SHAPES = [(n, k * n) for n in (512, 1024, 2048, 4096) for k in (1, 4)] + [(8192, 8192)]
_CPU_SHAPES = [(16, 16), (16, 64), (64, 64)]
_BATCHES = (16, 4, 1)
_GPU_WIRE = (2**20, 2**23, 2**26, 2**28)
_CPU_WIRE = (2**12, 2**16, 2**20)
_MOST_ELEMENTS = 2**28


def calibrate(
    device: torch.device,
    group: dist.ProcessGroup | None,
    shapes: Sequence[Stack] = (),
    seconds: float = 60.0,
) -> tuple[CostModel, dict[str, Any]]:
    """Measure a cost model.

    Collectives: those of the measured steps, and ``all_gather_object``, on ``group``.

    Args:
        device: Of this process.
        group: Ranks that measure together; they share the shapes, and measure the wire.
        shapes: Stacks that matter, measured first; then a grid of common ones.
        seconds: About how long to measure orthogonalization.

    Returns:
        The model, the same on every rank, and the measurements behind it.
    """
    size = 1 if group is None else dist.get_world_size(group)
    base = CostModel()
    gpu = device.type == "cuda"
    facts: dict[str, Any] = {"ranks": size}
    values: dict[str, Any] = {"measured": _orthogonalizations(device, group, shapes, seconds)}
    if group is not None and size > 1:
        wire = [
            (s, all_to_all_seconds(s, group, device)) for s in (_GPU_WIRE if gpu else _CPU_WIRE)
        ]
        facts["all_to_all"] = wire
        values["exchange_seconds"], values["link_bytes_per_second"] = fit_line(wire)
    host = {
        n: _host_seconds(torch.randn(1, n, n, device=device)) for n in (64, 1024 if gpu else 96)
    }
    facts["orthogonalize_host_seconds"] = host
    values["batch_seconds"] = host[max(host)]
    one, many = (_step_seconds(device, group, number) for number in (1, 8))
    slope = max((many - one) / 7, 0.0)
    facts["steps"] = {"one bucket": one, "eight buckets": many}
    values["bucket_seconds"] = max(slope - host[64], slope / 4)
    values["step_seconds"] = max(one - slope, 0.0)
    values["memory_bytes_per_second"] = _memory_rate(device, base, values["step_seconds"])
    agreed = first_value((values, facts), group)
    return CostModel(**agreed[0]), agreed[1]


def fit_line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency (s) and rate (bytes/s) with the least relative squares over (bytes, seconds)."""
    weights = [1.0 / seconds**2 for _, seconds in points]
    total = sum(weights)
    x = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    y = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    over = sum(w * (s - x) * (t - y) for w, (s, t) in zip(weights, points, strict=True))
    under = sum(w * (s - x) ** 2 for w, (s, _) in zip(weights, points, strict=True))
    slope = max(over / under, 1e-15) if under else 1e-15
    return max(y - slope * x, 1e-6), 1.0 / slope


def _orthogonalizations(
    device: torch.device, group: dist.ProcessGroup | None, shapes: Sequence[Stack], seconds: float
) -> tuple[tuple[int, int, int, float], ...]:
    """(short side, long side, batch, seconds), sorted; each rank measures its share."""
    grid = _GPU_SHAPES if device.type == "cuda" else _CPU_SHAPES
    wanted = [(b, min(r, c), max(r, c)) for b, r, c in shapes]
    wanted += [(batch, n, m) for batch in _BATCHES for n, m in grid]
    wanted = [s for s in dict.fromkeys(wanted) if s[0] * s[1] * s[2] <= _MOST_ELEMENTS]
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    begin, found = time.perf_counter(), []
    for batch, n, m in wanted[rank::size]:
        if time.perf_counter() - begin > seconds:
            break
        x = torch.randn(batch, n, m, device=device).to(torch.bfloat16)
        found.append((n, m, batch, _device_seconds(partial(orthogonalize, x), device)))
        del x
    return tuple(sorted(point for points in gather_values(found, group) for point in points))


def _device_seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the device's work, without the time to launch it."""
    call()
    if device.type != "cuda":
        return min(_wall(call, device) for _ in range(7))
    call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads too
        call()
    graph.replay()
    return statistics.median(_wall(graph.replay, device) for _ in range(5))


def _wall(call: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_seconds(x: Tensor, count: int = 20) -> float:
    """Seconds to launch one orthogonalization of a batch that the device does faster."""
    call = partial(orthogonalize, x)
    for _ in range(count):
        call()
    return _seconds_in_a_row(call, x.device, count)


def _step_seconds(device: torch.device, group: dist.ProcessGroup | None, buckets: int) -> float:
    """Seconds of a step of 64 x 64 matrices in some number of buckets, next to free of work."""
    size = 1 if group is None else dist.get_world_size(group)
    mesh = None if group is None else DeviceMesh.from_group(group, device.type)
    rows = -(-64 // size)
    parameters = []
    for _ in range(8 * size):
        weight, gradient = (torch.randn(rows, 64, device=device) for _ in range(2))
        parameter: Any = nn.Parameter(weight)
        if mesh is not None:
            parameter = nn.Parameter(DTensor.from_local(weight, mesh, (Shard(0),)))
            gradient = DTensor.from_local(gradient, mesh, (Shard(0),))
        parameter.grad = gradient
        parameters.append(parameter)
    shape_bytes = rows * size * 64 * 2
    bucket_bytes = shape_bytes * (8 // buckets) if buckets > 1 else 2**30
    return _typical(_warm_optimizer(parameters, bucket_bytes).step, device)


def _warm_optimizer(parameters: list[Any], bucket_bytes: int) -> FlashMuon:
    options = ExchangeOptions(
        bucket_bytes=bucket_bytes, replica_group=None, cost=CostModel(exchange_seconds=1.0)
    )
    optimizer = FlashMuon(parameters, exchange=options)
    for _ in range(3):
        optimizer.step()
    return optimizer


def _typical(call: Callable[[], object], device: torch.device) -> float:
    times = [_wall(call, device) for _ in range(10)]
    return min(times) if device.type == "cpu" else statistics.median(times)  # others disturb a CPU


def _memory_rate(device: torch.device, base: CostModel, step_seconds: float) -> float:
    """Bytes per second of the elementwise passes of a step without exchange.

    Of the fused kernels by themselves; otherwise what the orthogonalization leaves of a step.
    """
    count, n, m = (128, 256, 8192) if device.type == "cuda" else (4, 16, 4096)
    parameters = []
    for _ in range(count):
        parameter = nn.Parameter(torch.randn(n, m, device=device))
        parameter.grad = torch.randn(n, m, device=device)
        parameters.append(parameter)
    optimizer = _warm_optimizer(parameters, 2**30)
    (step,) = optimizer._steps.values()
    moved = count * n * m * (base.before_bytes + base.after_bytes)
    if isinstance(step, MatrixStep) and step.fused.num_fused:
        return moved / step.passes_seconds(partial(_seconds_in_a_row, device=device))
    total = _typical(optimizer.step, device)
    x = torch.randn(count, n, m, device=device).to(torch.bfloat16)
    orthogonalized = _device_seconds(partial(orthogonalize, x), device)
    passes = max(total - step_seconds - orthogonalized, total / 10)
    return moved / passes


def _seconds_in_a_row(call: Callable[[], object], device: torch.device, count: int = 10) -> float:
    def several() -> None:
        for _ in range(count):
            call()

    return min(_wall(several, device) for _ in range(3)) / count


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the cost model for this device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write here too")
    parser.add_argument("--shapes", type=Path, nargs="*", default=[], help="JSON: [[batch, n, m]]")
    parser.add_argument("--seconds", type=float, default=20.0, help="for orthogonalization")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    chosen = parser.parse_args(arguments)
    name = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    started = "RANK" in os.environ and not dist.is_initialized()
    if started and name == "cuda":
        dist.init_process_group("nccl", device_id=device)
    elif started:
        dist.init_process_group("gloo")
    group = dist.group.WORLD if dist.is_initialized() else None
    shapes = [tuple(stack) for path in chosen.shapes for stack in json.loads(path.read_text())]
    cost, facts = calibrate(device, group, shapes, chosen.seconds)
    if group is None or dist.get_rank(group) == 0:
        paths = [calibration_path(device), *([chosen.out] if chosen.out else [])]
        for path in paths:
            cost.save(path, device=paths[0].stem, torch=torch.__version__, **facts)
        print(f"{paths[0]}: {replace(cost, measured=())}, {len(cost.measured)} measured; {facts}")
    if started:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
