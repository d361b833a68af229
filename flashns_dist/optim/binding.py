"""Where each parameter lies: the three answers that an adapter gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashns_dist.layout import (
    Block,
    Layout,
    MatrixView,
    placements_layout,
    replicated_layout,
    view_blocks,
)

AUXILIARY = ("adamw", "lion")  # update rules of parameters that are no matrices


@dataclass(frozen=True, eq=False)
class BoundParameter:
    """One logical parameter: its layout, its process group, and where this rank keeps its part.

    Attributes:
        name: For errors and for comparing ranks.
        storage: The tensor that the optimizer holds (a parameter, or a flat buffer of many).
        group_index: Index of its group in ``param_groups``.
        layout: How it lies across ``process_group``.
        process_group: Whose ranks store it; None where this process is alone.
        group_rank: This process's rank there.
        local: Maps the storage, its gradient or a state of the same shape to this rank's part:
            an array that the layout's fragments of this rank index into.
        blocks: Its matrices.
        problem: Why it cannot be stepped, found on this rank; every rank raises then.
    """

    name: str
    storage: Tensor
    group_index: int
    layout: Layout
    process_group: dist.ProcessGroup | None
    group_rank: int
    local: Callable[[Tensor], Tensor]
    blocks: tuple[Block, ...]
    problem: str | None = None

    @cached_property
    def group_ranks(self) -> tuple[int, ...]:
        """Global ranks of the process group."""
        if self.process_group is None:
            return (0,)
        return tuple(dist.get_process_group_ranks(self.process_group))

    @cached_property
    def is_replicated(self) -> bool:
        """Whether every rank of the group stores all of it."""
        return self.layout.num_replicas == self.layout.group_size > 1

    @property
    def gradient(self) -> Tensor | None:
        """This rank's part of the gradient, or None."""
        grad = self.storage.grad
        if grad is None:
            return None
        check_gradient(self.name, self.storage, grad)
        return self.local(grad)


def check_gradient(name: str, storage: Tensor, grad: Tensor) -> None:
    """Raise ValueError where a gradient cannot belong to its parameter.

    Raises:
        ValueError: The gradient is sparse or lies elsewhere than the parameter (a pending
            reduction, another mesh or other placements).
    """
    if grad.layout != torch.strided:
        raise ValueError(f"{name}: sparse gradients are not supported; use sparse=False")
    ours, theirs = getattr(storage, "placements", None), getattr(grad, "placements", None)
    if ours != theirs:
        raise ValueError(
            f"{name}: its gradient has placements {theirs}, the parameter has {ours}. Reduce or "
            "redistribute the gradient to the parameter's placements before step()."
        )


def bind_parameter(
    name: str,
    param: Tensor,
    group_index: int,
    replica_group: dist.ProcessGroup | None,
    blocks: tuple[Block, ...] = (),
) -> BoundParameter:
    """Bind a DTensor by its placements, or a plain tensor as a replica on ``replica_group``.

    Collectives: none for a one-axis mesh or one that spans the world; else a process group of the
    mesh's ranks is made the first time (they all must get here).

    Raises:
        NotImplementedError: A placement is not supported.
    """
    shape = tuple(int(size) for size in param.shape)
    mesh = getattr(param, "device_mesh", None)
    if mesh is None:
        size = dist.get_world_size(replica_group) if replica_group is not None else 1
        group_rank = dist.get_rank(replica_group) if replica_group is not None else 0
        layout = replicated_layout(shape, size)
        return BoundParameter(
            name, param, group_index, layout, replica_group, group_rank, _identity, blocks
        )
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    process_group = _mesh_group(mesh, ranks)
    members = dist.get_process_group_ranks(process_group) if process_group is not None else ranks
    order = {rank: tuple(int(c) for c in _coordinate(mesh, rank)) for rank in ranks}
    layout = placements_layout(
        shape,
        param.placements,  # type: ignore[attr-defined]
        tuple(mesh.mesh.shape),
        tuple(order[rank] for rank in members),
        name=name,
    )
    group_rank = dist.get_rank(process_group)
    stored, expected = local_part(param).numel(), layout.local_numel(group_rank)
    problem = None
    if stored != expected:
        problem = (
            f"{name}: rank {dist.get_rank()} stores {stored} elements of {shape}, but its "
            f"placements {param.placements} say {expected}. "  # type: ignore[attr-defined]
            "Pad the dim so that it divides evenly."
        )
    return BoundParameter(
        name, param, group_index, layout, process_group, group_rank, local_part, blocks, problem
    )


