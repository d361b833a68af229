"""Checkpoints of Megatron's optimizers with FlashMuon inside.

In the flat formats of the distributed optimizer each parameter has ``exp_avg`` and ``exp_avg_sq``:
the momentum of a matrix goes by the first name, AdaMuon's second moment by the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor

from flashns_dist.optim.rules import RULES
from flashns_dist.optim.state import plain_state_dict

from .internals import schedule_is_the_checkpoints
from .support import check_sharding_type

OVERRIDES = "flashmuon_overrides"
"""Key of a group: this run's --flashmuon-overrides, as text."""

_IDENTITY = ("update_rule", "is_transposed", "wd_mult", "is_expert_parallel", "is_decoupled_lr")


class FlashMuonDistributedOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """State of flat shards, resharded as Megatron does for Adam.

    Attributes:
        flashmuon_rules: The update rule of each model parameter in the buffers.
        flashmuon_kin: The rules of the same parameter in all layers.
    """

    flashmuon_rules: dict[Tensor, str]
    flashmuon_kin: dict[Tensor, frozenset[str]]

    optimizer_state_keys = ("exp_avg", "exp_avg_sq")

    def state_dict(self) -> dict[str, Any]:
        """Groups and loss scale: what is the same on every data-parallel rank."""
        step = self._num_steps()
        groups = [{**group, "params": []} for group in self.optimizer.param_groups]
        plain = plain_state_dict({"state": {}, "param_groups": groups})["param_groups"]
        for group in plain:
            del group["params"]
            group["step"] = step
        found: dict[str, Any] = {"optimizer": {"param_groups": plain}}
        if self.grad_scaler:
            found["grad_scaler"] = self.grad_scaler.state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and loss scale, and the parameters' state where it is there.

        Raises:
            ValueError: The checkpoint's groups are not FlashMuon's, or are those of several
                optimizers; nothing has changed.
            NotImplementedError: Its format is not supported; nothing has changed.
        """
        if "optimizer" not in state_dict:
            raise ValueError(
                "the checkpoint has several optimizers, this run has one. Megatron gives experts "
                "an optimizer of their own where expert parallelism is not 1, and converts neither "
                "into the other: resume with expert parallelism too, or with --no-load-optim."
            )
        if "param_state" in state_dict:
            kind = state_dict["param_state_sharding_type"]
            check_sharding_type(kind)
        saved = state_dict["optimizer"]["param_groups"]
        restored = restored_groups(self.optimizer.param_groups, saved)
        for group, values in zip(self.optimizer.param_groups, restored, strict=True):
            group.update({k: v for k, v in values.items() if k not in ("params", "step")})
        self._flashmuon_steps = int(saved[0].get("step") or 0) if saved else 0
        for state in self.optimizer.state.values():
            state["step"].fill_(self._flashmuon_steps)
        if self.grad_scaler and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if "param_state" in state_dict:
            load = getattr(self, f"load_parameter_state_from_{kind}")
            load(state_dict["param_state"])

    def sharded_state_dict(
        self,
        model_sharded_state_dict: Any,
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Megatron's; refuses formats that have not been made to work."""
        kind = sharding_type or (metadata or {}).get("distrib_optim_sharding_type")
        check_sharding_type(kind)
        return super().sharded_state_dict(
            model_sharded_state_dict, is_loading, sharding_type, metadata, **kwargs
        )

    def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, without the zeros that stand for states that no layer has."""
        found = super().sharded_param_state_fully_reshardable(*args, **kwargs)
        if found is not None:
            order = [param for buffer in self.buffers for param in buffer.param_index_map]
            for index, param in enumerate(order):
                count = max(len(RULES[rule].local_states) for rule in self.flashmuon_kin[param])
                for name in self.optimizer_state_keys[count:]:
                    found[index].pop(name)
        return found

    def save_parameter_state(self, filename: str) -> None:
        """Part of ``--ckpt-format torch``."""
        check_sharding_type(f"torch ({filename})")

    def load_parameter_state(self, filename: str, **kwargs: Any) -> None:
        """Part of ``--ckpt-format torch``."""
        check_sharding_type(f"torch ({filename})")

    def step_with_ready_grads(self) -> bool:
        """As Megatron's, counted: a rank may have no state that counts."""
        self._flashmuon_steps = getattr(self, "_flashmuon_steps", 0) + 1
        return bool(super().step_with_ready_grads())

    def _num_steps(self) -> int:
        states = self.optimizer.state.values()
        counted = int(getattr(self, "_flashmuon_steps", 0))
        return max((int(state["step"]) for state in states), default=counted)

    def _get_main_param_and_optimizer_states(self, model_param: Tensor) -> dict[str, Tensor]:
        storage, state = self._of(model_param)
        named = {name: state[ours] for name, ours in self._names(model_param).items()}
        lacking = {
            name: torch.zeros_like(named["exp_avg"])
            for name in self.optimizer_state_keys
            if name not in named
        }
        return {"param": storage, **named, **lacking}

    def _set_main_param_and_optimizer_states(
        self, model_param: Tensor, tensors: Mapping[str, Tensor]
    ) -> None:
        storage, state = self._of(model_param)
        storage.detach().copy_(tensors["param"])
        for name, ours in self._names(model_param).items():
            state[ours].copy_(tensors[name])

    def _names(self, model_param: Tensor) -> dict[str, str]:
        """From the names of states in checkpoints to FlashMuon's."""
        states = RULES[self.flashmuon_rules[model_param]].local_states
        return dict(zip(self.optimizer_state_keys, states, strict=False))

    def _of(self, model_param: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        group_index, order = self.model_param_group_index_map[model_param]
        storage = self.optimizer.param_groups[group_index]["params"][order]
        return storage, self.optimizer.state[storage]


class _Replicated(MegatronOptimizer):  # type: ignore[misc]
    """What the optimizers without flat shards have of FlashMuon's.

    Of Megatron's class, so that an object of theirs can become one of ours (its layout in memory is
    the same).

    Attributes:
        flashmuon_lacking: By storage, names of states that other layers have and it has not.
    """

    flashmuon_lacking: dict[Tensor, frozenset[str]]

    @staticmethod
    def _filter_and_reorder_param_groups(
        current_groups: list[dict[str, Any]], state_dict_groups: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        return _reordered(current_groups, state_dict_groups)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Megatron's, with zeros for states that other layers have: it stacks them."""
        found: dict[str, Any] = super().state_dict(*args, **kwargs)
        state = found.get("optimizer", found)["state"]
        for index, storage, names in self._lacking():
            zeros = {name: torch.zeros_like(storage, dtype=torch.float32) for name in names}
            state[index] = {**state[index], **zeros}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Megatron's, without the zeros; does not edit the dict, as Megatron's does."""
        inner = state_dict.get("optimizer", state_dict)
        state = {
            key: {**entry} if isinstance(entry, Mapping) else entry
            for key, entry in inner["state"].items()
        }
        for index, _, names in self._lacking():
            state[index] = {k: v for k, v in state[index].items() if k not in names}
        inner = {**inner, "state": state}
        super().load_state_dict(
            {**state_dict, "optimizer": inner} if "optimizer" in state_dict else inner
        )
        _add_counts(self.optimizer)

    def _lacking(self) -> list[tuple[int, Tensor, frozenset[str]]]:
        """Numbers in state dicts, storages, and states that they lack."""
        storages = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [
            (index, storage, self.flashmuon_lacking[storage])
            for index, storage in enumerate(storages)
            if storage in self.flashmuon_lacking
        ]


class FlashMuonFloat16Optimizer(_Replicated, Float16OptimizerWithFloat16Params):  # type: ignore[misc]
    """State of whole tensor-parallel shards, with fp32 copies of the weights."""


class FlashMuonFP32Optimizer(_Replicated, FP32Optimizer):  # type: ignore[misc]
    """State of whole tensor-parallel shards."""


CLASSES = {
    DistributedOptimizer: FlashMuonDistributedOptimizer,
    Float16OptimizerWithFloat16Params: FlashMuonFloat16Optimizer,
    FP32Optimizer: FlashMuonFP32Optimizer,
}
"""The class that each of Megatron's optimizers becomes."""


def state_names_of(rules: Iterable[str]) -> frozenset[str]:
    """Names of the states that parameters of these rules have, cut as the parameters are."""
    return frozenset(name for rule in rules for name in RULES[rule].local_states)


def _reordered(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**group, "params": theirs["params"]}
        for group, theirs in zip(restored_groups(current, saved), saved, strict=True)
    ]


def _add_counts(optimizer: Any) -> None:
    """A checkpoint that was made before the first step has no counts of steps."""
    for storage, state in optimizer.state.items():
        if "step" not in state:
            where = "cpu" if "momentum_buffer" in state else storage.device
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)


