"""What is fixed once parameters are bound: process groups, plans, and that all ranks agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from flashns_dist.exchange import check_same_setup
from flashns_dist.exchange.probe import first_value
from flashns_dist.optim.agreement import Settings, raise_together, rounds_of
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.learning_rate import learning_rate_scale
from flashns_dist.optim.machine import calibrated_cost
from flashns_dist.optim.options import ExchangeOptions
from flashns_dist.optim.rules import MATRIX_RULES
from flashns_dist.optim.rules.muon import resolve_ns_coefficients
from flashns_dist.optim.settings import (
    RULE_SETTINGS,
    check_complete,
    check_states,
    check_values,
    is_matrix_rule,
)
from flashns_dist.optim.step import matrices_of, plan_matrices
from flashns_dist.orthogonalize import check_backend
from flashns_dist.plan import CostModel, Matrix, Plan


class Setup:
    """The bound parameters of an optimizer.

    Args:
        bound: All of them, in the same order on every rank of a process group.
        groups: Answers the optimizer's present ``param_groups``.
        options: How matrices travel.
        cuda_graph: Whether steps are replayed.
        nonfinite: What is done with non-finite gradients.
        has_adapter: Whether a framework keeps other tensors in the groups than were bound.
    """

    def __init__(
        self,
        bound: Sequence[BoundParameter],
        groups: Callable[[], Sequence[dict[str, Any]]],
        options: ExchangeOptions,
        cuda_graph: bool,
        *,
        nonfinite: str,
        has_adapter: bool = False,
    ) -> None:
        self.bound = bound
        self._cuda_graph = cuda_graph
        self._present = groups
        self._options = options
        self._costs: dict[tuple[int, ...], CostModel | None] = {}
        self._plans: dict[tuple[int, ...], tuple[Plan, list[Matrix]]] = {}
        self._nonfinite = nonfinite
        self._has_adapter = has_adapter
        self._planned = self._plan_settings()
        self._params = self._present_params()
        self._rules = [group["update_rule"] for group in self._groups]
        self._last: object = None
        self._numbers: list[float] = []
        self._rounds = 1
        self._problem: str | None = None

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

    @cached_property
    def _shapes(self) -> list[tuple[int, tuple[int, int]]]:
        """Of the matrices, with the index of their parameter group."""
        return sorted({(b.group_index, block.shape) for b in self.bound for block in b.blocks})

    @cached_property
    def _sequences(self) -> list[list[int]]:
        """The parameter groups of ``members``."""
        return [[self.bound[i].group_index for i in indices] for indices in self.members]

    @cached_property
    def _keys(self) -> list[list[tuple[int, tuple[int, int]]]]:
        """Those of ``_shapes`` that ``members`` have, in the order of the parameters."""
        return [
            list(dict.fromkeys((b.group_index, block.shape) for b in chosen for block in b.blocks))
            for chosen in ([self.bound[i] for i in indices] for indices in self.members)
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
        """Whether groups have other parameters than those that were bound, or other settings than
        those that matrices were batched by."""
        if self._other_rule():
            return False  # but an error
        return self._plan_settings() != self._planned or self._params != self._present_params()

    def _present_params(self) -> list[list[int]]:
        if self._has_adapter:
            return []
        return [[id(param) for param in group["params"]] for group in self._groups]

    def _plan_settings(self) -> list[tuple[str, object]]:
        """What of each group plans depend on."""
        return [(self._kind(group), group.get("matrix_view")) for group in self._groups]

    # Settings as they are now -----------------------------------------------------------------

    def settings(self, *, is_outdated: bool) -> tuple[Settings, str | None]:
        """The settings of this step, to compare with other ranks', and what is wrong with them.

        Args:
            is_outdated: See ``Settings``.
        """
        facts = [self._facts(group) for group in self._groups]
        scales = {key: self._scale(*key) for key in self._shapes}
        present = (facts, scales, None if self._other_rule() else self._plan_settings())
        if present != self._last:
            self._last = present
            self._problem = self._invalid()
            digests = [repr(each).encode() for each in facts]
            self._numbers = [
                _number(
                    b"".join(digests[index] for index in groups)
                    + repr([scales[key] for key in keys]).encode()
                )
                for groups, keys in zip(self._sequences, self._keys, strict=True)
            ]
        return Settings(self._numbers, is_outdated, self._rounds, self.compare), self._problem

    def _other_rule(self) -> str | None:
        """What is wrong if a group has another update rule than before."""
        for number, (group, rule) in enumerate(zip(self._groups, self._rules, strict=False)):
            if group["update_rule"] != rule:
                return (
                    f"group {number}: its update_rule was {rule!r} and is now "
                    f"{group['update_rule']!r}, which keeps another state; make a new optimizer"
                )
        return None

    def _facts(self, group: Mapping[str, Any]) -> tuple[object, ...]:
        """What of a group must agree between ranks, and may change from step to step."""
        scale = group["adjust_lr_fn"]
        if callable(scale):
            scale = "a function"  # whose values are compared
        found: list[object] = [scale, str(group["rounding"])]
        for key in ("lr", "weight_decay", "momentum", "eps", "betas", "nesterov", "cautious"):
            values = group[key] if key == "betas" else (group[key],)
            try:
                found += [float(value) for value in values]  # tensors, perhaps
            except (TypeError, ValueError, RuntimeError):
                found.append(repr(group[key]))  # which check_values refuses
        return tuple(found)

    def _scale(self, group_index: int, shape: tuple[int, int]) -> float | str | None:
        """What the function that a group has as ``adjust_lr_fn`` says of a shape; else None."""
        function = self._groups[group_index]["adjust_lr_fn"]
        if not callable(function):
            return None
        try:
            return learning_rate_scale(function, shape)
        except ValueError as error:  # which _invalid says
            return str(error)

    def _invalid(self) -> str | None:
        """What is wrong with the groups' settings, or None."""
        other = self._other_rule()
        if other is not None:
            return other
        try:
            for group in self._groups:
                check_values(group)
            for index, shape in self._shapes:
                learning_rate_scale(self._groups[index]["adjust_lr_fn"], shape)
        except ValueError as error:
            return str(error)
        return None

    def compare(self, indices: Sequence[int], digest: str = "") -> None:
        """Compare the parameters of a process group and their settings across its ranks.

        Collectives: a small comparison on the process group.

        Args:
            indices: Of the parameters.
            digest: Of what else must agree.

        Raises:
            RuntimeError: Ranks disagree; the message names them and the parameter.
        """
        entries = [(self.bound[i].name, self._digest(self.bound[i])) for i in indices]
        check_same_setup(entries, digest, self.bound[indices[0]].process_group)

    # Setup ------------------------------------------------------------------------------------

    def check(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Compare the setups of all ranks, and agree on the cost model.

        What one rank finds, all that it shares parameters with raise, directly or through others.
        Collectives: one ``broadcast`` and one small comparison on each process group, and those of
        ``rounds_of`` and ``raise_together``.

        Args:
            state: Of the optimizer.

        Raises:
            RuntimeError: Ranks disagree about parameters, settings, layouts or plans, or another
                rank has an error.
            NotImplementedError: An update rule cannot take a layout.
            ValueError: A setting is out of range or does not fit the device, or no plan fits into
                the options' memory.
            ImportError: A backend is not installed.
        """
        error = self._own_error(state)
        unfit: ValueError | None = None
        for indices, matrices in zip(self.members, self.matrices, strict=True):
            first = self.bound[indices[0]]
            cost = self._options.cost
            if cost is None:
                cost = calibrated_cost(first.local(first.storage).device)
            self._costs[first.group_ranks] = first_value(cost, first.process_group)
            digest = "none"
            if matrices:
                try:
                    for group in self._groups:
                        check_complete(group)
                    digest = self.plan(matrices, [True] * len(matrices))[0].digest
                except ValueError as found:  # nothing fits into the memory that there may be
                    unfit = unfit or found
                digest += str((self._exchanged, self._cuda_graph))
            try:
                self.compare(indices, digest)
            except RuntimeError as found:
                error = error or found
        groups = [self.bound[indices[0]].process_group for indices in self.members]
        device = self.bound[0].local(self.bound[0].storage).device
        self._rounds = rounds_of(groups)
        raise_together(groups, device, error or unfit, self._rounds)

    def _own_error(self, state: Mapping[Tensor, dict[str, Any]]) -> Exception | None:
        """What this rank finds wrong by itself."""
        invalid = self._invalid()
        if invalid is not None:
            return ValueError(invalid)
        try:
            for bound in self.bound:
                if bound.problem is not None:
                    raise NotImplementedError(bound.problem)
            check_states(self.bound, self._groups, state)
            for bound in self.bound:
                group = self._groups[bound.group_index]
                if is_matrix_rule(group):
                    rule = MATRIX_RULES[group["update_rule"]]
                    rule.check_layout(bound, group)
                    if rule.travels:
                        device = bound.local(bound.storage).device
                        check_backend(group["backend"], device, group["ns_dtype"])
        except (ValueError, NotImplementedError, ImportError) as error:
            return error
        return None

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
        try:
            check_complete(group)
            coefficients = resolve_ns_coefficients(group)
        except ValueError as error:  # check_values says so
            return str(error)
        digest = coefficients.digest if coefficients is not None else "default"
        settings = [group["method"], digest, group["ns_dtype"], group["backend"]]
        rule = MATRIX_RULES[group["update_rule"]].kind(group)
        return f"{rule}:{settings}:{self._options.wire_dtype}"

    def _digest(self, bound: BoundParameter) -> str:
        """What must agree between ranks about a parameter."""
        group = self._groups[bound.group_index]
        keys = ("update_rule", *sorted(RULE_SETTINGS))
        shapes = dict.fromkeys(block.shape for block in bound.blocks)
        facts = (
            bound.layout.digest,
            bound.storage.dtype,
            [group.get(key) for key in keys],
            self._facts(group),
            [self._scale(bound.group_index, shape) for shape in shapes],
            self._kind(group),
            self._exchanged,
            self._nonfinite,
        )
        return f"{':'.join(map(str, facts))}:{hash(bound.blocks)}"


def _number(content: bytes) -> float:
    """A number of 48 bits, which fp64 holds."""
    return float(int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big"))


__all__ = ["Setup"]
