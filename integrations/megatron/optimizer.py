"""Megatron's optimizers with FlashMuon inside.

Megatron builds its optimizer (flat shards, main weights, clipping, loss scale, overlap) as for
Adam. ``adopt`` then replaces the torch optimizer inside by a FlashMuon over the same tensors, bound
by their layouts, and gives the outer object a class that knows its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashns_dist.optim import BoundParameter, FlashMuon
from flashns_dist.optim.settings import init_state, is_matrix_rule

from .checkpoints import CLASSES, OVERRIDES, state_names_of
from .grouping import owners, parameter_names
from .internals import (
    VERSION,
    Grid,
    find_grid,
    flat_ranges,
    is_distributed,
    main_params,
    repair_index_map,
)
from .layouts import holdings_of, shard_layout
from .matrices import Description, describe
from .settings import Resolved, Transposed


def adopt(
    optimizer: Any,
    built: Mapping[str, Any],
    resolved: Resolved,
    kin: Mapping[Tensor, frozenset[str]],
) -> None:
    """Replace the Adam inside one of Megatron's optimizers by FlashMuon.

    Args:
        optimizer: As Megatron built it; changed in place.
        built: The builder's arguments, and the parameters of each group under ``"members"``.
        resolved: Settings.
        kin: For each parameter, the update rules of its kind of parameter in all layers.

    Collectives: as ``find_grid``.
    """
    if optimizer.optimizer is None:
        return  # no trainable parameters on this rank
    if type(optimizer) not in CLASSES:
        raise NotImplementedError(
            f"FlashMuon's adapter does not know megatron-core {VERSION}'s "
            f"{type(optimizer).__name__}. Use --use-distributed-optimizer without the feature that "
            "selects it."
        )
    chunks, members = built["model_chunks"], built["members"]
    groups = [
        _complete_group(group, optimizer.optimizer.defaults, resolved)
        for group in optimizer.optimizer.param_groups
    ]
    is_expert = any(group.get("is_expert_parallel", False) for group in groups)
    empty = [{"params": [], "update_rule": rule} for rule in resolved.groups]
    inner = FlashMuon(empty, **resolved.arguments)
    inner.param_groups = groups
    inner.state.clear()
    for group in groups:
        for storage in group["params"]:
            inner.state[storage] = init_state(storage.detach(), group, ())
    grid = find_grid(chunks, is_expert, built.get("pg_collection"))
    group_index = {param: i for i, params in enumerate(members) for param in params}
    optimizer.optimizer = inner
    optimizer.init_state_fn = _no_state
    binding = Binding(optimizer, chunks, grid, group_index, resolved)
    rules = {param: groups[i]["update_rule"] for param, i in group_index.items()}
    if is_distributed(optimizer):
        repair_index_map(optimizer)
        optimizer.flashmuon_rules, optimizer.flashmuon_kin = rules, kin
    else:
        optimizer.flashmuon_lacking = {
            storage: lacking
            for param, storage in main_params(optimizer)
            if (lacking := state_names_of(kin[param]) - state_names_of({rules[param]}))
        }
    optimizer.__class__ = CLASSES[type(optimizer)]
    inner.bind(binding.parameters)


def _complete_group(
    group: Mapping[str, Any], adam: Mapping[str, Any], resolved: Resolved
) -> dict[str, Any]:
    """One of Megatron's groups with FlashMuon's settings instead of Adam's.

    A setting of both (``eps``, ``betas``) is the group's where the user's overrides gave it one.
    """
    settings = dict(resolved.groups[group["update_rule"]])
    for key in settings.keys() & adam.keys() & group.keys():
        if group[key] != adam[key]:
            settings[key] = group[key]
    if group.get("is_transposed"):
        settings["adjust_lr_fn"] = Transposed(settings["adjust_lr_fn"])
    kept = {key: value for key, value in group.items() if key not in adam}
    kept[OVERRIDES] = repr(sorted(resolved.settings.overrides.items()))
    lr = group["max_lr"] if group.get("max_lr") is not None else group["lr"]
    return {**settings, "weight_decay": group["weight_decay"], **kept, "lr": lr}


def _no_state(*_: Any) -> None:
    """FlashMuon's state is there from the start."""


