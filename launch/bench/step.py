"""The whole optimizer step of sharded parameters: FlashMuon beside other optimizers.

    torchrun --nproc-per-node 4 launch/bench/step.py --cases 1b,7b --out DIR

Writes ``DIR/step.jsonl``, one measurement per line, with what fails and what loses. All candidates
get the same fp32 weights and gradients (DTensors, ``Shard(0)``), one after the other. A step is
timed from a barrier to the end of the slowest rank's GPU work, and in a row without barriers.

    --cases     model[:rows][@RxS]: see ``case.py``; models in ``models.py``
    --options   JSON list of keywords of FlashMuon, a variant each: see ``contestants.py``
    --tune      first measure kernel configurations for what the cases' plans orthogonalize
                (--tune-only: and stop); without it, those in the cache and defaults are used
    --profile   also a Chrome trace of one step of the first variant, and where its time goes
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from flashns_dist.exchange import make_schedule
from flashns_dist.optim.machine import calibration_path
from flashns_dist.optim.step import plan_matrices
from flashns_dist.orthogonalize import orthogonalize
from flashns_dist.plan import CostModel, Plan, Stages, plan_stages, step_seconds
from launch.bench import trace
from launch.bench.case import Case, Problem, local_of, parse_case
from launch.bench.contestants import PEERS, Make, exchange_options, flash, peer, variants
from launch.bench.models import num_elements
from launch.bench.timing import Record, Timing, summarize
from launch.world import World, joined_world, leave_process

SLOW_SECONDS = 1.0
"""Candidates whose step takes longer are measured three times only."""


def measure(problem: Problem, make: Make, steps: int, world: World) -> dict[str, Any]:
    """Times and memory of one candidate; the largest of all ranks.

    Returns:
        ``timing``, and facts: seconds of the first step (which compiles) and of steps in a row,
        bytes of the state, and transient bytes beyond weights, gradients and state: at the peak of
        a step, and as reserved by the allocator (persistent buffers and graph pools included).
    """
    collect()
    problem.refill()
    held, reserved = _allocated(), _reserved()
    optimizer = make(problem)
    try:
        found, sizes = _measured(optimizer, steps, world)
    finally:
        del optimizer
        collect()
    state, peak, kept = sizes
    beyond = [state, max(peak - held, 0) - state, max(kept - reserved, 0) - state]
    for name, size in zip(
        ("state_bytes", "transient_bytes", "reserved_bytes"),
        _largest([float(max(size, 0)) for size in beyond], world),
        strict=True,
    ):
        found[name] = int(size)
    return found


def _measured(
    optimizer: Optimizer, steps: int, world: World
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Times of an optimizer; bytes of its state, allocated at the peak, and reserved."""
    first = _seconds(optimizer.step, 1, world)[0]
    warm = _seconds(optimizer.step, 1 if first > 60 else 3, world)[-1]
    count = steps if warm < SLOW_SECONDS else 3
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(optimizer.step, count, world)

    def row() -> None:
        for _ in range(count):
            optimizer.step()

    found = {
        "timing": summarize(seconds),
        "first_step_seconds": first,
        "row_seconds": _seconds(row, 1, world)[0] / count,
    }
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    return found, (_state_bytes(optimizer), peak, _reserved())


def _seconds(call: Callable[[], object], count: int, world: World) -> list[float]:
    """Wall time of each call on the slowest rank, from a barrier to the end of its GPU work."""
    found = []
    for _ in range(count):
        _synchronize(world)
        world.barrier()
        begin = time.perf_counter()
        call()
        _synchronize(world)
        found.append(time.perf_counter() - begin)
    return _largest(found, world)


def _largest(values: list[float], world: World) -> list[float]:
    found = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.distributed:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [float(value) for value in found]


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _reserved() -> int:
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def _state_bytes(optimizer: Optimizer) -> int:
    tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return sum(local_of(tensor).nbytes for tensor in tensors)