def full_shape(param: Tensor) -> tuple[int, ...]:
    """Global shape; DeepSpeed's zero.Init empties a parameter and keeps its shape in ds_shape."""
    return tuple(int(size) for size in getattr(param, "ds_shape", param.shape))


def parameter_blocks(
    name: str, shape: Sequence[int], group: Mapping[str, Any]
) -> tuple[Block, ...]:
    """The matrices of a parameter, none of an auxiliary one. For adapters too.

    Args:
        name: Of the parameter; a group's ``"matrix_view"`` may differ from name to name.
        shape: Global shape.
        group: Parameter group: ``update_rule``, ``matrix_view``.

    Raises:
        ValueError: The group's view does not fit the shape.
    """
    view = group_view(name, group)
    if group["update_rule"] in AUXILIARY or (view is None and len(shape) < 2):
        return ()
    return view_blocks(name, shape, view)


def group_view(name: str, group: Mapping[str, Any]) -> MatrixView | None:
    """The view of the parameter ``name``: the group's, or that of the first pattern it matches."""
    view = group.get("matrix_view")
    if not isinstance(view, Mapping):
        return view
    if name in view:
        return view[name]  # type: ignore[no-any-return]
    return next((v for pattern, v in view.items() if fnmatchcase(name, pattern)), None)


def check_view_names(names: Sequence[str], group: Mapping[str, Any]) -> None:
    """Raise ValueError for a ``matrix_view`` pattern that matches no parameter of the group."""
    view = group.get("matrix_view")
    patterns = list(view) if isinstance(view, Mapping) else []
    unused = [p for p in patterns if p not in names and not any(fnmatchcase(n, p) for n in names)]
    if unused:
        raise ValueError(
            f"matrix_view patterns {unused} match no parameter of their group, whose names begin "
            f"with {list(names)[:3]}; pass (name, parameter) pairs, as parameter_groups does"
        )


def on_device_of(bound: BoundParameter) -> AbstractContextManager[Any]:
    """Makes the device of a parameter's storage the current one, which it need not be."""
    device = bound.local(bound.storage).device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _identity(tensor: Tensor) -> Tensor:
    return tensor.detach()


def local_part(tensor: Tensor) -> Tensor:
    """A DTensor's local shard, or the tensor itself; detached."""
    local: Any = getattr(tensor, "_local_tensor", tensor)
    if type(local) is not Tensor and hasattr(local, "wait"):
        # An AsyncCollectiveTensor, whose own address is 0.
        local = local.wait()
    return local.detach()  # type: ignore[no-any-return]


@cache
def _coordinates(mesh: Any) -> dict[int, tuple[int, ...]]:
    ranks = mesh.mesh
    return {
        int(ranks[tuple(index)]): tuple(int(i) for i in index)
        for index in torch.ones_like(ranks).nonzero()
    }


def _coordinate(mesh: Any, rank: int) -> tuple[int, ...]:
    return _coordinates(mesh)[rank]


_GROUPS: dict[tuple[Any, ...], dist.ProcessGroup] = {}


def _mesh_group(mesh: Any, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """One process group over all ranks of a mesh, made at most once."""
    if len(set(ranks)) == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()  # type: ignore[no-any-return]
    # The world itself is in the key: after it is destroyed, another world's groups are others.
    key = (dist.group.WORLD, tuple(sorted(ranks)))
    forget_other_worlds(_GROUPS)
    if key not in _GROUPS:
        _GROUPS[key] = new_group(ranks)
    return _GROUPS[key]


def forget_other_worlds(groups: dict[tuple[Any, ...], dist.ProcessGroup]) -> None:
    """Remove groups whose key begins with a world that has been destroyed: they hold threads."""
    for key in [key for key in groups if key[0] is not dist.group.WORLD]:
        del groups[key]


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Make a process group of some global ranks, which all of them must call for."""
    with _unbound(dist.group.WORLD):
        return dist.new_group(sorted(ranks), use_local_synchronization=True)  # type: ignore[no-any-return]


@contextmanager
def _unbound(world: Any) -> Iterator[None]:
    """Lets some ranks make a group by themselves, also where the world was given a ``device_id``.

    NCCL would split the new group off the world's communicator, for which all ranks must call.
    """
    device = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = device
