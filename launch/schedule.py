"""The learning-rate schedule."""

from __future__ import annotations


def learning_rate_factor(step: int, *, num_steps: int, warmup: int, cooldown: float) -> float:
    """Compute what the learning rates are multiplied with at a step.

    Linear warmup from zero, then constant, then linear down to zero just after the last step.

    Args:
        step: Number of the step, from 0.
        num_steps: Steps of the whole run.
        warmup: Steps until the full learning rate.
        cooldown: Share of `num_steps` that the way down takes.
    """
    up = (step + 1) / warmup if step < warmup else 1.0
    down = (num_steps - step) / max(1.0, cooldown * num_steps)
    return min(up, 1.0, down)
