"""Replays that start before the host knows whether the ranks can step: the device decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashns_dist.optim.agreement import can_step
from flashns_dist.optim.graph import GraphedStep


class Speculation:
    """One step of the ranks' only process group, replayed while the host waits for the verdict.

    A host that read the verdict first would let the device idle while it launches the graph. The
    replay's kernels read the verdict themselves and, where it is no, change neither momenta nor
    weights. Every rank makes the same collectives: one that cannot replay (a GradScaler's factor is
    in its gradients, say) waits, and if the others have replayed in vain it makes theirs.

    Args:
        step: With ``is_predictable``.
        expected: For each parameter, whether some rank is expected to have a gradient; the same on
            every rank.
        groups, state, gradients: As ``MatrixStep.run`` takes them; ``prepare`` has had them.
        is_possible: Whether this rank may replay ahead.

    Attributes:
        has_run: Whether the step has been made; known after ``observe``.
    """

    def __init__(
        self,
        step: GraphedStep,
        expected: Sequence[bool],
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
        *,
        is_possible: bool,
    ) -> None:
        self._step = step
        self._expected = expected
        self._arguments = (groups, state, gradients)
        self._is_possible = is_possible and step.step.fused.is_usable
        self.has_run = False

    def observe(self, agreed: Tensor) -> Tensor:
        """Replay ahead, and wait for what the ranks have agreed on.

        Collectives: those of a run, on ranks that replay and where the others do so in vain.

        Args:
            agreed: As ``can_step`` takes, on the device.

        Returns:
            The same on the host.
        """
        host, event = _start_copy(agreed)
        expected = torch.tensor(
            self._expected, dtype=agreed.dtype, device="cpu", pin_memory=agreed.is_cuda
        )
        permission = self._step.step.fused.permission
        may = False
        try:
            if self._is_possible:
                there = expected.to(agreed.device, non_blocking=True)
                permission.copy_(can_step(agreed, there))
                self._step.replay(*self._arguments)
            if event is not None:
                event.synchronize()
            may = bool(can_step(host, expected))
        finally:  # a capture may fail
            if self._is_possible and not may:
                permission.fill_(1)
        self.has_run = may and self._is_possible
        if not may and not self._is_possible:
            self._step.step.run_empty()
        return host


def _start_copy(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what to wait for before it is read."""
    if not values.is_cuda:
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


__all__ = ["Speculation"]
