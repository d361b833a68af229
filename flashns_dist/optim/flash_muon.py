"""FlashMuon: Muon on sharded matrices, AdamW on the rest, in one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from flashns_dist.exchange import Exchange, check_same_setup
from flashns_dist.optim.adamw import adamw_step, init_adamw_state
from flashns_dist.optim.agreement import Verdict, agree_on_gradients
from flashns_dist.optim.binding import (
    BoundParameter,
    bind_parameter,
    check_view_names,
    group_view,
    parameter_blocks,
)
from flashns_dist.optim.learning_rate import AdjustLr, check_adjust_lr
from flashns_dist.optim.rounding import element_noise, stochastic_round_
from flashns_dist.optim.state import completed_state_dict, plain_state_dict, restore_dtypes
from flashns_dist.optim.step import ExchangeOptions, MatrixStep, plan_matrices, rounding_seed
from flashns_dist.orthogonalize import (
    POLAR_EXPRESS,
    Coefficients,
    orthogonalize,
    resolve_coefficients,
)

UPDATE_RULES = ("muon", "adamw")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class FlashMuon(Optimizer):
    """Muon (arXiv 2502.16982) for matrices that are sharded in any way, with auxiliary AdamW.

    Each matrix is put together on one rank, orthogonalized there once, and the result is sent back
    to the ranks that store it. The weights do not depend on the sharding or the number of ranks.

    ``step()`` makes, on each process group that stores parameters, one small ``all_reduce`` (which
    parameters have gradients, and whether they are finite) and two ``all_to_all_single`` per
    bucket. Every rank must call it. State exists from construction, sharded as the parameters.

    Args:
        params: Parameters, named parameters, or groups as ``parameter_groups`` makes them. A
            group's ``"update_rule"`` is ``"muon"`` (default; parameters ``(n, m)``, or
            ``(experts, n, m)`` for a matrix each) or ``"adamw"`` (any shape). Any argument below
            can be set per group, and ``"matrix_view"`` (of ``flashns_dist.layout``, or a mapping
            from name patterns to them): which parts of a parameter are matrices.
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
        ns_steps: Number of steps of a single row.
        ns_dtype: Dtype of the iteration (None: fp16 on an accelerator, fp32 on the CPU).
        backend: Kernels to use: ``"auto"``, ``"torch"``, ``"triton"`` or ``"quack"``.
        aux_lr, betas, eps, aux_weight_decay: AdamW's arguments for the auxiliary groups.
        cautious: Decay a weight only where the update shrinks it too.
        rounding: ``"nearest"``, or ``"stochastic"`` for bf16 matrices.
        nonfinite: What to do with a NaN or infinity in a gradient: ``"raise"`` on every rank, or
            ``"skip"`` the step on every rank. Weights and state are untouched either way.
        exchange: How matrices travel.

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
    ) -> None:
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f'nonfinite={nonfinite!r} is unknown; use "raise" or "skip"')
        self.nonfinite = nonfinite
        self.exchange_options = exchange or ExchangeOptions()
        self._aux_defaults = {"lr": aux_lr, "weight_decay": aux_weight_decay}
        self._bound: list[BoundParameter] = []
        self._steps: dict[tuple[int, tuple[bool, ...]], MatrixStep] = {}
        self._checked = False
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
            "update_rule": "muon",
            "matrix_view": None,
        }
        super().__init__(params, defaults)

    # Construction -----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; on an error nothing is added. Collectives: as ``bind_parameter``.

        Raises:
            ValueError: A setting or a parameter is unsuitable; the message names it.
        """
        group = dict(param_group)
        if group.get("update_rule") == "adamw":
            for key, value in self._aux_defaults.items():
                group.setdefault(key, value)
        settings = {**self.defaults, **group}
        check_group(settings)
        before = len(self.param_groups)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            check_view_names([name for name, _ in self._named(before)], added)
            for name, param in self._named(before):
                check_parameter(name, param, added)
        except ValueError:
            del self.param_groups[before:]
            raise
        for _, param in self._named(before):
            self.state[param].update(init_state(param, added))
        self._unbind()

    def _named(self, group_index: int) -> list[tuple[str, Tensor]]:
        group = self.param_groups[group_index]
        names = group.get("param_names") or [
            f"parameter {i} of group {group_index}" for i in range(len(group["params"]))
        ]
        return list(zip(names, group["params"], strict=True))

    def bind(self, adapter: Callable[[], list[BoundParameter]]) -> None:
        """Let an adapter say where the parameters lie, instead of their DTensor placements.

        Args:
            adapter: Called at the next step, and again whenever groups change; returns every
                logical parameter in the same order on every rank of its process group.
        """
        self._adapter = adapter
        self._unbind()

    def _unbind(self) -> None:
        self._bound, self._steps, self._checked = [], {}, False

    def _bind(self) -> None:
        if self._bound:
            return
        if self._adapter is not None:
            self._bound = self._adapter()
            return
        replica_group = self._replica_group()
        self._bound = [
            bind_parameter(
                name,
                param,
                index,
                replica_group,
                parameter_blocks(name, param.shape, self.param_groups[index]),
            )
            for index in range(len(self.param_groups))
            for name, param in self._named(index)
        ]

    def _replica_group(self) -> dist.ProcessGroup | None:
        group = self.exchange_options.replica_group
        if not isinstance(group, str):
            return group
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: self.__dict__[k] for k in ("nonfinite", "exchange_options", "_aux_defaults")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_adapter", None)
        self._unbind()

    # Step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient on some rank.

        Nothing changes before all ranks agree that they can step.

        Args:
            closure: Evaluates the loss again and returns it.

        Raises:
            RuntimeError: Ranks disagree about parameters, plans or gradients.
            FloatingPointError: A gradient is not finite and ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._bind()
        if not self._bound:
            return loss
        self._check_setup()
        gradients, problem = self._local_gradients()
        members = self._members()
        found_inf = getattr(self, "found_inf", None)
        verdict = agree_on_gradients(self._bound, members, gradients, problem, found_inf)
        if self._must_skip(verdict):
            return loss
        self._unscale(gradients)
        for number, indices in enumerate(members):
            self._step_matrices(number, indices, verdict.active, gradients)
        self._step_auxiliary(verdict.active, gradients)
        return loss

    def _members(self) -> list[list[int]]:
        """Bound parameters by process group, smallest group first, the same on all ranks."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index, bound in enumerate(self._bound):
            found.setdefault(bound.group_ranks, []).append(index)
        return [found[ranks] for ranks in sorted(found, key=lambda ranks: (len(ranks), ranks))]

    def _matrices(self, indices: Sequence[int]) -> list[BoundParameter]:
        return [
            bound
            for bound in (self._bound[i] for i in indices)
            if self.param_groups[bound.group_index]["update_rule"] == "muon"
        ]

    def _kind(self, bound: BoundParameter) -> str:
        group = self.param_groups[bound.group_index]
        coefficients = resolve_ns_coefficients(group)
        digest = coefficients.digest if coefficients is not None else "default"
        settings = [group["method"], digest, group["ns_dtype"], group["backend"]]
        return f"{settings}:{self.exchange_options.wire_dtype}"

    def _check_setup(self) -> None:
        if self._checked:
            return
        for indices in self._members():
            entries = []
            for bound in (self._bound[i] for i in indices):
                group = self.param_groups[bound.group_index]
                setting = [group[k] for k in ("update_rule", "nesterov", "cautious", "rounding")]
                dtype, kind = bound.storage.dtype, self._kind(bound)
                digest = f"{bound.layout.digest}:{dtype}:{setting}:{kind}:{hash(bound.blocks)}"
                entries.append((bound.name, digest))
            matrices = self._matrices(indices)
            digest = "none"
            if matrices:
                kinds = [self._kind(b) for b in matrices]
                options = self.exchange_options
                digest = plan_matrices(matrices, [True] * len(matrices), kinds, options).digest
            check_same_setup(entries, digest, self._bound[indices[0]].process_group)
        self._checked = True

    def _local_gradients(self) -> tuple[list[Tensor | None], str | None]:
        """This rank's gradients, and the first thing that is wrong with them."""
        gradients: list[Tensor | None] = []
        problem = None
        for bound in self._bound:
            try:
                gradients.append(bound.gradient)
            except ValueError as error:
                gradients.append(None)
                problem = problem or str(error)
        return gradients, problem

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

    def _step_matrices(
        self,
        number: int,
        indices: Sequence[int],
        active: Sequence[bool],
        gradients: Sequence[Tensor | None],
    ) -> None:
        muon = [
            i
            for i in indices
            if self.param_groups[self._bound[i].group_index]["update_rule"] == "muon"
        ]
        flags = tuple(active[i] for i in muon)
        if not any(flags):
            return
        key = (number, flags)
        if key not in self._steps:
            self._steps = {k: v for k, v in self._steps.items() if k[0] != number}
            self._steps[key] = self._matrix_step([self._bound[i] for i in muon], flags)
        self._count_steps([self._bound[i] for i in muon if active[i]])
        self._steps[key].run(self.param_groups, self.state, [gradients[i] for i in muon])

    def _matrix_step(self, bound: list[BoundParameter], flags: tuple[bool, ...]) -> MatrixStep:
        kinds = [self._kind(b) for b in bound]
        plan = plan_matrices(bound, flags, kinds, self.exchange_options)
        first = bound[0]
        exchange = Exchange(
            plan,
            first.process_group,
            first.group_rank,
            first.local(first.storage).device,
            self.exchange_options.wire_dtype,
        )
        return MatrixStep(bound, plan, exchange, orthogonalize_batch)

    def _count_steps(self, bound: Iterable[BoundParameter]) -> None:
        for storage in {id(b.storage): b.storage for b in bound}.values():
            self.state[storage]["step"] += 1

    def _step_auxiliary(self, active: Sequence[bool], gradients: Sequence[Tensor | None]) -> None:
        for group_index, group in enumerate(self.param_groups):
            if group["update_rule"] != "adamw":
                continue
            chosen = [
                i
                for i, bound in enumerate(self._bound)
                if bound.group_index == group_index and active[i]
            ]
            bound = [self._bound[i] for i in chosen]
            weights = [b.local(b.storage) for b in bound]
            local_gradients = [
                torch.zeros_like(w) if (g := gradients[i]) is None else g
                for i, w in zip(chosen, weights, strict=True)
            ]
            states = [
                {
                    key: value if key == "step" else b.local(value)
                    for key, value in self.state[b.storage].items()
                }
                for b in bound
            ]
            adamw_step(weights, local_gradients, states, group, _Writer(bound, states, group))

    # Checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As every torch optimizer's; settings that are not plain values are left out."""
        return plain_state_dict(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or ``torch.optim.Muon``'s for the same parameters.

        The momentum keeps the precision that it was saved in (at most fp32 where it is kept in
        fp32); settings that the checkpoint lacks keep their present values.
        """
        completed = completed_state_dict(state_dict, self.param_groups)
        super().load_state_dict(completed)
        restore_dtypes(self, completed)
        self._unbind()


class _Writer:
    """Writes fp32 results of AdamW into weights of lower precision."""

    def __init__(
        self, bound: list[BoundParameter], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> None:
        self._bound, self._states, self._group = bound, states, group

    def __call__(self, index: int, value: Tensor) -> None:
        bound = self._bound[index]
        weight = bound.local(bound.storage)
        if self._group["rounding"] == "nearest":
            weight.copy_(value)
            return
        seed = int(self._states[index]["step"].item()) * 1_000_003 + rounding_seed(bound.name)
        for fragment in bound.layout.fragments[bound.group_rank]:
            noise = element_noise(seed, fragment.box, bound.layout.shape, weight.device)
            stochastic_round_(fragment.view(weight), fragment.view(value), noise)


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a setting out of range, naming it."""
    if group["update_rule"] not in UPDATE_RULES:
        raise ValueError(f"update_rule={group['update_rule']!r}: use one of {UPDATE_RULES}")
    for key in ("lr", "weight_decay", "eps"):
        if not float(group[key]) >= 0:
            raise ValueError(f"{key}={group[key]} must not be negative")
    if not 0 <= float(group["momentum"]) < 1:
        raise ValueError(f"momentum={group['momentum']} must be in [0, 1)")
    if len(group["betas"]) != 2 or not all(0 <= float(b) < 1 for b in group["betas"]):
        raise ValueError(f"betas={group['betas']} must be two numbers in [0, 1)")
    if group["rounding"] not in ("nearest", "stochastic"):
        raise ValueError(f'rounding={group["rounding"]!r}: use "nearest" or "stochastic"')
    check_adjust_lr(group["adjust_lr_fn"])
    resolve_ns_coefficients(group)
    if group["update_rule"] == "muon":
        orthogonalize_batch(torch.zeros(0, 2, 2), group)


def check_parameter(name: str, param: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that its group's update rule cannot take."""
    if param.dtype not in _FLOATS:
        raise ValueError(
            f"{name}: dtype {param.dtype} is not supported; parameters must be fp32, fp64, bf16 or "
            "fp16"
        )
    if group["rounding"] == "stochastic" and param.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name}: stochastic rounding is for bf16, not {param.dtype}")
    if group["update_rule"] == "adamw":
        return
    if group_view(name, group) is not None:
        parameter_blocks(name, param.shape, group)
    elif not 2 <= param.ndim <= 3:
        raise ValueError(
            f"{name}: shape {tuple(param.shape)} is not a matrix or a stack of matrices; put it "
            'into a group with update_rule="adamw" (parameter_groups does), or give the group a '
            "matrix_view (Flattened() for convolutions)"
        )


def init_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Zero state in the parameter's sharding, in fp32 (fp64 for fp64 parameters)."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    if group["update_rule"] == "adamw":
        return init_adamw_state(param.detach(), dtype)
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "momentum_buffer": torch.zeros_like(param.detach(), dtype=dtype),
    }


def resolve_ns_coefficients(group: dict[str, Any]) -> Coefficients | None:
    """The group's coefficients as an object; None for the method's own."""
    given = group["ns_coefficients"]
    if given is None:
        return None
    if isinstance(given, list | tuple) and all(isinstance(v, int | float) for v in given):
        given = [given] * int(group["ns_steps"])
    return resolve_coefficients(given, POLAR_EXPRESS)


def orthogonalize_batch(batch: Tensor, group: dict[str, Any]) -> Tensor:
    """Orthogonalize a ``(batch, rows, cols)`` stack as a parameter group asks."""
    return orthogonalize(
        batch,
        method=group["method"],
        coefficients=resolve_ns_coefficients(group),
        dtype=group["ns_dtype"],
        backend=group["backend"],
    )


__all__ = ["FlashMuon"]
