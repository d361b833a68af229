"""A step replayed from a CUDA graph: no host time for launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashns_dist.optim.step import MatrixStep


class GraphedStep:
    """Runs a ``MatrixStep`` eagerly once, then captures it, then replays it.

    Where gradients, momenta and weights are, and learning rates, weight decays and momenta are read
    from memory that every replay refreshes: they may change. Where another setting, the dtype of
    the gradients or the memory of a state by block changes, it is captured anew; a step that the
    fused kernels do not take runs eagerly. The graph keeps its batches' memory until the object
    goes.

    Args:
        step: With ``capture_problem`` None.
    """

    def __init__(self, step: MatrixStep) -> None:
        self._step = step
        self._graph: Callable[[], None] | None = None
        self._signature: tuple[object, ...] = ()
        self._is_warm = False

    @property
    def step(self) -> MatrixStep:
        return self._step

    @property
    def is_predictable(self) -> bool:
        """Whether its next run may be ``replay``: the same on every rank."""
        return self._is_warm and self._step.is_elementwise

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
        self.replay(groups, state, gradients)

    def replay(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """A run that ``prepare`` has been called for, of gradients that the kernels take.

        Changes nothing while ``step.fused.permission`` is 0 if ``is_predictable``.
        """
        step = self._step
        if self._graph is None or step.fused.signature != self._signature:
            self._signature = step.fused.signature
            self._graph = None  # its memory is free for the next one
            upload = step.fused.postpone_uploads()
            try:
                self._graph = captured(partial(step.run, groups, state, gradients))
            finally:  # or what later steps upload would be postponed too
                upload()
        step.is_prepared = False
        self._graph()


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """What replays the device's work of a call, which is captured and not done."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


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
