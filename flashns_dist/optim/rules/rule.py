"""What an update rule is: the hooks that the step loop calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashns_dist.layout import Block
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.pieces import Pieces, Run


class MatrixRule:
    """Update rule of matrices. Objects have no state: everything is in the optimizer's.

    A step calls ``begin``, then for every bucket ``before``, ``on_owner`` and ``after``, then
    ``end``; ``before`` and ``after`` act on this rank's pieces where they lie, ``on_owner`` on
    whole matrices. Whatever a rule computes from more than one element must not depend on how the
    matrix is cut: on the owner, or by sums that are exact.

    Attributes:
        name: The ``"update_rule"`` of a parameter group.
        settings: A group's settings that only some rules have, with their defaults.
        local_states: Names of the states that are sharded as the parameter is.
        travels: Whether matrices go to owners; if not, ``begin`` does everything.
        selects: Whether only some rows or columns of a matrix travel (``work_shape``); ``begin``
            then puts into ``run.choices`` which.
    """

    name: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    local_states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    travels: ClassVar[bool] = True
    selects: ClassVar[bool] = False

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a setting out of range, naming it."""

    def init_state(
        self, param: Tensor, group: Mapping[str, Any], blocks: Sequence[Block]
    ) -> dict[str, Tensor]:
        """Zero state in the parameter's sharding, in fp32 (fp64 for fp64 parameters).

        Args:
            param: A parameter, or a flat buffer of many.
            group: Parameter group.
            blocks: Its matrices.
        """
        dtype = torch.promote_types(param.dtype, torch.float32)
        device = getattr(param, "_local_tensor", param).device
        state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        for name in self.local_states:  # row-major, so that convolutions can be viewed as matrices
            kept = torch.contiguous_format
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=kept)
        sizes: dict[str, int] = {}
        for block in blocks:
            for name, size in self.block_states(group, block).items():
                sizes[name] = sizes.get(name, 0) + size
        for name, size in sizes.items():
            state[name] = torch.zeros(size, dtype=dtype, device=device)
        return state

    def block_states(self, group: Mapping[str, Any], block: Block) -> dict[str, int]:
        """States that are small: names, and how many numbers a block has in them.

        They are one-dimensional plain tensors, block after block, and the same on every rank of the
        process group.
        """
        return {}

    def check_layout(self, bound: BoundParameter, group: Mapping[str, Any]) -> None:
        """Raise NotImplementedError, on every rank, for a layout that the rule cannot take."""

    def work_shape(self, shape: tuple[int, int], group: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of a matrix that travel and are orthogonalized."""
        return shape

    def kind(self, group: Mapping[str, Any]) -> str:
        """What must agree for matrices to be one batch on their owner, besides the method."""
        return f"{self.name}:{[group[key] for key in sorted(self.settings)]}"

    def begin(self, run: Run, group_index: int) -> None:
        """Before the first bucket."""

    def before(self, pieces: Pieces) -> list[Tensor]:
        """What this rank sends of its pieces to the owners."""
        raise NotImplementedError

    def on_owner(
        self, run: Run, indices: Sequence[int], batch: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        """The updates of whole matrices.

        Args:
            run: The step.
            indices: The matrices in the batch.
            batch: ``(len(indices), rows, cols)`` in the wire dtype; may be overwritten.
            group: Parameter group of the first; the others' agree in ``kind``.
        """
        raise NotImplementedError

    def after(self, pieces: Pieces, updates: Sequence[Tensor]) -> None:
        """Change this rank's pieces of the weights, given their updates in the wire dtype."""
        raise NotImplementedError

    def end(self, run: Run, group_index: int) -> None:
        """After the last bucket."""


def number(key: str, value: Any) -> float:
    """A setting as a float: of a number, NumPy's too, or of a tensor of one element.

    Raises:
        ValueError: It is no number (a string, say), or not finite.
    """
    try:
        found = nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors raise the last one
        found = nan
    if not isfinite(found):
        raise ValueError(f"{key}={value!r} must be a finite number")
    return found


def check_flag(key: str, value: Any) -> None:
    """Raise ValueError for a setting that is neither True nor False (nor 1 or 0)."""
    try:
        is_flag = number(key, value) in (0, 1)
    except ValueError:
        is_flag = False
    if not is_flag:
        raise ValueError(f"{key}={value!r} must be True or False")


def check_fraction(key: str, value: Any, *, one: bool = False) -> None:
    """Raise ValueError for a setting outside [0, 1), or (0, 1] with ``one``."""
    found = number(key, value)
    if not (0 < found <= 1 if one else 0 <= found < 1):
        raise ValueError(f"{key}={value} must be in {'(0, 1]' if one else '[0, 1)'}")


def check_positive(key: str, value: Any) -> None:
    """Raise ValueError for a setting that must not be zero."""
    if not number(key, value) > 0:
        raise ValueError(f"{key}={value} must be positive: the update rule divides by it")


class AuxiliaryRule:
    """Elementwise update rule of auxiliary parameters, applied where they lie."""

    name: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    local_states: ClassVar[tuple[str, ...]] = ()

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a setting out of range, naming it."""

    def init_state(
        self, param: Tensor, group: Mapping[str, Any], blocks: Sequence[Block]
    ) -> dict[str, Tensor]:
        """Zero state in the parameter's sharding, in fp32 (fp64 for fp64 parameters).

        ``step`` is on the parameter's device, for fused kernels.
        """
        dtype = torch.promote_types(param.dtype, torch.float32)
        device = getattr(param, "_local_tensor", param).device
        zeros = {name: torch.zeros_like(param, dtype=dtype) for name in self.local_states}
        return {"step": torch.zeros((), dtype=torch.float32, device=device), **zeros}

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: Mapping[str, Any],
        write: Callable[[int, Tensor], None],
    ) -> None:
        """One step on this rank's parts.

        Args:
            weights: This rank's parts. fp32 and fp64 are updated in place.
            gradients: Same shapes, any float dtype.
            states: State of each.
            group: Parameter group.
            write: Called with (index, new value) for weights of lower precision, which are
                computed in fp32.
        """
        raise NotImplementedError


__all__ = [
    "AuxiliaryRule",
    "MatrixRule",
    "check_flag",
    "check_fraction",
    "check_positive",
    "number",
]
