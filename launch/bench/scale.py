"""What plans of large models look like on 8 to 4096 ranks: on paper, from the cost model.

    python -m launch.bench.scale --cost calibration.json defaults

Writes ``scale.jsonl`` and ``scale.png`` into ``--out``, and the table into ``--page``, between its
``<!-- table -->`` lines: the first cost model's, what the second says in parentheses. Assumptions:
see docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.tensor import Placement, Replicate, Shard

from flashns_dist.layout import leading_blocks, placements_layout
from flashns_dist.orthogonalize import workspace_bytes
from flashns_dist.plan import CostModel, Matrix, make_plan, plan_stages
from launch.bench.models import MODELS, Shape, num_elements

RANKS = (8, 32, 128, 512, 1024, 2048, 4096)
PAPER = ("llama-3-8b", "llama-3-70b", "llama-3-405b", "deepseek-v3")
MOST_SHARDS = 512
HOST_RANKS = 8
ADAMW_BYTES = 28  # per element: weight, gradient and two moments read, all but the gradient written
ADAMW_RATE = (
    3.0e12  # bytes/s: torch's fused AdamW on 7 B parameters, docs/benchmarks/step-h200.jsonl
)
UNBOUNDED = 2**60
DEFAULTS = "defaults"
MARK = "<!-- table -->"


def placed(shape: Shape, ranks: int) -> tuple[tuple[Placement, ...], tuple[int, ...]]:
    """Placements and mesh: FSDP of at most 512 shards, replicas beyond; experts whole up to 256.

    With more ranks than experts, the rows of an expert are sharded over the ranks that share it.
    """
    if len(shape) == 3 and ranks > shape[0]:
        return (Shard(1), Shard(0)), (ranks // shape[0], shape[0])
    if len(shape) == 3 or ranks <= MOST_SHARDS:
        return (Shard(0),), (ranks,)
    return (Replicate(), Shard(0)), (ranks // MOST_SHARDS, MOST_SHARDS)


def matrices_of(model: str, ranks: int) -> list[Matrix]:
    found = []
    for index, (name, shape) in enumerate(MODELS[model]()):
        placements, mesh = placed(shape, ranks)
        layout = placements_layout(shape, placements, mesh)
        taken = workspace_bytes("auto", *shape[-2:])
        found += [
            Matrix(name, index, layout, block, workspace_bytes=taken)
            for block in leading_blocks(shape)
        ]
    return found


def on_many_hosts(cost: CostModel, ranks: int, link: float, peer_seconds: float) -> CostModel:
    """The cost model where ranks of other hosts are reached through a network."""
    if ranks <= HOST_RANKS:
        return cost
    latency = cost.exchange_seconds + peer_seconds * ranks
    return replace(
        cost,
        link_bytes_per_second=min(link, cost.link_bytes_per_second),
        exchange_seconds=latency,
    )


def line(model: str, ranks: int, cost: CostModel) -> dict[str, Any]:
    """One model on some number of ranks, with the default cap on memory and without any."""
    matrices = matrices_of(model, ranks)
    begin = time.perf_counter()
    plan = make_plan(matrices, ranks, cost=cost)
    took = time.perf_counter() - begin
    unbounded = make_plan(matrices, ranks, cost=cost, memory_bytes=UNBOUNDED).prediction
    prediction, stages = plan.prediction, plan_stages(plan, cost)
    stored = [0] * ranks
    for matrix in {m.tensor: m for m in matrices}.values():
        for rank in range(ranks):
            stored[rank] += matrix.layout.local_numel(rank)
    return {
        "model": model,
        "elements": num_elements(MODELS[model]()),
        "matrices": len(matrices),
        "ranks": ranks,
        "replicas": max(m.layout.num_replicas for m in matrices),
        "plan_seconds": took,
        "buckets": len(plan.buckets),
        "balance": prediction.balance,
        "working_ranks": sum(1 for seconds in prediction.compute_seconds if seconds),
        "orthogonalize_seconds": max(prediction.compute_seconds),
        "wire_seconds": sum(stage.gather + stage.scatter for stage in stages),
        "passes_seconds": sum(stage.before + stage.after for stage in stages),
        "host_seconds": sum(stage.host for stage in stages),
        "sent_bytes": max(prediction.sent_bytes),
        "depth": plan.depth,
        "buffer_bytes": max(prediction.buffer_bytes),
        "memory_bytes": max(prediction.memory_bytes),
        "unbounded_memory_bytes": max(unbounded.memory_bytes),
        "unbounded_step_seconds": unbounded.step_seconds,
        "step_seconds": prediction.step_seconds,
        "adamw_seconds": ADAMW_BYTES * max(stored) / ADAMW_RATE,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each model and number of ranks, the second cost model in parentheses."""
    rows = [
        "| model | ranks | balance | ranks that work | sent per rank, MB | memory, MiB | "
        "buckets under way | orthogonalize ms | wire ms | launches ms | step ms | "
        "memory without a cap, MiB | step ms then | fused AdamW ms | planned in s |",
        "|" + "---|" * 15,
    ]
    cases: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in lines:
        cases.setdefault((one["model"], one["ranks"]), []).append(one)

    def cell(own: list[dict[str, Any]], key: str, digits: int, factor: float = 1.0) -> str:
        first, *others = (f"{factor * one[key]:.{digits}f}" for one in own)
        return " ".join([first, *(f"({other})" for other in others)])

    for (model, ranks), own in cases.items():
        one = own[0]
        seconds = ("orthogonalize", "wire", "host", "step")
        cells = [
            *(model, str(ranks), cell(own, "balance", 2), str(one["working_ranks"])),
            cell(own[:1], "sent_bytes", 0, 1e-6),
            cell(own[:1], "memory_bytes", 0, 2**-20),
            str(one["depth"]),
            *(cell(own, f"{name}_seconds", 1, 1e3) for name in seconds),
            cell(own[:1], "unbounded_memory_bytes", 0, 2**-20),
            cell(own, "unbounded_step_seconds", 1, 1e3),
            cell(own[:1], "adamw_seconds", 2, 1e3),
            cell(own[:1], "plan_seconds", 1),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    costs = list(dict.fromkeys(one["cost"] for one in lines))
    for number, model in enumerate(dict.fromkeys(one["model"] for one in lines)):
        color, own = f"C{number}", []
        for cost, style in zip(costs, ("o-", "x--"), strict=False):
            own = [one for one in lines if one["model"] == model and one["cost"] == cost]
            label = model if cost == costs[0] else None
            for axis, key, factor in ((axes[0], "step_seconds", 1e3), (axes[1], "balance", 1)):
                values = [factor * one[key] for one in own]
                axis.plot([one["ranks"] for one in own], values, style, color=color, label=label)
        adamw = [1e3 * one["adamw_seconds"] for one in own]
        axes[0].plot([one["ranks"] for one in own], adamw, ":", color=color)
    axes[0].set_ylabel("predicted step, ms (dotted: fused AdamW)")
    axes[1].set_ylabel("busiest over mean orthogonalization")
    figure.suptitle(", dashed: ".join(costs[:2]), fontsize=9)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("ranks")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Plan everything, write the lines, the plot and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--page", type=Path, help="docs/scale.md: replace its table")
    parser.add_argument(
        "--cost", nargs="+", default=[DEFAULTS], help=f"calibrations, at most two; or {DEFAULTS}"
    )
    parser.add_argument("--models", default=",".join(PAPER))
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--link", type=float, default=45e9, help="bytes/s of a rank between hosts")
    parser.add_argument("--peer-seconds", type=float, default=1e-6, help="latency per rank")
    chosen = parser.parse_args(arguments)
    costs = {
        Path(given).name: CostModel() if given == DEFAULTS else CostModel.load(given)
        for given in chosen.cost
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    lines = []
    with (chosen.out / "scale.jsonl").open("w") as file:
        for model in chosen.models.split(","):
            for ranks in map(int, chosen.ranks.split(",")):
                for name, cost in costs.items():
                    network = on_many_hosts(cost, ranks, chosen.link, chosen.peer_seconds)
                    lines.append(line(model, ranks, network) | {"cost": name})
                    file.write(json.dumps(lines[-1]) + "\n")
                    file.flush()
    text = table(lines)
    print(text)
    plot(lines, chosen.out / "scale.png")
    if chosen.page is not None:
        before, _, rest = chosen.page.read_text().partition(MARK)
        after = rest.partition(MARK)[2]
        chosen.page.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")


if __name__ == "__main__":
    main()
