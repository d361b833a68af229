"""What a comparison of optimizers found: chosen learning rates, noise, table and plot.

    python -m launch.bench.outcome first.jsonl second.jsonl --out training-h200

Joins runs of one task that were made by several calls, on machines of one kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

TUNING_SEED = 100


def best_lr(runs: Iterable[Mapping[str, Any]], name: str) -> float:
    """The learning rate with the lowest final loss of the tuning seed; a NaN is never lowest."""
    tuning = [r for r in runs if r["name"] == name and r["seed"] == TUNING_SEED]
    return float(min(tuning, key=lambda r: _comparable(r["curve"][-1]["loss"]))["lr"])


def _comparable(loss: float) -> float:
    return loss if loss == loss else float("inf")


@dataclass(frozen=True)
class Result:
    """What the reported runs of one contestant say.

    Attributes:
        name: Of the contestant.
        lr: Chosen learning rate.
        at_edge: Whether it is the lowest or highest of the grid: a better one may lie outside.
        final: Last values of each run, by name of the value.
        curve: Steps, mean seconds and mean losses of the evaluations.
        step_seconds: Median over the runs of the mean time of a step.
        optimizer_seconds: Likewise, of the optimizers alone.
    """

    name: str
    lr: float
    at_edge: bool
    final: dict[str, list[float]]
    curve: list[tuple[float, float, float]]
    step_seconds: float
    optimizer_seconds: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.final["loss"])

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the final loss over the seeds; 0 for one seed."""
        losses = self.final["loss"]
        return statistics.stdev(losses) if len(losses) > 1 else 0.0


def results(runs: Sequence[Mapping[str, Any]]) -> list[Result]:
    """One result for each contestant with reported runs, in the order of the file."""
    found = []
    for name in dict.fromkeys(run["name"] for run in runs):
        lr = best_lr(runs, name)
        grid = [r["lr"] for r in runs if r["name"] == name and r["seed"] == TUNING_SEED]
        chosen = [
            r["curve"]
            for r in runs
            if r["name"] == name and r["seed"] != TUNING_SEED and r["lr"] == lr
        ]
        if not chosen:
            continue
        keys = [key for key in chosen[0][-1] if key not in ("step", "seconds")]
        found.append(
            Result(
                name,
                lr,
                lr in (min(grid), max(grid)),
                {key: [curve[-1][key] for curve in chosen] for key in keys},
                [
                    (
                        points[0]["step"],
                        statistics.fmean(p["seconds"] for p in points),
                        statistics.fmean(p["loss"] for p in points),
                    )
                    for points in zip(*chosen, strict=True)
                ],
                statistics.median(c[-1]["seconds"] / c[-1]["step"] for c in chosen),
                statistics.median(c[-1]["optimizer_seconds"] / c[-1]["step"] for c in chosen),
            )
        )
    return found


def reach(curve: Sequence[tuple[float, float, float]], loss: float) -> tuple[float, float] | None:
    """(step, seconds) at which a curve first gets down to a loss, between evaluations linearly."""
    for (s0, t0, a), (s1, t1, b) in pairwise(curve):
        if b <= loss:
            part = 0.0 if a <= loss or a == b else (a - loss) / (a - b)
            return s0 + part * (s1 - s0), t0 + part * (t1 - t0)
    return None


def table(found: Sequence[Result], extra: str | None = None) -> str:
    """A Markdown table; steps and time are those to AdamW's final mean loss, over AdamW's."""
    base = next((r for r in found if r.name == "adamw"), None)
    head = ["optimizer", "lr", "final loss, mean ± sd", "steps to AdamW's", "time to AdamW's"]
    head += ["ms per step", "of it optimizer"] + ([extra] if extra else [])
    rows = [head, ["---"] * len(head)]
    for result in sorted(found, key=lambda r: _comparable(r.mean)):
        steps = time = "-"
        if base is not None:
            reached = reach(result.curve, base.mean)
            whole = reach(base.curve, base.mean)
            if reached and whole:
                steps = f"{reached[0] / whole[0]:.2f}"
                time = f"{reached[1] / whole[1]:.2f}"
            else:
                steps = time = "not reached"
        row = [
            result.name,
            f"{result.lr:g}" + (" (edge)" if result.at_edge else ""),
            f"{result.mean:.4f} ± {result.deviation:.4f}",
            steps,
            time,
            f"{1e3 * result.step_seconds:.1f}",
            f"{1e3 * result.optimizer_seconds:.1f}",
        ]
        if extra:
            values = result.final[extra]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.fmean(values):.4f} ± {spread:.4f}")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(found: Sequence[Result], title: str, path: Path) -> None:
    """Mean loss over steps and over seconds, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True, constrained_layout=True)
    colors = [pyplot.get_cmap("tab20")(number) for number in range(20)]
    for number, result in enumerate(found):
        steps, seconds, losses = zip(*result.curve, strict=True)
        style = {"color": colors[number % len(colors)], "lw": 1.3}
        style["ls"] = "--" if result.name in ("adamw", "torch-muon") else "-"
        axes[0].plot(steps, losses, label=result.name, **style)
        axes[1].plot(seconds, losses, **style)
        axes[0].errorbar(steps[-1], losses[-1], yerr=result.deviation, color=style["color"])
    lowest = min(result.mean for result in found)
    first = statistics.median(result.curve[1][2] for result in found)
    axes[0].set_ylim(lowest - 0.05 * (first - lowest), first + 0.05 * (first - lowest))
    axes[0].set(xlabel="steps", ylabel="validation loss, mean over seeds", title=title)
    axes[1].set(xlabel="seconds of training")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def conclude(runs: Sequence[Mapping[str, Any]], title: str, path: Path, extra: str | None) -> str:
    """Write table and plot beside the runs' file and return the table."""
    found = results(runs)
    text = table(found, extra)
    path.with_suffix(".md").write_text(f"{title}\n\n{text}\n")
    plot(found, title, path.with_suffix(".png"))
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Join files and conclude."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--extra", help="another value for the table, such as accuracy")
    options = parser.parse_args(arguments)
    lines = [line for file in options.files for line in file.read_text().splitlines()]
    runs = [json.loads(line) for line in dict.fromkeys(lines)]
    tasks = {f"{run['task']}, {run.get('device') or 'CPU'}" for run in runs}
    if len(tasks) != 1:
        raise SystemExit(f"the files hold runs of {sorted(tasks)}; give those of one")
    options.out.with_suffix(".jsonl").write_text("".join(f"{json.dumps(run)}\n" for run in runs))
    print(conclude(runs, tasks.pop(), options.out, options.extra))


if __name__ == "__main__":
    main()
