"""A step replayed from a CUDA graph: no host time for launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashns_dist.optim.step import MatrixStep


class GraphedStep:
    """Runs a ``MatrixStep`` eagerly once, then captures it, then replays it.

    Where gradients, momenta and weights are, and learning rates, weight decays and momenta are read
    from memory that every replay refreshes: they may change. Where another setting or the dtype of
    the gradients changes, it is captured anew; a step that the fused kernels do not take runs
    eagerly. The graph keeps its batches' memory until the object goes.

    Args:
        step: With ``capture_problem`` None.
    """

    def __init__(self, step: MatrixStep) -> None:
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._signature: tuple[object, ...] = ()
        self._is_warm = False

    @property
    def step(self) -> MatrixStep:
        return self._step

    def prepare(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """See ``MatrixStep.prepare``."""
        self._step.prepare(groups, state, gradients)

    def run(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """See ``MatrixStep.run``."""
        step = self._step
        if not self._is_warm:  # loads kernels, connects ranks, measures
            step.run(groups, state, gradients)
            self._is_warm = True
            return
        if not step.is_prepared:
            step.prepare(groups, state, gradients)
        if not step.fused.is_usable:  # its operations would be captured with these gradients
            step.run(groups, state, gradients)
            return
        if self._graph is None or step.fused.signature != self._signature:
            self._signature = step.fused.signature
            self._graph = torch.cuda.CUDAGraph()
            upload = step.fused.postpone_uploads()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                step.run(groups, state, gradients)
            upload()
        step.is_prepared = False
        self._graph.replay()


def capture_problem(step: MatrixStep, device: torch.device) -> str | None:
    """Why a step cannot be captured, or None."""
    if device.type != "cuda":
        return f"its parameters are on {device}, not on a GPU"
    if not step.is_static:
        return "an update rule selects or reduces within the step (dion, dion2)"
    if step.fused.not_fused:
        names = ", ".join(step.fused.not_fused[:3])
        return f"the fused kernels do not take {names} (update rule, dtype, rounding or memory)"
    return None


__all__ = ["GraphedStep", "capture_problem"]