def restored_groups(
    current: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The groups of this run with the learning rate and weight decay of a checkpoint.

    Everything else that a group has stays as it is: it is this run's flags. With
    ``--use-checkpoint-opt_param-scheduler``, peak and lowest learning rate are the checkpoint's.

    Raises:
        ValueError: The checkpoint lacks a group, or was written with other overrides.
    """
    available: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for group in saved:
        available.setdefault(_identity(group), []).append(group)
    kept = ["lr", "weight_decay"]
    if schedule_is_the_checkpoints():
        kept += ["max_lr", "min_lr"]
    restored = []
    for group in current:
        same = available.get(_identity(group), [])
        if not same:
            described = dict(zip(_IDENTITY, _identity(group), strict=True))
            raise ValueError(
                f"the checkpoint has no parameter group with {described}; it has "
                f"{sorted(map(str, available))}. It was written by another optimizer or with other "
                "--flashmuon-overrides: resume with the same, or with --no-load-optim."
            )
        theirs = same.pop(0)
        # Megatron finds states by name: a matrix would take an AdamW's first moment as momentum.
        if theirs.get(OVERRIDES, group.get(OVERRIDES)) != group.get(OVERRIDES):
            raise ValueError(
                f"the checkpoint was written with --flashmuon-overrides {theirs[OVERRIDES]}, this "
                f"run has {group.get(OVERRIDES)}: resume with the same, or with --no-load-optim."
            )
        scheduled = {key: theirs[key] for key in kept if key in theirs}
        others = {k: v for k, v in theirs.items() if k not in ("params", "step")}
        restored.append({**others, **group, **scheduled})
    return restored


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in _IDENTITY)
