"""The log of a run: one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Record:
    """Appends to a JSON-lines file; without a path it keeps nothing.

    Lines with a `loss` are training steps, lines with a `validation_loss` evaluations; both carry
    `step` and `tokens`, the numbers of updates and of their tokens before the loss was computed.
    """

    def __init__(self, path: Path | None, *, first_step: int = 0) -> None:
        self.path = path
        if path is None:
            return
        # What an interrupted run did after its last checkpoint is about to be done again.
        kept = [line for line in read_record(path) if line["step"] < first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, **values: Any) -> None:
        """Append one line."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def read_record(path: Path) -> list[dict[str, Any]]:
    """Read all lines; none if there is no file yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
