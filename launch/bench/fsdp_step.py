"""Step time of training under FSDP2: FlashMuon, also in the backward pass, beside AdamW.

    torchrun --nproc-per-node 2 launch/bench/fsdp_step.py --size 1b --out DIR

Writes ``DIR/fsdp_step.jsonl``, one measurement per line: median seconds of a whole step (forward,
backward, optimizer) and of ``optimizer.step()`` where it is waited for before and after, bytes at
the peak, and losses. All optimizers train the same model from the same weights on the same random
tokens in one run, one after the other and then again in reverse order; the better round counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from flashns_dist import ExchangeOptions, FlashMuon, parameter_groups
from launch.bench.timing import environment
from launch.mesh import parse_mesh
from launch.model import SIZES, Transformer
from launch.parallelize import parallelize
from launch.world import World, joined_world, leave_process


def flash(
    bucket_bytes: int | None, *, cuda_graph: bool = False, **options: Any
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def made(model: nn.Module) -> torch.optim.Optimizer:
        exchange = ExchangeOptions(bucket_bytes=bucket_bytes, **options)
        groups = parameter_groups(model)
        return FlashMuon(groups, lr=0.01, aux_lr=1e-3, exchange=exchange, cuda_graph=cuda_graph)

    return made


def contestants(
    bucket_bytes: int | None, device: torch.device
) -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    found = {
        "FlashMuon": flash(bucket_bytes),
        "FlashMuon, overlap_backward": flash(bucket_bytes, overlap_backward=True),
        "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    }
    if device.type == "cuda":
        found["FlashMuon, cuda_graph"] = flash(bucket_bytes, cuda_graph=True)
    return found


def measure(
    make: Callable[[nn.Module], torch.optim.Optimizer], arguments: argparse.Namespace, world: World
) -> dict[str, Any]:
    """One optimizer: warm-up steps, whole steps in a row, then steps in parts."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    spec = parse_mesh("fsdp", world.size)
    mesh = torch.distributed.init_device_mesh(
        world.device.type, (world.size,), mesh_dim_names=("fsdp",)
    )
    model = Transformer(SIZES[arguments.size], seed=0).to(world.device)
    whole = parallelize(model, spec, mesh, torch.bfloat16)
    optimizer = make(whole)
    generator = torch.Generator().manual_seed(world.rank)
    shape = (arguments.batch, arguments.seq_len + 1)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator).to(world.device)

    def backward() -> torch.Tensor:
        optimizer.zero_grad()
        logits = whole(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    losses, steps, updates = [], [], []
    for _ in range(arguments.warmup):
        losses.append(backward())
        optimizer.step()
    for _ in range(arguments.rounds):
        begin = world.now()
        for _ in range(arguments.steps):
            losses.append(backward())
            optimizer.step()
        steps.append((world.now() - begin) / arguments.steps)
    for _ in range(arguments.steps):
        losses.append(backward())
        begin = world.now()
        optimizer.step()
        updates.append(world.now() - begin)
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    return {
        "step_seconds": min(steps),
        "step_seconds_rounds": steps,
        "optimizer_seconds": statistics.median(updates),
        "peak_bytes": peak,
        "losses": [world.mean(loss) for loss in losses],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every optimizer, and write the lines on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank")
    parser.add_argument("--bucket-bytes", type=int, help="default: the planner's")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5.0, help="begin nothing after")
    settings = parser.parse_args(arguments)
    with joined_world(settings.device, None) as world:
        begin = world.now()
        best: dict[str, dict[str, Any]] = {}
        made = contestants(settings.bucket_bytes, world.device)
        for name in [*made, *reversed(made)]:
            elapsed = float(world.agree(str(world.now() - begin)))
            if elapsed > 60 * settings.minutes:
                break
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = measure(made[name], settings, world)
            result["warnings"] = sorted(
                {str(w.message) for w in caught if "backward pass" in str(w.message)}
            )
            if name not in best or result["step_seconds"] < best[name]["step_seconds"]:
                best[name] = result
            if world.is_first:
                print(name, json.dumps(result), flush=True)
        if not world.is_first:
            return
        facts = {**environment(), "ranks": world.size} | {
            key: getattr(settings, key) for key in ("size", "seq_len", "batch", "bucket_bytes")
        }
        settings.out.mkdir(parents=True, exist_ok=True)
        with (settings.out / "fsdp_step.jsonl").open("w") as file:
            for name, result in best.items():
                file.write(json.dumps({"optimizer": name, **result, **facts}) + "\n")
        for name, result in best.items():
            print(
                f"{name:30s}{result['step_seconds'] * 1e3:9.1f} ms a step"
                f"{result['optimizer_seconds'] * 1e3:9.1f} ms optimizer"
                f"{result['peak_bytes'] / 2**30:8.1f} GiB"
            )


if __name__ == "__main__":
    main()
    leave_process()
