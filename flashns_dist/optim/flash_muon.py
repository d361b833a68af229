"""FlashMuon: Muon on sharded matrices, AdamW on the rest, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from flashns_dist.exchange import (
    Exchange,
    explain_on_every_rank,
    reduce_sum_,
)
from flashns_dist.optim.agreement import Verdict, agree_on_gradients
from flashns_dist.optim.auxiliary import step_auxiliary
from flashns_dist.optim.binding import (
    BoundParameter,
    check_view_names,
    full_shape,
    on_device_of,
    parameter_blocks,
)
from flashns_dist.optim.graph import GraphedStep, capture_problem
from flashns_dist.optim.learning_rate import AdjustLr
from flashns_dist.optim.members import (
    bound_members,
    complete_state,
    make_state,
    named_members,
    renew_state,
)
from flashns_dist.optim.options import ExchangeOptions, check_exchange
from flashns_dist.optim.overlap import EarlyGathers, check_overlap
from flashns_dist.optim.rules import AUXILIARY_RULES
from flashns_dist.optim.rules.rule import check_flag
from flashns_dist.optim.settings import (
    check_group,
    check_parameter,
    check_rule,
    check_used,
    init_state,
    rule_settings,
    state_problem,
)
from flashns_dist.optim.setup import Setup
from flashns_dist.optim.speculation import Speculation
from flashns_dist.optim.state import (
    check_loadable,
    completed_state_dict,
    plain_state_dict,
    restore_dtypes,
)
from flashns_dist.optim.step import MatrixStep
from flashns_dist.orthogonalize import Coefficients

_KEPT = (
    "nonfinite",
    "exchange_options",
    "cuda_graph",
    "_aux_defaults",
    "_settings",
)  # in pickles and copies


class FlashMuon(Optimizer):
    """Muon (arXiv 2502.16982) for matrices that are sharded in any way, with auxiliary AdamW.

    Each matrix is put together on one rank, orthogonalized there once, and the result is sent back
    to the ranks that store it. The weights do not depend on the sharding or the number of ranks.

    ``step()`` makes, on each process group that stores parameters, one small ``all_reduce`` (which
    parameters have gradients, and whether they are finite) and two ``all_to_all_single`` per
    bucket. Every rank must call it. State exists from construction, sharded as the parameters.

    Args:
        params: Parameters, named parameters, or groups as ``parameter_groups`` makes them. A
            group's ``"update_rule"`` is ``"muon"`` or another one for matrices (parameters
            ``(n, m)``, or ``(experts, n, m)`` for a matrix each), or ``"adamw"`` or another one for
            auxiliary parameters of any shape. The arguments below can be set per group (``aux_lr``
            and ``aux_weight_decay`` as ``"lr"`` and ``"weight_decay"``; not ``nonfinite``,
            ``exchange`` and ``cuda_graph``), and ``"matrix_view"`` (of ``flashns_dist.layout``, or
            a mapping from name patterns to them): which parts of a parameter are matrices.
        lr: Learning rate of the matrices; times ``adjust_lr_fn``'s factor, the spectral norm of one
            step's change.
        weight_decay: Decoupled: a step multiplies the weights by ``1 - lr * weight_decay``.
        momentum: Decay of the momentum, an exponential average as in ``torch.optim.Muon``.
        nesterov: Orthogonalize ``momentum * m + (1 - momentum) * g`` instead of ``m``.
        adjust_lr_fn: ``"original"`` (sqrt(max(1, rows / cols))), ``"match_rms_adamw"``
            (0.2 sqrt(max(rows, cols))), ``"spectral"`` (sqrt(rows / cols)), ``"none"``, a callable
            from (rows, cols), or None for ``"original"`` as in ``torch.optim.Muon``.
        method: How to orthogonalize: see ``flashns_dist.orthogonalize.orthogonalize``.
        ns_coefficients: A ``Coefficients`` object, a preset's name, one ``(a, b, c)`` row (used
            ``ns_steps`` times), or None for the method's own.
        ns_steps: Uses of a single row; refused if not 5 without one.
        ns_dtype: Dtype of the iteration (None: fp16 on an accelerator, fp32 on the CPU).
        backend: Kernels to use: ``"auto"``, ``"torch"``, ``"triton"`` or ``"quack"``.
        aux_lr, betas, eps, aux_weight_decay: AdamW's arguments for the auxiliary groups.
        cautious: Decay a weight only where the update shrinks it too.
        rounding: ``"nearest"``, or ``"stochastic"`` for bf16 matrices.
        nonfinite: What to do with a NaN or infinity in a gradient: ``"raise"`` on every rank, or
            ``"skip"`` the step on every rank. Weights and state are untouched either way.
        exchange: How matrices travel.
        cuda_graph: Replay the matrices' part of a step from a CUDA graph, from its second time on:
            for models whose step is over before the host has launched it. Learning rates and the
            like stay live; batches keep their memory (``release_graphs`` frees it). The first step
            says why where it cannot be.
        update_rule: Of the groups that name none: see ``docs/optimizers.md``.
        settings: Settings that only some update rules have (``flashns_dist.optim.rules``), for the
            groups whose rule has them.

    Raises:
        ValueError: An argument or a parameter is unsuitable; the message names it.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        adjust_lr_fn: AdjustLr = "original",
        method: str = "auto",
        ns_coefficients: Coefficients | str | Sequence[Any] | None = None,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        backend: str = "auto",
        aux_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        aux_weight_decay: float = 0.0,
        cautious: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        nonfinite: Literal["raise", "skip"] = "raise",
        exchange: ExchangeOptions | None = None,
        cuda_graph: bool = False,
        update_rule: str = "muon",
        **settings: Any,
    ) -> None:
        check_exchange(exchange)
        check_flag("cuda_graph", cuda_graph)
        check_rule(update_rule)
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f'nonfinite={nonfinite!r} is unknown; use "raise" or "skip"')
        self.nonfinite = nonfinite
        self.exchange_options = exchange or ExchangeOptions()
        self.cuda_graph = bool(cuda_graph)
        check_overlap(self.exchange_options, cuda_graph=self.cuda_graph)
        self._settings = settings
        self._aux_defaults = {"lr": aux_lr, "weight_decay": aux_weight_decay}
        self._bound: list[BoundParameter] = []
        self._steps: dict[tuple[int, tuple[bool, ...]], MatrixStep | GraphedStep] = {}
        self._checked = False
        self._expected: tuple[bool, ...] | None = None
        self._has_changed = True  # since the parameters were bound
        self._world: object = None
        self._early = EarlyGathers(self.exchange_options)
        self._adapter: Callable[[], list[BoundParameter]] | None = None
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn,
            "method": method,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "backend": backend,
            "betas": betas,
            "eps": eps,
            "cautious": cautious,
            "rounding": rounding,
            "update_rule": update_rule,
            "matrix_view": None,
        }
        super().__init__(params, defaults)
        check_used(settings, {update_rule, *(g["update_rule"] for g in self.param_groups)})

    # Construction -----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; on an error nothing is added. Collectives: as ``bind_parameter``.

        Raises:
            ValueError: A setting or a parameter is unsuitable; the message names it.
        """
        group = dict(param_group)
        name = group.setdefault("update_rule", self.defaults["update_rule"])
        specific = rule_settings(name, self._settings)
        if name in AUXILIARY_RULES:
            specific |= self._aux_defaults
        for key, value in specific.items():
            group.setdefault(key, value)
        check_group({**self.defaults, **group})
        before = len(self.param_groups)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            check_view_names([name for name, _ in self._named(before)], added)
            for name, param in self._named(before):
                check_parameter(name, param, added)
        except Exception:  # a view of the user's may raise anything
            del self.param_groups[before:]
            raise
        make_state(self.state, self._named(before), added)
        self._change()

    def _named(self, group_index: int) -> list[tuple[str, Tensor]]:
        return named_members(self.param_groups, group_index)

    def bind(self, adapter: Callable[[], list[BoundParameter]]) -> None:
        """Let an adapter say where the parameters lie, instead of their DTensor placements.

        Args:
            adapter: Called at the next step, and again whenever groups change; returns every
                logical parameter in the same order on every rank of its process group.

        Raises:
            ValueError: ``overlap_backward=True``.
        """
        check_overlap(self.exchange_options, has_adapter=True)
        self._adapter = adapter
        self._change()

    def _change(self) -> None:
        """The next step binds anew, on every rank."""
        self._has_changed = True
        self._early.retire()

    def _unbind(self) -> None:
        self._early.unbind()
        self._bound, self._steps, self._checked, self._expected = [], {}, False, None

    def _bind(self) -> None:
        """Find out where the parameters lie, if that is not known or no longer true."""
        if self._bound and not self._has_changed:
            return
        self._unbind()
        self._has_changed, self._world = False, _world()
        if self._adapter is not None:
            self._bound = self._adapter()
        else:
            renew_state(self.state, self.param_groups)
            self._bound = bound_members(self.param_groups, self._replica_group())
        self._setup = Setup(
            self._bound,
            lambda: self.param_groups,
            self.exchange_options,
            self.cuda_graph,
            nonfinite=self.nonfinite,
            has_adapter=self._adapter is not None,
        )
        self._early.bind(self, self._bound, self._setup.matrices)

    def _replica_group(self) -> dist.ProcessGroup | None:
        group = self.exchange_options.replica_group
        return _world() if isinstance(group, str) else group

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: self.__dict__[k] for k in _KEPT}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_bound" not in self.__dict__:  # a copy; load_state_dict comes here too
            self._adapter, self._world = None, None
            self._early = EarlyGathers(self.exchange_options)
            self._unbind()
        self._change()

    # Step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient on some rank.

        Nothing changes before all ranks agree that they can step.

        Args:
            closure: Evaluates the loss again and returns it.

        Raises:
            RuntimeError: Ranks disagree about parameters, plans or gradients.
            ValueError: No plan fits into ``ExchangeOptions(memory_bytes=...)``.
            FloatingPointError: A gradient is not finite and ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._world is not _world():  # the process groups are gone
            self._unbind()
        if not self._bound:
            self._bind()
        while self._bound:
            with on_device_of(self._bound[0]):  # where kernels are launched
                is_done = self._run_step()
            if is_done:
                break
            self._bind()
        return loss

    def _run_step(self) -> bool:
        """A step of the bound parameters, unless some rank has others now: then nothing."""
        setup = self._setup
        if not self._checked:
            try:
                setup.check(self.state)
            except Exception:
                self._unbind()  # what is wrong with a parameter may be mended
                raise
            self._checked = True
        if setup.is_outdated:
            self._change()
        gradients, problem = self._local_gradients()
        settings, invalid = setup.settings(is_outdated=self._has_changed)
        problem = invalid or problem
        if not self._has_changed and problem is None:
            for (number, _), step in self._steps.items():  # while the device works on gradients
                chosen = [gradients[i] for i in setup.matrices[number]]
                step.prepare(self.param_groups, self.state, chosen)
        found_inf = getattr(self, "found_inf", None)
        speculation = self._speculation(gradients, problem)
        self._early.compare(gradients)
        try:
            verdict = agree_on_gradients(
                self._bound,
                setup.members,
                gradients,
                problem,
                found_inf,
                settings,
                setup.unaveraged,
                speculation.observe if speculation else Tensor.cpu,
            )
            if verdict.is_outdated:
                self._early.settle()
                self._has_changed = True
                return False
            if self._must_skip(verdict):
                return True
            self._early.settle()
            self._make_steps(verdict.active)  # all of them, before any changes something
            self._unscale(gradients)
            has_run = speculation is not None and speculation.has_run
            for number, indices in enumerate(setup.matrices):
                self._step_matrices(number, indices, verdict.active, gradients, has_run=has_run)
        finally:
            self._early.drop()
        self._expected = verdict.active if verdict.is_simple else None
        step_auxiliary(self._bound, self.param_groups, self.state, verdict.active, gradients)
        return True

    def _speculation(
        self, gradients: Sequence[Tensor | None], problem: str | None
    ) -> Speculation | None:
        """What replays the step that is expected, if that is possible on the other ranks too."""
        setup, expected = self._setup, self._expected
        if expected is None or setup.unaveraged:
            return None
        indices = setup.matrices[0]
        step = self._steps.get((0, tuple(expected[i] for i in indices)))
        if not isinstance(step, GraphedStep) or not step.is_predictable:
            return None
        scaler = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        return Speculation(
            step,
            expected,
            self.param_groups,
            self.state,
            [gradients[i] for i in indices],
            is_possible=problem is None
            and not self._has_changed
            and all(value is None for value in scaler),
        )

    def _local_gradients(self) -> tuple[list[Tensor | None], str | None]:
        """This rank's gradients, and the first thing that is wrong with them or the state."""
        gradients: list[Tensor | None] = []
        problem: str | None = None
        for bound in self._bound:
            try:
                gradients.append(bound.gradient)
            except ValueError as error:
                gradients.append(None)
                problem = problem or str(error)
        return gradients, problem or state_problem(self._bound, self.state)

    def _must_skip(self, verdict: Verdict) -> bool:
        """Whether some rank has a non-finite gradient; raises where asked to."""
        if verdict.is_finite:
            return verdict.found_inf
        if self.nonfinite == "raise" and getattr(self, "found_inf", None) is None:
            names = verdict.nonfinite
            where = ", ".join(names[:3]) or "a parameter of another process group"
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise FloatingPointError(
                f"the gradient of {where}{more} has a NaN or an infinity on some rank. Weights and "
                'state are unchanged. Use FlashMuon(nonfinite="skip") to skip such steps.'
            )
        return True

    def _unscale(self, gradients: Sequence[Tensor | None]) -> None:
        """Divide by the GradScaler's scale where it has not been done."""
        scale = getattr(self, "grad_scale", None)
        chosen = [g for g in gradients if g is not None and g.numel()]
        if scale is not None and chosen:
            torch._foreach_mul_(chosen, scale.to(chosen[0].device).double().reciprocal().float())

    def _make_steps(self, active: Sequence[bool]) -> None:
        """The steps of all process groups for these parameters, where they are others than before.

        Raises:
            ValueError: One cannot be captured.
        """
        for number, indices in enumerate(self._setup.matrices):
            flags = tuple(active[i] for i in indices)
            if any(flags) and (number, flags) not in self._steps:
                self._steps = {k: v for k, v in self._steps.items() if k[0] != number}
                self._steps[number, flags] = self._matrix_step(indices, flags)

    def _step_matrices(
        self,
        number: int,
        indices: Sequence[int],
        active: Sequence[bool],
        gradients: Sequence[Tensor | None],
        *,
        has_run: bool,
    ) -> None:
        flags = tuple(active[i] for i in indices)
        if not any(flags):
            return
        self._count_steps([self._bound[i] for i in indices if active[i]])
        if has_run:
            return
        step = self._steps[number, flags]
        if isinstance(step, MatrixStep):
            self._early.watch(number, step)
        step.run(self.param_groups, self.state, [gradients[i] for i in indices])

    def _matrix_step(
        self, indices: Sequence[int], flags: tuple[bool, ...]
    ) -> MatrixStep | GraphedStep:
        plan, resident = self._setup.plan(indices, flags)
        bound = [self._bound[i] for i in indices]
        first = bound[0]
        device = first.local(first.storage).device
        exchange = Exchange(
            plan,
            first.process_group,
            first.group_rank,
            device,
            self.exchange_options.wire_dtype,
        )
        step = MatrixStep(bound, plan, exchange, resident, self.param_groups)
        if not self.cuda_graph:
            return step
        problems = explain_on_every_rank(capture_problem(step, device), first.process_group)
        if problems:
            rank, text = problems[0]
            raise ValueError(f"cuda_graph=True cannot be: on rank {rank}, {text}")
        return GraphedStep(step)

    def release_graphs(self) -> None:
        """Free the CUDA graphs and their memory; the next steps capture anew. For every rank."""
        if self.cuda_graph:
            self._steps = {}

    def _count_steps(self, bound: Iterable[BoundParameter]) -> None:
        storages = {id(b.storage): b.storage for b in bound}.values()
        torch._foreach_add_([self.state[storage]["step"] for storage in storages], 1)

    # Checkpoints ------------------------------------------------------------------------------

    @torch.no_grad()
    def average_momenta(self) -> None:
        """Make momenta that ``compressed_gradients`` lets differ between replicas their average.

        To be called on every rank before saving a checkpoint, which holds one replica's state.
        Training goes on as it would have. Collectives: one ``all_reduce`` per such parameter.
        """
        self._bind()
        for index in sorted(self._setup.unaveraged):
            bound = self._bound[index]
            momentum = bound.local(self.state[bound.storage]["momentum_buffer"])
            reduce_sum_(momentum, bound.process_group)
            momentum.div_(bound.layout.group_size)

    def state_dict(self) -> dict[str, Any]:
        """As every torch optimizer's, without the settings that are not plain values."""
        return plain_state_dict(super().state_dict(), keep_keys=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or ``torch.optim.Muon``'s for the same parameters.

        The momentum keeps the precision that it was saved in (at most fp32 where it is kept in
        fp32); settings that the checkpoint lacks keep their present values. No collectives.

        Raises:
            ValueError: The checkpoint has other groups, update rules, shapes or placements; nothing
                has changed.
        """
        completed = completed_state_dict(state_dict, self.param_groups)
        for index, group in enumerate(completed["param_groups"]):
            for (name, param), key in zip(self._named(index), group["params"], strict=False):
                entry = completed["state"].get(key, {})
                blocks = parameter_blocks(name, full_shape(param), group)
                check_loadable(name, param, entry, group, blocks)
        super().load_state_dict(completed)
        restore_dtypes(self, completed)
        complete_state(self.state, self.param_groups)
        self._change()


def _world() -> dist.ProcessGroup | None:
    """The world's process group, None without one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


__all__ = ["FlashMuon", "init_state"]
