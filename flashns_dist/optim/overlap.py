"""Gathers that start while the backward pass still runs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.options import ExchangeOptions
from flashns_dist.optim.rules import MATRIX_RULES
from flashns_dist.optim.rules.muon import Muon
from flashns_dist.optim.step import MatrixStep
from flashns_dist.plan import Plan
from flashns_dist.plan.traffic import Traffic

_PATIENCE = 3  # steps in a row
_FIRST = 64  # elements
_SETTINGS = ("update_rule", "momentum", "nesterov")  # that decide what is sent
_ACCUMULATED = (
    "a second backward pass came before step(). Call model.set_requires_gradient_sync(False) "
    "before all but the last one (FSDP2)"
)
_SCALED = (
    "a GradScaler's factor is still in the gradients. Train in bf16, or without overlap_backward"
)
_CHANGED = (
    "gradients have changed since the backward pass (clipping, unscaling, averaging, zero_grad). "
    "Leave that out, or overlap_backward"
)
_CHANGED_STATE = (
    "{name}: its momentum or its settings {settings} have changed since the backward pass"
)
_ELSEWHERE = "another rank cannot use them: see its warning"


def check_overlap(
    options: ExchangeOptions, *, cuda_graph: bool = False, has_adapter: bool = False
) -> None:
    """Raise ValueError where ``overlap_backward`` cannot be."""
    if options.overlap_backward and cuda_graph:
        raise ValueError(
            "cuda_graph=True and overlap_backward=True exclude each other: a graph replays all "
            "gathers of a step"
        )
    if options.overlap_backward and has_adapter:
        raise ValueError(
            "overlap_backward=True is for FSDP2's parameters: under an adapter nothing tells the "
            "optimizer when a gradient is final"
        )


class EarlyGathers:
    """Sends buckets to their owners while a backward pass still runs (FSDP2).

    FSDP2 calls the hooks of a sharded parameter as soon as its gradient is reduced, on every rank
    and in the same order, also where the rank's shard is empty. Once all gradients of a bucket are
    there, its directions are computed from them and from the momenta, which stay as they are, and
    sent. The buckets go in their order, as the planner has cut them for that. A step receives them
    if no rank finds that gradients, momenta or settings have changed since (``is_outdated``, which
    all ranks then agree on); otherwise it drops them and sends everything itself.

    Version counters do not tell whether gradients have changed: ``clip_grad_norm_`` on DTensors and
    collectives leave them as they are. So their values are compared (``_fingerprint``).

    Only matrices whose gradient is final when the hook is called take part: sharded DTensors, with
    Muon's elementwise ``before``. With ``overlap_backward=False`` nothing does.

    Args:
        optimizer: Whose settings and state are read; known weakly.
        bound: Its parameters.
        matrices: Indices of the matrices of each process group.
        options: How matrices travel.

    Attributes:
        num_sent: Buckets sent early, since construction.
        num_dropped: Those of them that no step has used.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        bound: Sequence[BoundParameter],
        matrices: Sequence[Sequence[int]],
        options: ExchangeOptions,
    ) -> None:
        self.num_sent = self.num_dropped = 0
        self._optimizer = weakref.ref(optimizer)
        self._bound = bound
        self._matrices = matrices
        self._bytes = options.overlap_bytes
        self._number: dict[int, int] = {}  # of the process group, of each parameter that takes part
        self._queues: dict[int, _Queue] = {}  # by that number
        self._arrived: set[int] = set()
        self._sent: list[_Sent] = []
        self._problem: str | None = None
        self._is_changed: Tensor | None = None  # 0-dim: whether fingerprints have
        self._num_failures = 0
        self._has_warned = False
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        handles: list[RemovableHandle] = []
        self._remove_hooks = weakref.finalize(self, _remove, handles)
        if not options.overlap_backward:
            return
        for number, indices in enumerate(matrices):
            for index in indices:
                if self._takes_part(bound[index]):
                    hook = partial(_arrive, weakref.ref(self), index)
                    storage = bound[index].storage
                    handles.append(storage.register_post_accumulate_grad_hook(hook))
                    self._number[index] = number
        if not handles:
            warnings.warn(
                "overlap_backward=True does nothing here: it is for matrices that are sharded "
                'DTensors (FSDP2) with the update rule "muon" or "normuon"',
                stacklevel=2,
            )

    def _takes_part(self, bound: BoundParameter) -> bool:
        rule = type(MATRIX_RULES[self._group(bound)["update_rule"]])
        placements = getattr(bound.storage, "placements", ())
        return (
            any(not placement.is_replicate() for placement in placements)
            and bound.storage.requires_grad
            and rule.before is Muon.before
            and not rule.selects
        )

    def _group(self, bound: BoundParameter) -> Mapping[str, Any]:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer.param_groups[bound.group_index]

    def watch(self, number: int, step: MatrixStep) -> None:
        """From now on send the buckets of a step that has been made for a process group."""
        known = self._queues.get(number)
        if number not in self._number.values() or (known is not None and known.step is step):
            return
        if known is not None:
            self._drop(known)
        indices = self._matrices[number]
        buckets = _early_buckets(
            step.exchange.plan,
            [index in self._number for index in indices],
            self._bytes // step.exchange.dtype.itemsize,
        )
        found = [(bucket, [indices[tensor] for tensor in tensors]) for bucket, tensors in buckets]
        self._queues[number] = _Queue(step, found)

    # Backward pass ----------------------------------------------------------------------------

    @torch.no_grad()
    def arrive(self, index: int) -> None:
        """Note that a parameter's gradient is there; send the bucket that it completes.

        Collectives: one ``all_to_all_single`` per bucket that is sent.
        """
        if index in self._arrived:
            self._problem = self._problem or _ACCUMULATED
        self._arrived.add(index)
        queue = self._queues.get(self._number[index])
        while self._problem is None and queue is not None and queue.is_ready(self._arrived):
            self._send(self._number[index], queue)

    def _send(self, number: int, queue: _Queue) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        bucket, indices = queue.buckets[queue.num_sent]
        try:
            found = {index: self._bound[index].gradient for index in indices}
        except ValueError as error:  # step() will raise it
            self._problem = str(error)
            return
        gradients = [gradient for gradient in found.values() if gradient is not None]
        if len(gradients) < len(indices):
            self._problem = _CHANGED
            return
        with self._side_stream(gradients):
            states = [self._present(index) for index in indices]
            self._sent.append(_Sent(indices, _fingerprint(gradients), states))
            everyone = [found.get(index) for index in self._matrices[number]]
            queue.step.gather_early(bucket, optimizer.param_groups, optimizer.state, everyone)
        queue.num_sent += 1
        self.num_sent += 1

    def _side_stream(self, gradients: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The stream that packs: behind those that reduce gradients and step."""
        device = gradients[0].device
        if device.type != "cuda":
            return nullcontext()
        assert self._streams is not None
        side, stepping = self._streams
        side.wait_stream(torch.cuda.current_stream(device))
        # It has updated the momenta, and read what was received in memory of the side stream.
        side.wait_stream(stepping)
        for gradient in gradients:
            gradient.record_stream(side)
        return torch.cuda.stream(side)

    def _present(self, index: int) -> tuple[Any, ...]:
        """What besides the gradient decides a parameter's direction: the momentum, the settings."""
        bound, optimizer = self._bound[index], self._optimizer()
        assert optimizer is not None
        momentum = optimizer.state[bound.storage]["momentum_buffer"]
        version = momentum._version + bound.local(momentum)._version
        group = self._group(bound)
        return id(momentum), version, *(group[name] for name in _SETTINGS)

    # Step -------------------------------------------------------------------------------------

    def is_outdated(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """Whether what this rank has sent is no longer what it would send now.

        Args:
            gradients: This rank's part of each bound parameter's gradient.

        Returns:
            Bool, 0-dim, on the gradients' device; None where nothing has been sent.
        """
        if not self._sent:
            return None
        device = self._sent[0].fingerprint.device
        self._problem = self._problem or self._host_problem(gradients)
        if self._problem is not None:
            return torch.ones((), dtype=torch.bool, device=device)
        if self._streams is not None:
            torch.cuda.current_stream(device).wait_stream(self._streams[0])
        now = [
            _fingerprint([g for index in sent.indices if (g := gradients[index]) is not None])
            for sent in self._sent
        ]
        then = torch.cat([sent.fingerprint for sent in self._sent])
        self._is_changed = (torch.cat(now) != then).any()
        return self._is_changed

    def _host_problem(self, gradients: Sequence[Tensor | None]) -> str | None:
        """What the host can see of changes since the backward pass."""
        if getattr(self._optimizer(), "grad_scale", None) is not None:
            return _SCALED
        for sent in self._sent:
            for index, state in zip(sent.indices, sent.states, strict=True):
                if gradients[index] is None:
                    return _CHANGED
                if self._present(index) != state:
                    name = self._bound[index].name
                    return _CHANGED_STATE.format(name=name, settings=_SETTINGS)
        return None

    def settle(self, is_outdated: bool) -> None:
        """Drop what has been sent if the ranks have agreed so; give up if that has become usual."""
        if not is_outdated:
            self._num_failures = 0
            return
        self._num_failures += 1
        is_changed = self._is_changed is not None and bool(self._is_changed)
        problem = self._problem or (_CHANGED if is_changed else _ELSEWHERE)
        self.drop()
        if self._num_failures == _PATIENCE or not self._has_warned:
            after = f"after {_PATIENCE} such steps in a row overlap_backward is switched off"
            if self._num_failures == _PATIENCE:
                self.close()
                after = f"overlap_backward is now off, after {_PATIENCE} such steps in a row"
            warnings.warn(
                "what was gathered during the backward pass is not used, with the same results but "
                f"no overlap, because {problem}. Note: {after}.",
                stacklevel=5,
            )
            self._has_warned = True

    def drop(self) -> None:
        """Forget the backward pass, and everything that was sent and not used. No collectives."""
        for queue in self._queues.values():
            self._drop(queue)
        self._arrived.clear()
        self._sent.clear()
        self._problem = self._is_changed = None
        device = self._bound[0].local(self._bound[0].storage).device
        if self._number and device.type == "cuda":
            side = self._streams[0] if self._streams else torch.cuda.Stream(device)
            self._streams = side, torch.cuda.current_stream(device)

    def _drop(self, queue: _Queue) -> None:
        queue.num_sent = 0
        self.num_dropped += len(queue.step.early)
        while queue.step.early:
            queue.step.early.popitem()[1].wait()

    def close(self) -> None:
        """Send nothing early any more."""
        self._remove_hooks()
        self.drop()
        self._number.clear()
        self._queues.clear()


class _Queue:
    """The buckets of one plan that may go early, with their parameters, in order."""

    def __init__(self, step: MatrixStep, buckets: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.step = step
        self.buckets = buckets
        self.num_sent = 0  # since the last step

    def is_ready(self, arrived: set[int]) -> bool:
        """Whether all gradients of the next bucket are there."""
        return self.num_sent < len(self.buckets) and arrived.issuperset(
            self.buckets[self.num_sent][1]
        )


class _Sent(NamedTuple):
    """What the directions of a bucket were computed from."""

    indices: Sequence[int]
    fingerprint: Tensor
    states: list[tuple[Any, ...]]


def _early_buckets(
    plan: Plan, takes_part: Sequence[bool], most_elements: int
) -> list[tuple[int, list[int]]]:
    """The buckets that may go early, with their parameters: the same on every rank.

    Args:
        plan: Of one process group.
        takes_part: For each of its parameters.
        most_elements: That a rank may send and receive of them all.
    """
    traffic = Traffic(plan.group_size)
    found = []
    for bucket, matrices in enumerate(plan.buckets):
        tensors = sorted({plan.matrices[index].tensor for index in matrices})
        if not plan.moves(bucket) or not all(takes_part[tensor] for tensor in tensors):
            continue
        traffic.add(plan.matrices, plan.owners, matrices)
        both = zip(traffic.gather_sends, traffic.gather_receives, strict=True)
        if max(sent + received for sent, received in both) > most_elements:
            break
        found.append((bucket, tensors))
    return found


def _fingerprint(gradients: Sequence[Tensor]) -> Tensor:
    """One-dimensional, fp64: what differs where gradients do.

    The sum of each one's magnitudes, which scaling moves one way in all elements, and its first few
    elements, which show a change of sign. Another permutation of the elements is not seen.
    """
    sums = torch._foreach_norm(list(gradients), ord=1, dtype=torch.float64)
    firsts = torch.cat([gradient.flatten()[:_FIRST] for gradient in gradients])
    return torch.cat([torch.stack(list(sums)), firsts.double()])


def _arrive(early: weakref.ref[EarlyGathers], index: int, param: Tensor) -> None:
    found = early()
    if found is not None:
        found.arrive(index)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


__all__ = ["EarlyGathers", "check_overlap"]