class Binding:
    """Describes the parameters of one of Megatron's optimizers to FlashMuon.

    Args:
        optimizer: Megatron's, distributed or not.
        chunks: Model chunks that its parameters belong to.
        grid: The ranks that share them; None where this rank has no such parameters.
        group_index: Of each model parameter, also of those that this rank stores nothing of.
        resolved: Settings.
    """

    def __init__(
        self,
        optimizer: Any,
        chunks: Sequence[nn.Module],
        grid: Grid | None,
        group_index: Mapping[Tensor, int],
        resolved: Resolved,
    ) -> None:
        self._optimizer = optimizer
        self._grid = grid
        self._group_index = group_index
        self._names = parameter_names(chunks)
        self._owners = owners(chunks)
        self._settings = resolved.settings
        self._empty: dict[Tensor, Tensor] = {}
        self._checked = False

    def parameters(self) -> list[BoundParameter]:
        """All parameters, in the same order on every rank of the grid.

        Collectives: the first time an ``all_gather_object`` on the tensor-parallel group.

        Raises:
            RuntimeError: A parameter that should be the same on all tensor-parallel ranks is not.
        """
        grid = self._grid
        if grid is None:
            return []
        storages = dict(main_params(self._optimizer))
        if is_distributed(self._optimizer):
            entries = [
                (param, storages.get(param), ranges)
                for param, ranges in flat_ranges(self._optimizer)
            ]
        else:
            num_replicas = 1 + max(replica for _, replica in grid.members)
            entries = [
                (param, storage, [(0, param.numel())] * num_replicas)
                for param, storage in storages.items()
            ]
        described = [(param, self._describe(param, grid)) for param, _, _ in entries]
        self._check_replicas(described, grid)
        return [
            self._bound(param, storage, ranges, description, grid)
            for (param, storage, ranges), (_, description) in zip(entries, described, strict=True)
        ]

    def _describe(self, param: Tensor, grid: Grid) -> Description:
        group = self._optimizer.optimizer.param_groups[self._group_index[param]]
        return describe(
            self._names[param],
            param,
            self._owners[param],
            grid.num_shards,
            is_matrix=is_matrix_rule(group),
            split_qkv=self._settings.split_qkv,
            split_gate_up=self._settings.split_gate_up,
        )

    def _bound(
        self,
        param: Tensor,
        storage: Tensor | None,
        ranges: Sequence[tuple[int, int]],
        description: Description,
        grid: Grid,
    ) -> BoundParameter:
        layout = shard_layout(
            description.local_shape,
            description.dim,
            grid.num_shards if description.dim >= 0 else 1,
            holdings_of(
                [(shard if description.dim >= 0 else 0, r) for shard, r in grid.members], ranges
            ),
        )
        index = self._group_index[param]
        return BoundParameter(
            self._names[param],
            self._placeholder(param, index) if storage is None else storage,
            index,
            layout,
            grid.process_group,
            grid.group_rank,
            _flat,
            description.blocks,
        )

    def _placeholder(self, param: Tensor, group_index: int) -> Tensor:
        """An empty storage for a parameter that other ranks store, with a gradient and a state.

        It is in no group, so that Megatron does not see it.
        """
        inner = self._optimizer.optimizer
        if param not in self._empty:
            empty = torch.empty(0, dtype=torch.float32, device=param.device)
            empty.grad = torch.empty_like(empty)
            self._empty[param] = empty
        storage = self._empty[param]
        if storage not in inner.state:
            inner.state[storage] = init_state(storage, inner.param_groups[group_index], ())
        return storage

    def _check_replicas(self, described: Sequence[tuple[Tensor, Description]], grid: Grid) -> None:
        """Compare what is said to be whole on every tensor-parallel rank, once.

        A layer that shards a weight without saying so would train garbage without an error.
        """
        if self._checked or grid.num_shards == 1:
            return
        sums = {
            self._names[param]: float(param.detach().double().abs().sum())
            for param, description in described
            if description.dim < 0 and description.blocks
        }
        everyone: list[dict[str, float]] = [sums] * grid.num_shards
        dist.all_gather_object(everyone, sums, group=grid.tensor_group)
        for name, value in sums.items():
            found = [other.get(name) for other in everyone]
            if any(other is None or abs(other - value) > 1e-6 * value for other in found):
                raise RuntimeError(
                    f"{name}: it is not marked as tensor-parallel, but its ranks store different "
                    f"values (sums of magnitudes {found}). Set tensor_model_parallel and "
                    "partition_dim on it (set_tensor_model_parallel_attributes), or use_muon=False."
                )
        self._checked = True


def _flat(tensor: Tensor) -> Tensor:
    """The row-major elements, as a view."""
    return tensor.detach().view(-1)
