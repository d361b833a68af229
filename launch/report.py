"""What a run leaves behind: a picture of its losses and a summary of one screen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.record import read_record


@dataclass(frozen=True)
class RunFacts:
    """What the log of a run does not say.

    Attributes:
        optimizer: Name of the optimizer.
        mesh: The mesh, as text.
        device: Where it ran, with the number of processes.
        data: What it read.
        model: What it trained.
        unigram_entropy: Loss in nats of the best model that ignores the context.
        tokens_per_step: Tokens of the global batch; before a resume it may have had others.
    """

    optimizer: str
    mesh: str
    device: str
    data: str
    model: str
    unigram_entropy: float
    tokens_per_step: int


def plot_losses(record: Path, facts: RunFacts, path: Path) -> None:
    """Draw training and validation loss over tokens as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_record(record)
    train = [(_tokens_before(line, facts), line["loss"]) for line in lines if "loss" in line]
    validation = [
        (_tokens_before(line, facts), line["validation_loss"])
        for line in lines
        if "validation_loss" in line
    ]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    tokens, losses = zip(*train, strict=True)
    axes.plot(tokens, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(tokens, _smoothed(list(losses)), color="tab:blue", label="training (smoothed)")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation")
    axes.axhline(facts.unigram_entropy, color="gray", linestyle="--", label="unigram entropy")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.set_title(f"{facts.optimizer} on {facts.mesh} · {facts.model}", fontsize=10)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def summarize(record: Path, facts: RunFacts, files: dict[str, Path]) -> str:
    """Write the summary of a run, computed from its log."""
    lines = read_record(record)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "validation_loss" in line]
    final = [line["loss"] for line in steps[-10:]]
    final_loss = sum(final) / len(final)
    tokens = _num_tokens(steps, facts)
    each = facts.tokens_per_step
    size = f" of {each:,} tokens" if tokens == len(steps) * each else ""
    rows = {
        "data": facts.data,
        "model": facts.model,
        "optimizer": facts.optimizer,
        "ran on": f"{facts.device}, mesh {facts.mesh}",
        "steps": f"{len(steps)}{size}, {tokens:,} tokens in {_total(steps, 'seconds'):.0f} s",
        "": "",
        "unigram entropy": f"{facts.unigram_entropy:.3f} nats per token (ignores the context)",
        "first loss": f"{steps[0]['loss']:.3f}",
        "final loss": f"{final_loss:.3f} (mean of the last {len(final)} steps)"
        f", {final_loss - facts.unigram_entropy:+.3f} against the unigram entropy",
    }
    if evaluations:
        rows["validation loss"] = f"{evaluations[-1]['validation_loss']:.3f}"
    rows["tokens/s"] = (
        f"{_speed(steps, facts):,.0f} (first step, evaluation and checkpoints not counted)"
    )
    share = _total(_measured(steps), "optimizer_seconds") / _total(_measured(steps), "seconds")
    rows["optimizer share"] = f"{share:.1%} of the step time"
    rows |= {f"→ {name}": str(path) for name, path in files.items()}
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {value}".rstrip() for name, value in rows.items())


def _total(steps: list[dict[str, Any]], name: str) -> float:
    return float(sum(step[name] for step in steps))


def _speed(steps: list[dict[str, Any]], facts: RunFacts) -> float:
    measured = _measured(steps)
    return _num_tokens(measured, facts) / _total(measured, "seconds")


def _tokens_before(line: dict[str, Any], facts: RunFacts) -> int:
    # Older logs do not say.
    return int(line.get("tokens", line["step"] * facts.tokens_per_step))


def _num_tokens(steps: list[dict[str, Any]], facts: RunFacts) -> int:
    """Tokens of consecutive steps, of which the last is the run's last."""
    last = _tokens_before(steps[-1], facts) + facts.tokens_per_step
    return last - _tokens_before(steps[0], facts)


def _measured(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The first step pays for the plan, for allocation and, on CUDA, for compilation.
    return steps[1:] or steps


def _smoothed(values: list[float]) -> list[float]:
    """Average over a window around each value, narrower at both ends so that it stays centred."""
    smoothed = []
    for i in range(len(values)):
        reach = min(max(1, len(values) // 40), i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
