"""How a run shows where it is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm  # type: ignore[import-untyped]


class Progress:
    """Shows the progress of the run on standard error; silent on all ranks but the first."""

    def __init__(self, num_steps: int, first_step: int, *, shown: bool) -> None:
        self._num_steps = num_steps
        self._every = max(1, num_steps // 20)
        self._shown = shown
        self._validation = ""
        self._started = time.perf_counter()
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(
        self, step: int, *, loss: float, tokens_per_second: float, optimizer_share: float
    ) -> None:
        """Show a finished step."""
        text = (
            f"loss {loss:.3f}{self._validation} · {tokens_per_second:,.0f} tokens/s"
            f" · optimizer {optimizer_share:.1%}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._shown and ((step + 1) % self._every == 0 or step == 0):
            width = len(str(self._num_steps))
            seconds = time.perf_counter() - self._started
            line = f"step {step + 1:>{width}}/{self._num_steps} · {seconds:4.0f} s · {text}"
            print(line, file=sys.stderr, flush=True)

    def validation(self, loss: float) -> None:
        """Show a validation loss beside the following steps."""
        self._validation = f" · validation {loss:.3f}"

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