def collect() -> None:
    """Forget the last candidate: its tensors, graphs and compiled functions."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def planned(case: Case, keywords: Mapping[str, Any], num_ranks: int) -> Plan:
    """The plan that FlashMuon makes of a case."""
    options = exchange_options(keywords)
    cost = options.cost or CostModel()
    if keywords.get("cuda_graph"):
        cost = cost.without_launches()
    return plan_matrices(case.matrices(), num_ranks, options, cost)


def expected(case: Case, keywords: Mapping[str, Any], num_ranks: int) -> dict[str, Any]:
    """What the planner predicts; of a CUDA graph, without the time to launch it."""
    plan = planned(case, keywords, num_ranks)
    prediction = plan.prediction
    options = exchange_options(keywords)
    cost = options.cost or CostModel()
    if keywords.get("cuda_graph"):
        cost = cost.without_launches()
    stages = plan_stages(plan, cost, options.wire_dtype.itemsize)
    return {
        "predicted_seconds": step_seconds(stages, cost, plan.depth),
        "predicted_stages": {
            field.name: sum(getattr(stage, field.name) for stage in stages)
            for field in dataclasses.fields(Stages)
        },
        "predicted_orthogonalize_seconds": max(prediction.compute_seconds),
        "balance": prediction.balance,
        "buckets": len(plan.buckets),
        "depth": plan.depth,
        "sent_bytes": max(prediction.sent_bytes),
        "predicted_memory_bytes": max(prediction.memory_bytes),
    }


def tune(
    cases: list[Case],
    options: Mapping[str, Mapping[str, Any]],
    arguments: argparse.Namespace,
    world: World,
) -> None:
    """Orthogonalize once whatever the plans batch, with tuning on; ranks take turns.

    With ``--tune-only``, writes ``shapes.json``: ``[batch, rows, cols]`` of everything, for the
    calibration.
    """
    os.environ["FLASHNS_DIST_TUNE"] = "1"
    sizes: Counter[tuple[int, int, int]] = Counter()
    for case in cases:
        for keywords in chosen_for(case, options).values():
            plan = planned(case, keywords, world.size)
            for bucket in plan.buckets:
                for rank in range(world.size):
                    owned = make_schedule(plan, bucket, rank).owned
                    batches = Counter(plan.matrices[i].work_shape for i in owned)
                    sizes.update((batch, *shape) for shape, batch in batches.items())
    if world.is_first and arguments.tune_only:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "shapes.json").write_text(json.dumps(sorted(sizes)))
    # Largest first, and each short side's to one rank: they have products in common.
    kinds: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for batch, rows, cols in sizes:
        bucket_of = 1 << (batch - 1).bit_length()
        kinds.setdefault((min(rows, cols), bucket_of), []).append((batch, rows, cols))
    for number, (_, members) in enumerate(sorted(kinds.items(), reverse=True)):
        if number % world.size != world.rank:
            continue
        for batch, rows, cols in members:
            if time.perf_counter() - arguments.begin > 60 * arguments.tune_minutes:
                print(f"rank {world.rank}: {batch} x {rows} x {cols} left out", flush=True)
                continue
            begin = time.perf_counter()
            x = torch.randn(batch, rows, cols, device=world.device, dtype=torch.bfloat16)
            orthogonalize(x)
            _synchronize(world)
            took = time.perf_counter() - begin
            print(f"rank {world.rank}: {batch} x {rows} x {cols}: {took:.1f} s", flush=True)
    del os.environ["FLASHNS_DIST_TUNE"]  # from here on, every rank takes what is on disk
    world.barrier()


def write_profile(problem: Problem, make: Make, folder: Path, world: World) -> dict[str, Any]:
    """A trace of one step; every rank takes part, the first one's is kept."""
    path = folder / f"trace-{problem.case.name.replace(':', '-')}-rank{world.rank}.json.gz"
    problem.refill()
    with trace.annotated():
        optimizer = make(problem)
        for _ in range(4):
            optimizer.step()
        _synchronize(world)
        world.barrier()
        trace.record_trace(optimizer.step, path)
    found = trace.summary(trace.read_trace(path))
    if not world.is_first:
        path.unlink()
    del optimizer
    collect()
    return found


