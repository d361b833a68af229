"""Step time and peak memory under ZeRO 1, 2 and 3: FlashMuon beside DeepSpeed's Muon and Adam.

    torchrun --nproc-per-node 2 launch/bench/deepspeed_step.py --size 390m --out DIR

Writes ``DIR/deepspeed_step.jsonl``, one measurement per line, with the losing cases too. All
optimizers train the same model on the same random tokens in one run, one after the other and then
again in reverse order; the better round of each counts. An optimizer that fails writes its error.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.bench.timing import environment
from launch.model import SIZES, Transformer
from launch.world import World, joined_world, leave_process

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "FlashMuon": {"type": "FlashMuon", "params": {"lr": 0.02, "aux_lr": 3e-4}},
    "native Muon": {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.95}},
    # Compiled by DeepSpeed on its first use: needs nvcc.
    "FusedAdam": {"type": "AdamW", "params": {"lr": 3e-4}},
    "torch AdamW": {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True}},
}


def config(stage: int, name: str, arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if name == "native Muon" and stage == 3:
        zero["reduce_scatter"] = False  # it asks for that
    return {
        "train_batch_size": arguments.micro_batch * arguments.accumulate * world.size,
        "train_micro_batch_size_per_gpu": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.accumulate,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "optimizer": json.loads(json.dumps(OPTIMIZERS[name])),
    }


def measure(
    deepspeed: Any, stage: int, name: str, arguments: argparse.Namespace, world: World
) -> dict[str, Any]:
    """Median seconds of a whole step and of its last ``engine.step()``, and bytes at the peak."""
    torch.manual_seed(0)
    shape = replace(SIZES[arguments.size], max_seq_len=arguments.seq_len)
    model = Transformer(shape, seed=0)
    _collect(world)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config(stage, name, arguments, world),
    )
    generator = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(
        shape.vocab_size,
        (arguments.micro_batch, arguments.seq_len + 1),
        generator=generator,
    ).to(world.device)
    steps, updates = [], []
    for index in range(arguments.warmup + arguments.steps):
        if index == arguments.warmup and world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = world.now()
        for part in range(arguments.accumulate):
            logits = engine(tokens[:, :-1])
            engine.backward(F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()))
            if part == arguments.accumulate - 1:
                before = world.now()
            engine.step()
        end = world.now()
        if index >= arguments.warmup:
            steps.append(end - begin)
            updates.append(end - before)
    held = torch.cuda.memory_allocated() if world.device.type == "cuda" else 0
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    engine.destroy()
    del engine, model
    return {
        "step_seconds": statistics.median(steps),
        "step_seconds_range": [min(steps), max(steps)],
        "update_seconds": statistics.median(updates),
        "update_seconds_range": [min(updates), max(updates)],
        "peak_bytes": _largest(peak, world),
        "held_bytes": _largest(held, world),
    }


def _largest(value: int, world: World) -> int:
    found = torch.tensor(float(value), dtype=torch.float64, device=world.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def _collect(world: World) -> None:
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def facts(deepspeed: Any, arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """Where and with what this is measured."""
    return {
        **environment(),
        "deepspeed": deepspeed.__version__,
        "ranks": world.size,
        "size": arguments.size,
        "seq_len": arguments.seq_len,
        "micro_batch": arguments.micro_batch,
        "accumulate": arguments.accumulate,
        "dtype": "bf16",
    }


def main() -> None:
    """Measure every stage and optimizer, and write the lines on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--size", choices=list(SIZES), default="390m")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with joined_world(None, None) as world:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        importlib.import_module("flashns_dist.integrations.deepspeed")
        if world.device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        cases = [
            (int(stage), name)
            for stage in arguments.stages.split(",")
            for name in arguments.optimizers.split(",")
        ]
        best: dict[tuple[int, str], dict[str, Any]] = {}
        for number in range(arguments.rounds):
            for case in cases if number % 2 == 0 else reversed(cases):
                stage, name = case
                result = attempt(deepspeed, stage, name, arguments, world)
                if "error" not in result or case not in best:
                    kept = best.get(case)
                    if kept is None or "error" in kept or _faster(result, kept):
                        best[case] = result
                if world.is_first:
                    print(
                        json.dumps({"stage": case[0], "optimizer": case[1], **result}), flush=True
                    )
        if world.is_first:
            arguments.out.mkdir(parents=True, exist_ok=True)
            common = facts(deepspeed, arguments, world)
            with (arguments.out / "deepspeed_step.jsonl").open("w") as file:
                for (stage, name), result in best.items():
                    line = {"stage": stage, "optimizer": name, **result, **common}
                    file.write(json.dumps(line) + "\n")


def attempt(
    deepspeed: Any, stage: int, name: str, arguments: argparse.Namespace, world: World
) -> dict[str, Any]:
    """A measurement, or the error that every rank got: a rank alone would hang the others."""
    try:
        return measure(deepspeed, stage, name, arguments, world)
    except Exception as error:  # the table shows what does not run, too
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _faster(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["step_seconds"] < other["step_seconds"])


if __name__ == "__main__":
    main()
    leave_process()
