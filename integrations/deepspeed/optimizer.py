"""The optimizer object that DeepSpeed holds: hands FlashMuon's step loop what DeepSpeed hands it.

DeepSpeed replaces the parameters in the groups by flat partitions and calls ``step()`` once per
group (ZeRO 1 and 2), once per sub-group (ZeRO 3) or once. Each call becomes one FlashMuon step over
the matrices in what is handed over, bound by their layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from flashns_dist.optim import BoundParameter, ExchangeOptions, FlashMuon
from flashns_dist.optim.flash_muon import init_state
from flashns_dist.optim.overlap import check_overlap
from flashns_dist.optim.rules import AUXILIARY_RULES, RULES
from flashns_dist.optim.state import completed_state_dict, plain_state_dict, restore_dtypes

from .internals import (
    find_partitions,
    gradient_norm,
    is_initializing,
)
from .partitions import Partition

# States of matrices, as DeepSpeed's checkpoints name them.
_NAMES = {"momentum_buffer": "exp_avg", "second_moment": "exp_avg_sq"}


class FlashNS(Optimizer):
    """FlashMuon as DeepSpeed holds it (``engine.basic_optimizer``).

    Its class name must not contain "muon": ZeRO 1 and 2 orthogonalize gradients themselves for
    such classes, where parameters carry ``use_muon``.

    State by partition: ``step``, ``exp_avg`` (the momentum of matrices, the first moment of
    auxiliary parameters) and ``exp_avg_sq`` (auxiliary ones only), named as DeepSpeed's universal
    checkpoints need them; present from the start, in fp32.

    Args:
        groups: Complete groups, as ``grouping`` makes them; used as they are.
        names: Parameter names by ``id``.
        nonfinite: As FlashMuon's.
        exchange: As FlashMuon's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: Mapping[int, str],
        *,
        nonfinite: str = "raise",
        exchange: ExchangeOptions | None = None,
    ) -> None:
        if not any(group["params"] for group in groups):
            raise ValueError("FlashMuon got no trainable parameters")
        super().__init__(groups, {})
        self._nonfinite = nonfinite
        self._exchange = exchange or ExchangeOptions()
        self._names = names
        self._originals: list[dict[str, Any]] = []
        self._partitions: list[Partition] = []
        self._wrapper: Any = None
        self._kept: list[dict[str, Any]] = []
        self._steps: dict[tuple[int, ...], FlashMuon] = {}
        self._skipping = False
        self.remember_parameters()

    @classmethod
    def from_flash_muon(
        cls, optimizer: FlashMuon, groups: list[dict[str, Any]], names: Mapping[int, str]
    ) -> FlashNS:
        """Take over a FlashMuon that the user made; its groups stay the same dicts.

        Raises:
            ValueError: It asks for what does not work under an adapter.
        """
        if optimizer.cuda_graph:
            raise ValueError(
                "cuda_graph=True is not for DeepSpeed, which calls a step per partition; leave it "
                "out"
            )
        check_overlap(optimizer.exchange_options, has_adapter=True)
        optimizer.state.clear()
        made = cls(
            groups, names, nonfinite=optimizer.nonfinite, exchange=optimizer.exchange_options
        )
        made.param_groups = groups  # a scheduler that the user has attached changes these
        made.remember_parameters()
        return made

    # Setup ------------------------------------------------------------------------------------

    def remember_parameters(self) -> None:
        """Note the groups' parameters before DeepSpeed replaces them."""
        for index, group in enumerate(self.param_groups):
            group["group_id"] = index
        self._originals = [
            {
                "params": list(group["params"]),
                "names": [self._names[id(param)] for param in group["params"]],
            }
            for group in self.param_groups
        ]

    def attach(self, engine: Any) -> None:
        """Find out what lies where, and make the state. Called once the engine has wrapped this.

        Collectives: ``all_gather_object`` on each partition's process group.
        """
        self._wrapper = engine.optimizer
        self._partitions = find_partitions(engine, self._originals)
        self._originals = []
        self._keep_settings()
        self.state.clear()
        for partition in self._partitions:
            group = self.param_groups[partition.group_index]
            self.state[partition.storage] = self._from_step(
                init_state(partition.storage.detach(), group)
            )

    def _keep_settings(self) -> None:
        self._kept = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.param_groups
        ]

    # Step -------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One FlashMuon step over the partitions that are in the groups now.

        Raises:
            FloatingPointError: A gradient is not finite and ``nonfinite="raise"``.
        """
        assert closure is None, "DeepSpeed passes no closure"
        live = [group for group in self.param_groups if group["params"]]
        storages = [param for group in live for param in group["params"]]
        if not self._partitions:
            if is_initializing([param.grad for param in storages]):
                return
            raise RuntimeError(
                "FlashMuon has not been attached to a DeepSpeed engine: make it with "
                "deepspeed.initialize, after importing flashns_dist.integrations.deepspeed"
            )
        self._restore_settings(live)
        if storages[0] is self._partitions[0].storage:
            self._skipping = self._must_skip()
        if self._skipping:
            return
        for group in live:
            for storage in group["params"]:
                self._adopt_state(storage, group)
        self._run(live, storages)

    def _must_skip(self) -> bool:
        """Whether to leave the whole step out; asked before its first part changes anything."""
        if self._wrapper is self or len(self._partitions) == 1:
            return False  # a single call: FlashMuon's own check sees everything
        norm = gradient_norm(self._wrapper)
        if norm is None or norm < float("inf"):
            return False
        if self._nonfinite == "raise":
            raise FloatingPointError(
                f"the norm of the gradients is {norm}. Weights and momentum are unchanged. Use "
                'optimizer.params.nonfinite="skip" to skip such steps.'
            )
        return True

    def _run(self, live: Sequence[dict[str, Any]], storages: Sequence[Tensor]) -> None:
        key = tuple(id(storage) for storage in storages)
        if key not in self._steps:
            self._steps[key] = self._step_over(live)
        inner = self._steps[key]
        inner.param_groups = [
            {**group, "lr": float(group["lr"]) * group["lr_ratio"]} for group in live
        ]
        for group in live:
            for storage in group["params"]:
                inner.state[storage] = self._to_step(self.state[storage], group)
        inner.step()

    def _step_over(self, live: Sequence[dict[str, Any]]) -> FlashMuon:
        """A FlashMuon whose parameters are those in some groups' partitions."""
        inner = FlashMuon([{"params": []}], nonfinite=self._nonfinite, exchange=self._exchange)  # type: ignore[arg-type]
        by_storage = {partition.storage: partition for partition in self._partitions}
        chosen = [
            (by_storage[storage], group, position)
            for position, group in enumerate(live)
            for storage in group["params"]
        ]

        def adapter() -> list[BoundParameter]:
            return [
                bound
                for partition, group, position in chosen
                for bound in partition.bind(group, position)
            ]

        inner.bind(adapter)
        return inner

    # State ------------------------------------------------------------------------------------

    @staticmethod
    def _to_step(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """The state by FlashMuon's names; the tensors are shared."""
        if group["update_rule"] in AUXILIARY_RULES:
            return state
        known = {ours: theirs for theirs, ours in _NAMES.items()}
        return {known.get(key, key): value for key, value in state.items()}

    @staticmethod
    def _from_step(state: dict[str, Any]) -> dict[str, Any]:
        return {_NAMES.get(key, key): value for key, value in state.items()}

    def _adopt_state(self, storage: Tensor, group: dict[str, Any]) -> None:
        """Take what a checkpoint loader has written into the state directly."""
        state = self.state[storage]
        rule = RULES[group["update_rule"]]
        if not {"exp_avg_sq", "second_moment"} & set(rule.local_states):
            state.pop("exp_avg_sq", None)
        for key, value in state.items():
            if key == "step":
                if not isinstance(value, Tensor):
                    where = storage.device if rule.name in AUXILIARY_RULES else "cpu"
                    state[key] = torch.tensor(float(value), dtype=torch.float32, device=where)
            elif value.dtype != torch.promote_types(storage.dtype, torch.float32):
                state[key] = value.to(torch.promote_types(storage.dtype, torch.float32))

    def _restore_settings(self, live: Sequence[dict[str, Any]]) -> None:
        """Undo ZeRO 3's universal load, which gives all groups the first one's settings."""
        order = {id(group): index for index, group in enumerate(self.param_groups)}
        if len(self.param_groups) == len(self._kept):
            wrong = [g for g in live if g.get("group_id") != order[id(g)]]
            for group in wrong:
                lrs = group.get("lrs")
                if lrs and group["lr"] == lrs[group["group_id"]]:  # else a scheduler has set it
                    group["lr"] = lrs[order[id(group)]]
                group.update(self._kept[order[id(group)]])

    def state_dict(self) -> dict[str, Any]:
        """As every torch optimizer's, with integer steps.

        ``ds_to_universal`` expects an ``exp_avg_sq`` of everything: matrices show zeros, which take
        no memory. Each group has the learning rates of all, because ZeRO 3's universal load reads
        one group only.
        """
        plain = plain_state_dict(super().state_dict())
        lrs = [float(group["lr"]) for group in self.param_groups]
        groups = [{**group, "lrs": lrs} for group in plain["param_groups"]]
        flat = {id(p.storage) for p in self._partitions if p.is_flat}
        keys: dict[int, Tensor] = {}
        position = 0
        for group in self.param_groups:
            for param in group["params"]:
                keys[position] = param
                position += 1
        state = {}
        for key, entry in plain["state"].items():
            entry = {**entry, "step": int(entry["step"])} if "step" in entry else dict(entry)
            if "exp_avg" in entry and id(keys.get(key)) in flat:
                zeros = torch.zeros(1, dtype=entry["exp_avg"].dtype)
                entry.setdefault("exp_avg_sq", zeros.expand(entry["exp_avg"].shape))
            state[key] = entry
        return {**plain, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, on the same number of ranks."""
        completed = completed_state_dict(state_dict, self.param_groups)
        groups = self.param_groups
        super().load_state_dict(completed)
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.update(loaded)
        self.param_groups = groups  # a scheduler that the user has attached changes these
        restore_dtypes(self, completed)
        for group in self.param_groups:
            for storage in group["params"]:
                if storage in self.state:
                    self._adopt_state(storage, group)
        self._keep_settings()


__all__ = ["FlashNS"]