def chosen_for(case: Case, options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The variants for a case: those whose ``"cases"``, if any, is a part of its name."""
    return {
        name: {key: value for key, value in keywords.items() if key != "cases"}
        for name, keywords in options.items()
        if keywords.get("cases", "") in case.name
    }


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result, or the error that every rank got (one that one rank alone gets hangs the rest)."""
    try:
        return call()
    except Exception as error:  # the table shows what does not run, too
        message = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    collect()
    return {"error": message}


def run_case(
    case: Case,
    arguments: argparse.Namespace,
    options: Mapping[str, Mapping[str, Any]],
    world: World,
    record: Record | None,
) -> None:
    """Every candidate on one case."""
    problem = Problem(case, world)
    facts = {
        "case": case.name,
        "mesh": list(case.mesh),
        "ranks": world.size,
        "elements": num_elements(case.shapes),
        "parameters": len(case.shapes),
    }
    candidates: list[tuple[str, Make, dict[str, Any]]] = []
    for name in arguments.candidates.split(","):
        if name == "FlashMuon":
            for variant, keywords in chosen_for(case, options).items():
                label = f"FlashMuon {variant}".replace(" {}", "")
                candidates.append((label, flash(keywords), dict(keywords)))
        else:
            candidates.append((name, peer(name), {}))
    for name, make, keywords in candidates:
        elapsed = float(world.agree(str(time.perf_counter() - arguments.begin)))
        result: dict[str, Any]
        if elapsed > 60 * arguments.minutes:
            result = {"error": f"left out: {elapsed:.0f} s have passed"}
        else:
            result = attempt(partial(measure, problem, make, arguments.steps, world))
        if name.startswith("FlashMuon"):
            result |= attempt(partial(expected, case, keywords, world.size))
        if record is not None:
            timing: Timing | None = result.pop("timing", None)
            record.write("step", timing, **facts, candidate=name, options=keywords, **result)
            print(_line(case.name, name, timing, result), flush=True)
    if arguments.profile and (arguments.profile == "all" or arguments.profile == case.name):
        name, make, _ = next(c for c in candidates if c[0].startswith("FlashMuon"))
        folder = arguments.out
        found = attempt(partial(write_profile, problem, make, folder, world))
        if record is not None:
            record.write("profile", None, **facts, candidate=name, **found)
            print(f"{case.name}, {name}\n{found.get('error') or trace.table(found)}", flush=True)


def _line(case: str, name: str, timing: Timing | None, result: Mapping[str, Any]) -> str:
    if timing is None:
        return f"{case:16} {name:32} {result['error']}"
    text = (
        f"{case:16} {name:32} {1e3 * timing.median:9.3f} ms ({1e3 * timing.low:.3f} to "
        f"{1e3 * timing.high:.3f}), in a row {1e3 * result['row_seconds']:.3f}, first "
        f"{result['first_step_seconds']:.1f} s, transient {result['transient_bytes'] / 2**20:.0f}, "
        f"reserved {result['reserved_bytes'] / 2**20:.0f} MiB"
    )
    if "predicted_seconds" in result:
        ratio = result["predicted_seconds"] / timing.median
        text += (
            f", predicted {1e3 * result['predicted_seconds']:.3f} ms ({ratio:.2f} of it) and "
            f"{result['predicted_memory_bytes'] / 2**20:.0f} MiB"
        )
    return text


def main(arguments: list[str] | None = None) -> None:
    """Measure every candidate on every case, and write the lines on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--cases", default="1b,7b")
    parser.add_argument("--candidates", default=",".join(["FlashMuon", *PEERS[:3]]))
    parser.add_argument("--options", default="{}", help="JSON, or a file of it")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no candidate after")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--cost", type=Path, help="calibration (default: this machine's)")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tune-only", action="store_true")
    parser.add_argument("--tune-minutes", type=float, default=5.0, help="tune nothing after")
    parser.add_argument("--profile", nargs="?", const="all", help="of one case, or of all")
    chosen = parser.parse_args(arguments)
    chosen.begin = time.perf_counter()
    text = chosen.options
    options = variants(Path(text).read_text() if text.endswith(".json") else text)
    with joined_world(chosen.device, None) as world:
        path = Path(world.agree(str(chosen.cost or calibration_path(world.device))))
        if path.exists():
            for keywords in options.values():
                keywords["exchange"] = {"cost": str(path), **keywords.get("exchange", {})}
        elif world.is_first:
            print(f"{path} is not there: planned with the default cost model", flush=True)
        cases = [parse_case(name, world.size) for name in chosen.cases.split(",")]
        if chosen.tune or chosen.tune_only:
            tune(cases, options, chosen, world)
        if chosen.tune_only:
            return
        chosen.out.mkdir(parents=True, exist_ok=True)
        record = Record(chosen.out / "step.jsonl") if world.is_first else None
        for case in cases:
            run_case(case, chosen, options, world, record)
            collect()


if __name__ == "__main__":
    main()
    leave_process()
