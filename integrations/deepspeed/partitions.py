"""What lies in the tensors that DeepSpeed hands to the optimizer, as layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor

from flashns_dist.layout import Layout, flat_layout, replicated_layout
from flashns_dist.optim import BoundParameter
from flashns_dist.optim.binding import parameter_blocks
from flashns_dist.optim.rules import AUXILIARY_RULES

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Slice:
    """One parameter in a flat partition.

    Attributes:
        name: As in the model.
        shape: Of the whole parameter.
        ranges: For each group rank, the elements ``[start, stop)`` of it that lie there.
        offset: Where this rank's elements begin in its partition.
    """

    name: str
    shape: tuple[int, ...]
    ranges: Ranges
    offset: int


@dataclass(frozen=True, eq=False)
class Partition:
    """A tensor that DeepSpeed's optimizer step updates on this rank.

    Attributes:
        storage: fp32 (or low precision) master weights; the key of the optimizer's state.
        group_index: Of its parameter group, counted over all of the optimizer's groups.
        process_group: Whose ranks hold the other partitions, or replicas of this one.
        slices: The parameters in a flat partition; empty for a whole parameter.
        name: Of the parameter, where the storage is a whole one.
        shape: Likewise.
    """

    storage: Tensor
    group_index: int
    process_group: dist.ProcessGroup | None
    slices: tuple[Slice, ...] = ()
    name: str = ""
    shape: tuple[int, ...] = ()

    @property
    def is_flat(self) -> bool:
        return not self.name

    def bind(self, group: Mapping[str, Any], group_index: int) -> list[BoundParameter]:
        """The logical parameters in this storage, for the step loop.

        Args:
            group: Its parameter group. Matrices are bound one by one; auxiliary parameters in a
                flat partition all at once, padding included, since their rule is elementwise.
            group_index: Of the group in the step loop's own list.
        """
        size = dist.get_world_size(self.process_group) if self.process_group is not None else 1
        rank = dist.get_rank(self.process_group) if self.process_group is not None else 0
        if not self.is_flat:
            layout = replicated_layout(self.shape, size)
            whole = _whole(self.shape)
            return [self._bound(self.name, group, group_index, layout, rank, whole)]
        if group["update_rule"] in AUXILIARY_RULES:
            numel = self.storage.numel()
            layout = flat_layout(
                (numel * size,), tuple(((r * numel, (r + 1) * numel, 0),) for r in range(size))
            )
            name = self._summary()
            return [self._bound(name, group, group_index, layout, rank, Tensor.detach)]
        bound = []
        for item in self.slices:
            layout = flat_layout(
                item.shape,
                tuple(((start, stop, 0),) if start < stop else () for start, stop in item.ranges),
            )
            start, stop = item.ranges[rank]
            local = _narrow(item.offset if stop > start else 0, max(stop - start, 0))
            bound.append(self._bound(item.name, group, group_index, layout, rank, local))
        return bound

    def _bound(
        self,
        name: str,
        group: Mapping[str, Any],
        group_index: int,
        layout: Layout,
        rank: int,
        local: Callable[[Tensor], Tensor],
    ) -> BoundParameter:
        blocks = parameter_blocks(name, layout.shape, group)
        return BoundParameter(
            name, self.storage, group_index, layout, self.process_group, rank, local, blocks
        )

    def _summary(self) -> str:
        names = [item.name for item in self.slices]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        return f"auxiliary parameters {', '.join(names[:2])}{more}"


def sequential_ranges(start: int, numel: int, partition: int, size: int) -> Ranges:
    """The part of ``[start, start + numel)`` of a buffer in each of ``size`` equal partitions.

    Ranges are relative to ``start``; ZeRO 1 and 2 cut the buffer of a whole group like this.
    """
    stop = start + numel
    return tuple(
        (max(start, r * partition) - start, max(min(stop, (r + 1) * partition), start) - start)
        if r * partition < stop and (r + 1) * partition > start
        else (0, 0)
        for r in range(size)
    )


def even_ranges(numel: int, partition: int, size: int) -> Ranges:
    """Each parameter cut by itself, padded to ``size * partition`` elements: ZeRO 3."""
    return tuple((min(r * partition, numel), min((r + 1) * partition, numel)) for r in range(size))


def check_slices(storage: Tensor, slices: Sequence[Slice], rank: int, low: Sequence[Tensor]) -> str:
    """Compare this rank's master weights with the model's, element by element.

    A wrong offset would train garbage without an error, so this is checked once, at the start.

    Args:
        storage: The partition.
        slices: What should lie in it.
        rank: Of this process in the group.
        low: For each slice, this rank's elements of it in the model, flat.

    Returns:
        The first thing that is wrong, or an empty text.
    """
    for item, expected in zip(slices, low, strict=True):
        if sum(stop - start for start, stop in item.ranges) != prod(item.shape):
            return f"the ranks' parts of {item.name} do not add up to its shape {item.shape}"
        start, stop = item.ranges[rank]
        if stop <= start:
            continue
        held = storage.detach().narrow(0, item.offset, stop - start)
        if not (held.to(expected.device, expected.dtype) == expected).all():
            return f"the master weights of {item.name} are not where its layout says"
    return ""


def _whole(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def local(tensor: Tensor) -> Tensor:
        return tensor.detach().view(shape)

    return local


def _narrow(offset: int, length: int) -> Callable[[Tensor], Tensor]:
    def local(tensor: Tensor) -> Tensor:
        return tensor.detach().narrow(0, offset, length)

    return local
