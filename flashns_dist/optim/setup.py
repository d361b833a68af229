"""What is fixed once parameters are bound: process groups, plans, and that all ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from flashns_dist.exchange import check_same_setup
from flashns_dist.exchange.probe import first_value
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.machine import calibrated_cost
from flashns_dist.optim.options import ExchangeOptions
from flashns_dist.optim.rules import MATRIX_RULES
from flashns_dist.optim.rules.muon import resolve_ns_coefficients
from flashns_dist.optim.settings import (
    check_states,
    check_values,
    is_matrix_rule,
    rule_settings,
)
from flashns_dist.optim.step import matrices_of, plan_matrices
from flashns_dist.plan import CostModel, Matrix, Plan


class Setup:
    """The bound parameters of an optimizer.

    Args:
        bound: All of them, in the same order on every rank of a process group.
        groups: Answers the optimizer's present ``param_groups``.
        options: How matrices travel.
        cuda_graph: Whether steps are replayed.

    Attributes:
        problem: Why no rank may step, once ``check`` has found it out.
    """

    def __init__(
        self,
        bound: Sequence[BoundParameter],
        groups: Callable[[], Sequence[dict[str, Any]]],
        options: ExchangeOptions,
        cuda_graph: bool,
    ) -> None:
        self.bound = bound
        self._cuda_graph = cuda_graph
        self._present = groups
        self._options = options
        self.problem: str | None = None
        self._costs: dict[tuple[int, ...], CostModel | None] = {}
        self._plans: dict[tuple[int, ...], tuple[Plan, list[Matrix]]] = {}
        self._planned = self._plan_settings()

    @property
    def _groups(self) -> Sequence[dict[str, Any]]:
        return self._present()

    @cached_property
    def members(self) -> list[list[int]]:
        """Indices of parameters by process group, smallest group first, the same on all ranks."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index, bound in enumerate(self.bound):
            found.setdefault(bound.group_ranks, []).append(index)
        return [found[ranks] for ranks in sorted(found, key=lambda ranks: (len(ranks), ranks))]

    @cached_property
    def matrices(self) -> list[list[int]]:
        """Those of ``members`` whose update rule is for matrices."""
        return [
            [i for i in indices if is_matrix_rule(self._groups[self.bound[i].group_index])]
            for indices in self.members
        ]

    @property
    def unaveraged(self) -> set[int]:
        """The parameters whose replicas have gradients and momenta of their own (Dion)."""
        return {
            index
            for index, bound in enumerate(self.bound)
            if self._groups[bound.group_index].get("compressed_gradients")
        }

    @property
    def is_outdated(self) -> bool:
        """Whether a group has other settings than those that matrices were batched by.

        Raises:
            ValueError: A group has another update rule.
        """
        planned = zip(self._groups, self._planned, strict=False)
        for number, (group, (rule, *_)) in enumerate(planned):
            if group["update_rule"] != rule:
                raise ValueError(
                    f"group {number}: its update_rule was {rule!r} and is now "
                    f"{group['update_rule']!r}, which keeps another state; make a new optimizer"
                )
        return self._plan_settings() != self._planned

    def _plan_settings(self) -> list[tuple[str, str, object]]:
        """What of each group plans depend on."""
        return [
            (group["update_rule"], self._kind(group), group.get("matrix_view"))
            for group in self._groups
        ]

    def check(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Compare the setups of all ranks, and agree on the cost model.

        A plan that does not fit is left in ``problem``, so that the ranks of other process groups
        learn of it too. Collectives: one ``broadcast`` and one small comparison on each process
        group.

        Args:
            state: Of the optimizer.

        Raises:
            RuntimeError: Ranks disagree about parameters, settings, layouts or plans.
            NotImplementedError: An update rule cannot take a layout.
            ValueError: A setting is out of range.
        """
        for group in self._groups:
            check_values(group)
        check_states(self.bound, self._groups, state)
        for bound in self.bound:
            group = self._groups[bound.group_index]
            if is_matrix_rule(group):
                MATRIX_RULES[group["update_rule"]].check_layout(bound, group)
        for indices, matrices in zip(self.members, self.matrices, strict=True):
            first = self.bound[indices[0]]
            cost = self._options.cost
            if cost is None:
                cost = calibrated_cost(first.local(first.storage).device)
            self._costs[first.group_ranks] = first_value(cost, first.process_group)
            entries = [(self.bound[i].name, self._digest(self.bound[i])) for i in indices]
            digest = "none"
            if matrices:
                digest = self._plan_digest(matrices)
                digest += str((self._exchanged, self._cuda_graph))
            check_same_setup(entries, digest, first.process_group)

    def _plan_digest(self, indices: Sequence[int]) -> str:
        try:
            return self.plan(indices, [True] * len(indices))[0].digest
        except ValueError as error:  # nothing fits into the memory that there may be
            self.problem = self.problem or str(error)
            return "none"

    def plan(self, indices: Sequence[int], active: Sequence[bool]) -> tuple[Plan, list[Matrix]]:
        """The plan of the matrices that travel, and those that do not.

        Args:
            indices: Matrix parameters of one process group.
            active: Which of them have a gradient on some rank. If not all, and no plan of theirs
                fits into the options' memory, the plan is one of those that take least: other
                matrices may have changed already.

        Raises:
            ValueError: No plan of all fits.
        """
        is_whole = all(active)
        if is_whole and tuple(indices) in self._plans:
            return self._plans[tuple(indices)]
        bound = [self.bound[i] for i in indices]
        kinds = [self._kind(self._groups[b.group_index]) for b in bound]
        travelling, resident = (
            matrices_of(
                bound,
                active,
                kinds,
                self._groups,
                travel=travel,
                wire_dtype=self._options.wire_dtype,
            )
            for travel in (True, False)
        )
        cost = self._costs.get(bound[0].group_ranks)
        if self._cuda_graph:
            cost = (cost or CostModel()).without_launches()
        size = bound[0].layout.group_size
        plan = plan_matrices(travelling, size, self._options, cost, must_fit=is_whole)
        if is_whole:
            self._plans[tuple(indices)] = plan, resident
        return plan, resident

    @property
    def _exchanged(self) -> tuple[object, ...]:
        """What must agree of how matrices travel, beside the plan."""
        options = self._options
        chosen = options.memory_bytes, options.bucket_bytes, options.replicas
        return options.overlap_backward, options.overlap_bytes, *chosen

    def _kind(self, group: Mapping[str, Any]) -> str:
        """What must agree for matrices to be one batch."""
        if not is_matrix_rule(group):
            return str(group["update_rule"])
        coefficients = resolve_ns_coefficients(group)
        digest = coefficients.digest if coefficients is not None else "default"
        settings = [group["method"], digest, group["ns_dtype"], group["backend"]]
        rule = MATRIX_RULES[group["update_rule"]].kind(group)
        return f"{rule}:{settings}:{self._options.wire_dtype}"

    def _digest(self, bound: BoundParameter) -> str:
        """What must agree between ranks about a parameter."""
        group = self._groups[bound.group_index]
        keys = ("update_rule", "nesterov", "cautious", "rounding")
        setting = [group[key] for key in (*keys, *rule_settings(group["update_rule"], {}))]
        scalars = [group[key] for key in ("lr", "weight_decay", "momentum", "eps")]
        setting += [float(value) for value in (*scalars, *group["betas"])]  # tensors, perhaps
        scale = group["adjust_lr_fn"]
        setting.append(getattr(scale, "__qualname__", "a function") if callable(scale) else scale)
        facts = (
            bound.layout.digest,
            bound.storage.dtype,
            setting,
            self._kind(group),
            self._exchanged,
        )
        return f"{':'.join(map(str, facts))}:{hash(bound.blocks)}"


__all__ = ["Setup"]
