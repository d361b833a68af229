"""The buckets of one process group that travel while the backward pass still runs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from flashns_dist.exchange import reduce_largest_
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.rules import MATRIX_RULES
from flashns_dist.optim.rules.muon import Muon
from flashns_dist.optim.step import MatrixStep
from flashns_dist.plan import Plan
from flashns_dist.plan.traffic import Traffic

_PATIENCE = 3  # steps in a row
_RUN = 64  # elements
_FEW = 4096  # elements
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_SETTINGS = ("update_rule", "momentum", "nesterov")  # that decide what is sent
_ACCUMULATED = (
    "a second backward pass came before step(). Call model.set_requires_gradient_sync(False) "
    "before all but the last one (FSDP2)"
)
_SCALED = (
    "a GradScaler's factor is still in the gradients. Train in bf16, or without overlap_backward"
)
_CHANGED = (
    "gradients or momenta have changed since the backward pass (clipping, unscaling, averaging, "
    "zero_grad, loading). Leave that out, or overlap_backward"
)
_CHANGED_SETTINGS = "{name}: its settings {settings} have changed since the backward pass"
_FAILED = "packing a bucket failed ({error})"
_OTHERS = (
    "the ranks have sent different buckets, since parameters have gradients on some only, or one "
    "could not send: see its warning"
)
_ELSEWHERE = "another rank cannot use them: see its warning"


class _Sent(NamedTuple):
    """What the directions of a bucket were computed from."""

    indices: Sequence[int]
    fingerprint: Tensor
    settings: list[tuple[Any, ...]]


class EarlyQueue:
    """The buckets of one process group that may go early, in order.

    Args:
        optimizer: See ``EarlyGathers.bind``.
        bound: See there.
        indices: The matrices of the process group.
        most_bytes: That a rank may send and receive early.

    Attributes:
        group: The process group on which they go.
        ranks: Its ranks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        bound: Sequence[BoundParameter],
        indices: Sequence[int],
        most_bytes: int,
    ) -> None:
        self.num_sent = self.num_dropped = 0
        self.group: dist.ProcessGroup | None = None
        self.ranks = bound[indices[0]].group_ranks
        self._optimizer = weakref.ref(optimizer)
        self._bound = bound
        self._indices = indices
        self._most_bytes = most_bytes
        self._is_closed = False
        self._watched: MatrixStep | None = None
        self._step: MatrixStep | None = None  # that, if some of its buckets may go early
        self._buckets: list[tuple[int, list[int]]] = []  # with their parameters
        self._arrived: set[int] = set()  # since the last step; so are those below
        self._sent: list[_Sent] = []
        self._problem: str | None = None
        self._own: Tensor | None = None  # (3,): is outdated, buckets sent, minus buckets sent
        self._agreed: Tensor | None = None  # their largest values on any rank
        self._num_failures = 0
        self._has_warned = False
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._takes_part = {i for i in indices if takes_part(bound[i], optimizer.param_groups)}
        handles: list[RemovableHandle] = []
        self._remove_hooks = weakref.finalize(self, _remove, handles)
        for index in self._takes_part:
            storage, hook = bound[index].storage, partial(_arrive, weakref.ref(self), index)
            if storage.requires_grad:
                handles.append(storage.register_post_accumulate_grad_hook(hook))

    def watch(self, step: MatrixStep) -> bool:
        """Whether buckets of the step may go early, which is new."""
        if self._is_closed or step is self._watched:
            return False
        self.drop()
        self._watched = step
        most = self._most_bytes // step.exchange.dtype.itemsize
        chosen = [index in self._takes_part for index in self._indices]
        self._buckets = [
            (bucket, [self._indices[tensor] for tensor in tensors])
            for bucket, tensors in _early_buckets(step.exchange.plan, chosen, most)
        ]
        self._step = step if self._buckets else None
        return self._step is not None

    def close(self, problem: str) -> None:
        """Send nothing any more; what has been sent is not to be used."""
        self._remove_hooks()
        self._is_closed = True
        self._problem = problem

    # Backward pass ----------------------------------------------------------------------------

    @torch.no_grad()
    def arrive(self, index: int) -> None:
        """Note that a parameter's gradient is there; send the buckets that it completes."""
        if index in self._arrived:
            self._problem = self._problem or _ACCUMULATED
        self._arrived.add(index)
        while self._step is not None and self._problem is None:
            waiting = self._buckets[len(self._sent) :]
            if not waiting or not self._arrived.issuperset(waiting[0][1]):
                return
            self._send(*waiting[0])

    def _send(self, bucket: int, indices: Sequence[int]) -> None:
        assert self._step is not None
        try:
            gradients = {index: self._bound[index].gradient for index in indices}
        except ValueError as error:  # step() will raise it
            self._problem = str(error)
            return
        inputs = self._inputs(indices, gradients)
        if inputs is None:
            self._problem = _CHANGED
            return
        optimizer = self._present
        with self._side_stream(inputs):
            settings = [self._settings(index) for index in indices]
            everyone = [gradients.get(index) for index in self._indices]
            try:
                # First the fingerprint: what changes while directions are computed is then found.
                sent = _Sent(indices, fingerprint(inputs), settings)
                packed = self._step.pack_early(
                    bucket, optimizer.param_groups, optimizer.state, everyone
                )
            except RuntimeError as error:  # out of memory, say: step() may have more
                self._problem = _FAILED.format(error=f"{type(error).__name__}: {error}")
                return
            self._step.gather_early(bucket, packed, self.group)
        self._sent.append(sent)
        self.num_sent += 1

    def _side_stream(self, inputs: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The stream that packs: behind those that reduce gradients and step."""
        if self._streams is None:
            return nullcontext()
        side, stepping = self._streams
        side.wait_stream(torch.cuda.current_stream(side.device))
        # It has updated the momenta, and read what was received in memory of the side stream.
        side.wait_stream(stepping)
        for tensor in inputs:
            tensor.record_stream(side)
        return torch.cuda.stream(side)

    @property
    def _present(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def _inputs(
        self, indices: Sequence[int], gradients: Mapping[int, Tensor | None]
    ) -> list[Tensor] | None:
        """The gradients and momenta of which directions are made; None where one is missing."""
        found = []
        for index in indices:
            bound, gradient = self._bound[index], gradients[index]
            momentum = self._present.state[bound.storage].get("momentum_buffer")
            if gradient is None or momentum is None:
                return None
            found += [gradient, bound.local(momentum)]
        return found

    def _settings(self, index: int) -> tuple[Any, ...]:
        group = self._present.param_groups[self._bound[index].group_index]
        return tuple(group[name] for name in _SETTINGS)

    # Step -------------------------------------------------------------------------------------

    def compare(self, gradients: Sequence[Tensor | None]) -> None:
        """See ``EarlyGathers.compare``."""
        if self._step is None:
            return
        device, sent = self._step.exchange.device, len(self._sent)
        self._own = torch.tensor([0, sent, -sent], dtype=torch.float64).to(device)
        if self._sent:
            self._own[0] = self._is_outdated(gradients)
        self._agreed = self._own.clone()
        reduce_largest_(self._agreed, self._bound[self._indices[0]].process_group)

    def _is_outdated(self, gradients: Sequence[Tensor | None]) -> Tensor | bool:
        """Whether what this rank has sent is no longer what it would send now."""
        if getattr(self._present, "grad_scale", None) is not None:
            self._problem = self._problem or _SCALED
        now = []
        for indices, _, settings in self._sent:
            if self._problem is not None:
                return True
            for index, then in zip(indices, settings, strict=True):
                if self._settings(index) != then:
                    name = self._bound[index].name
                    self._problem = _CHANGED_SETTINGS.format(name=name, settings=_SETTINGS)
            inputs = self._inputs(indices, {index: gradients[index] for index in indices})
            if inputs is None:
                self._problem = self._problem or _CHANGED
            else:
                now.append(fingerprint(inputs))
        if self._problem is not None:
            return True
        if self._streams is not None:
            torch.cuda.current_stream(self._streams[0].device).wait_stream(self._streams[0])
        return (torch.cat(now) != torch.cat([sent.fingerprint for sent in self._sent])).any()

    def settle(self) -> None:
        """See ``EarlyGathers.settle``."""
        if self._agreed is None or self._own is None:
            return
        is_outdated, most, minus_least = self._agreed.tolist()
        if most == 0:
            return
        if not is_outdated and most == -minus_least:
            self._num_failures, self._agreed = 0, None
            return
        is_own = bool(self._own[0])
        fallback = _CHANGED if is_own else _OTHERS if most != -minus_least else _ELSEWHERE
        problem = self._problem or fallback
        self._num_failures += 1
        self.drop()
        if self._num_failures == _PATIENCE:
            self.close(problem)
            self._step = None
        if self._is_closed or not self._has_warned:
            self._warn(problem)

    def _warn(self, problem: str) -> None:
        self._has_warned = True
        after = f"after {_PATIENCE} such steps in a row overlap_backward is switched off"
        if self._num_failures == _PATIENCE:
            after = f"overlap_backward is now off, after {_PATIENCE} such steps in a row"
        warnings.warn(
            "what was gathered during the backward pass is not used, with the same results but "
            f"no overlap, because {problem}. Note: {after}.",
            stacklevel=8,  # the caller of step(), which torch wraps twice
        )

    def drop(self) -> None:
        """See ``EarlyGathers.drop``; also what a step of other parameters would have used."""
        if self._step is None:
            return
        early = self._step.early
        self.num_dropped += len(early)
        if self._agreed is not None:
            for bucket, _ in self._buckets[len(self._sent) : int(self._agreed[1])]:
                exchange = self._step.exchange
                packed = exchange.pack_early(bucket, None)
                early[bucket] = exchange.early_gather(bucket, packed, self.group)
        while early:
            early.popitem()[1].wait()
        self._arrived.clear()
        self._sent.clear()
        self._problem = self._own = self._agreed = None
        device = self._step.exchange.device
        if device.type == "cuda":
            side = self._streams[0] if self._streams else torch.cuda.Stream(device)
            self._streams = side, torch.cuda.current_stream(device)


def takes_part(bound: BoundParameter, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a matrix parameter may travel early: the same on every rank."""
    rule = type(MATRIX_RULES[groups[bound.group_index]["update_rule"]])
    placements = getattr(bound.storage, "placements", ())
    is_sharded = any(not placement.is_replicate() for placement in placements)
    return is_sharded and rule.before is Muon.before and not rule.selects


def _early_buckets(
    plan: Plan, chosen: Sequence[bool], most_elements: int
) -> list[tuple[int, list[int]]]:
    """The buckets that may go early, with their parameters: the same on every rank.

    Args:
        plan: Of one process group.
        chosen: For each of its parameters, whether it takes part.
        most_elements: That a rank may send and receive of them all.
    """
    traffic = Traffic(plan.group_size)
    found = []
    for bucket, matrices in enumerate(plan.buckets):
        tensors = sorted({plan.matrices[index].tensor for index in matrices})
        if not plan.moves(bucket) or not all(chosen[tensor] for tensor in tensors):
            continue
        traffic.add(plan.matrices, plan.owners, matrices)
        both = zip(traffic.gather_sends, traffic.gather_receives, strict=True)
        if max(sent + received for sent, received in both) > most_elements:
            break
        found.append((bucket, tensors))
    return found


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """One-dimensional, int64: the bits of few elements, the sums of the bits of every 64 of many.

    A change of one element is always seen; only one that keeps the sum of the bits, read as
    integers, of every 64 is not. Version counters would not do: ``clip_grad_norm_`` on DTensors and
    collectives leave them as they are.
    """
    found = []
    for tensor in tensors:
        bits = tensor.contiguous().view(_BITS[tensor.itemsize]).flatten()
        if bits.numel() > _FEW:
            whole = bits.numel() // _RUN * _RUN
            found.append(bits[:whole].view(-1, _RUN).sum(1))
            bits = bits[whole:]
        found.append(bits.long())
    return torch.cat(found)


def _arrive(early: weakref.ref[EarlyQueue], index: int, param: Tensor) -> None:
    queue = early()
    if queue is not None:
        queue.arrive(index)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


__all__ = ["EarlyQueue", "fingerprint", "takes_part"]
