"""The one place that knows Megatron's internals, and how its versions differ.

Checked against megatron-core 0.16.1, 0.17.1, 0.18.2, 0.19.2 and the development version (0.20.0) of
August 2026. Megatron itself builds its optimizer, for Adam; only the innermost torch optimizer is
then replaced. So what is needed is the same in all of them, and each function here fails with the
name of what is missing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import megatron.core
import torch.distributed as dist
from megatron.core import optimizer as core_optimizer
from megatron.core import parallel_state
from torch import Tensor, nn

from flashns_dist.optim.binding import forget_other_worlds

from .layouts import buffer_ranges

VERSION: str = megatron.core.__version__
TESTED = "0.16.1, 0.17.1, 0.18.2 and 0.19.2"

_BUILDER = "_get_megatron_optimizer_based_on_param_groups"
_FACTORY = "get_megatron_optimizer"
_MUON_FACTORY = "get_megatron_muon_optimizer"


def attribute(owner: object, name: str) -> Any:
    """An internal attribute of Megatron.

    Raises:
        RuntimeError: This version lacks it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        is_named = isinstance(owner, type) or inspect.ismodule(owner)
        kind = owner.__name__ if is_named else type(owner).__name__  # type: ignore[attr-defined]
        raise RuntimeError(
            f"megatron-core {VERSION} has no {kind}.{name}, which FlashMuon's adapter needs. Use a "
            f"version that it was tested with ({TESTED}), or report this one."
        ) from None


def check_version() -> None:
    """Raise RuntimeError where something that installing relies on is missing."""
    for name in (_BUILDER, _FACTORY, "get_standard_config_overrides"):
        attribute(core_optimizer, name)
    for name in ("ParamKey", "ParamWithNamePredicate"):
        attribute(core_optimizer, name)


# Factories ------------------------------------------------------------------------------------


def replace_factories(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a wrapper in the place of the optimizer factory, wherever it has been imported to.

    0.16 and 0.17 call a second factory for names with "muon" in them.
    """
    original = attribute(core_optimizer, _FACTORY)
    rebind(original, wrap(original))
    try:
        from megatron.core.optimizer import muon
    except ImportError:
        return
    second = getattr(muon, _MUON_FACTORY, None)
    if second is not None:

        def routed(config: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(config, "optimizer", "") != "flashmuon":
                return second(config, *args, **kwargs)
            kwargs.pop("layer_wise_distributed_optimizer", None)
            return getattr(core_optimizer, _FACTORY)(config, *args, **kwargs)

        rebind(second, routed)


def rebind(original: object, replacement: object) -> None:
    """Replace an object in every module that refers to it by a global name."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None) or {}
        for name in [key for key, value in list(names.items()) if value is original]:
            setattr(module, name, replacement)


@contextmanager
def intercepted_builder(finish: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Call ``finish(optimizer, arguments)`` for each part that Megatron's factory builds."""
    original = attribute(core_optimizer, _BUILDER)
    signature = inspect.signature(original)

    def builder(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        members = [list(group["params"]) for group in given["param_groups"]]
        optimizer = original(*args, **kwargs)
        finish(optimizer, {**given, "members": members})
        return optimizer

    setattr(core_optimizer, _BUILDER, builder)
    try:
        yield
    finally:
        setattr(core_optimizer, _BUILDER, original)


@contextmanager
def built_as_adam(config: Any, *, skips_nonfinite: bool = False) -> Iterator[None]:
    """Let Megatron take the path of Adam, which keeps the distributed optimizer in all versions.

    Where steps are to be skipped, with a constant loss scale of 1 if it has none: Megatron then
    looks for overflows on all ranks, FlashMuon only on those that share a matrix.
    """
    name, loss_scale = config.optimizer, config.loss_scale
    config.optimizer = "adam"
    if skips_nonfinite and not config.fp16 and not loss_scale:
        config.loss_scale = 1.0
    try:
        yield
    finally:
        config.optimizer, config.loss_scale = name, loss_scale


def add_overrides(
    config: Any, overrides: Mapping[Any, Any] | None, added: Mapping[Tensor, Mapping[str, Any]]
) -> dict[Any, Any]:
    """Megatron's settings by parameter, and ours.

    Args:
        config: Of the optimizer.
        overrides: What the user passed; None for Megatron's standard ones.
        added: From parameters to group settings.
    """
    if overrides is None:
        overrides = attribute(core_optimizer, "get_standard_config_overrides")(config)
    key = attribute(core_optimizer, "ParamKey")
    predicate = attribute(core_optimizer, "ParamWithNamePredicate")
    kinds: dict[tuple[Any, ...], set[Tensor]] = {}
    for param, settings in added.items():
        kinds.setdefault(tuple(sorted(settings.items())), set()).add(param)
    result = dict(overrides)
    for number, (told, params) in enumerate(kinds.items()):
        matches = predicate(
            name=f"flashmuon_{number}", fn=lambda param, _, params=params: param in params
        )
        result[key(with_name_predicate=matches)] = dict(told)
    return result


def schedule_is_the_checkpoints() -> bool:
    """Whether megatron.training was told ``--use-checkpoint-opt_param-scheduler``."""
    training = sys.modules.get("megatron.training.global_vars")
    args = getattr(training, "_GLOBAL_ARGS", None)
    return bool(getattr(args, "use_checkpoint_opt_param_scheduler", False))


# What lies where ------------------------------------------------------------------------------


def is_distributed(optimizer: Any) -> bool:
    """Whether it keeps flat shards of its parameters."""
    return hasattr(optimizer, "gbuf_ranges")


def main_params(optimizer: Any) -> list[tuple[Tensor, Tensor]]:
    """Model parameters, and the tensors that the innermost optimizer updates for them.

    ``model_param_group_index_map`` is wrong for groups that mix fp32 and lower precision: the
    groups are zipped instead.
    """
    if is_distributed(optimizer):
        kinds = [
            ("model_float16_groups", "shard_fp32_from_float16_groups"),
            ("model_fp32_groups", "shard_fp32_groups"),
        ]
    elif hasattr(optimizer, "float16_groups"):
        kinds = [
            ("float16_groups", "fp32_from_float16_groups"),
            ("fp32_from_fp32_groups", "fp32_from_fp32_groups"),
        ]
    else:
        return [(p, p) for group in optimizer.optimizer.param_groups for p in group["params"]]
    return [
        pair
        for ours, theirs in kinds
        for model, main in zip(
            attribute(optimizer, ours), attribute(optimizer, theirs), strict=True
        )
        for pair in zip(model, main, strict=True)
    ]


def flat_ranges(optimizer: Any) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Every parameter of the optimizer's buffers, with its elements by data-parallel rank.

    In the order of the buffers, which is that of all ranks of the group; also for parameters of
    which this rank stores nothing. By arithmetic: no communication.

    Raises:
        RuntimeError: Megatron's own map for this rank says otherwise.
    """
    for buffer in attribute(optimizer, "buffers"):
        group = attribute(buffer, "data_parallel_group")
        buckets, index_map = attribute(buffer, "buckets"), attribute(buffer, "param_index_map")
        for param, (start, stop, bucket_id) in sorted(index_map.items(), key=lambda e: e[1][0]):
            bucket = buckets[bucket_id]
            numel = attribute(bucket, "grad_data").numel()
            ranges = buffer_ranges(start, stop, attribute(bucket, "offset"), numel, group.size())
            _check_range(optimizer, param, ranges[group.rank()])
            yield param, ranges


def _check_range(optimizer: Any, param: Tensor, expected: tuple[int, int]) -> None:
    found = (0, 0)
    if param in attribute(optimizer, "model_param_gbuf_map"):
        held = optimizer._get_model_param_range_map(param)["param"]
        found = (held.start, held.end)
    if found != expected:
        raise RuntimeError(
            f"megatron-core {VERSION} keeps elements {found} of a parameter of shape "
            f"{tuple(param.shape)} on rank {dist.get_rank()}, where its buffers' layout says "
            f"{expected}. FlashMuon's adapter does not understand this version's layout; use one "
            f"of {TESTED}, or report it."
        )


def repair_index_map(optimizer: Any) -> None:
    """Make Megatron's own map right for groups of mixed precision."""
    positions = {
        id(shard): (index, order)
        for index, group in enumerate(optimizer.optimizer.param_groups)
        for order, shard in enumerate(group["params"])
    }
    optimizer.model_param_group_index_map = {
        param: positions[id(shard)] for param, shard in main_params(optimizer)
    }


# Process groups -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grid:
    """The ranks that share the matrices of one part: data parallel times tensor parallel.

    Attributes:
        process_group: Of all of them.
        tensor_group: This rank's tensor-parallel group.
        members: (tensor-parallel index, data-parallel index) by group rank.
        group_rank: This process's.
    """

    process_group: dist.ProcessGroup
    tensor_group: dist.ProcessGroup
    members: tuple[tuple[int, int], ...]
    group_rank: int

    @property
    def num_shards(self) -> int:
        return int(self.tensor_group.size())


def find_grid(chunks: Sequence[nn.Module], is_expert: bool, groups: Any) -> Grid | None:
    """The grid of the dense or the expert parameters; None where this rank has none.

    Context parallelism counts as data parallelism.

    Args:
        chunks: The model's chunks, wrapped in DistributedDataParallel.
        is_expert: Whose.
        groups: A ``ProcessGroupCollection`` or None.

    Collectives: ``all_gather_object`` on the tensor-parallel group and on the world, and the making
    of process groups.
    """
    name = "expert_parallel_buffers" if is_expert else "buffers"
    buffers = [buffer for chunk in chunks for buffer in getattr(chunk, name, [])]
    if not buffers:
        _group_of((), [])
        return None
    data_group = attribute(buffers[0], "data_parallel_group")
    tensor_group = _tensor_group(is_expert, groups)
    mine = dist.get_process_group_ranks(data_group)
    columns: list[list[int]] = [mine] * tensor_group.size()
    if tensor_group.size() > 1:
        dist.all_gather_object(columns, mine, group=tensor_group)
    places = {
        rank: (shard, replica)
        for shard, column in enumerate(columns)
        for replica, rank in enumerate(column)
    }
    process_group = _group_of(tuple(sorted(places)), [data_group, tensor_group])
    assert process_group is not None
    members = tuple(places[rank] for rank in dist.get_process_group_ranks(process_group))
    return Grid(process_group, tensor_group, members, dist.get_rank(process_group))


def _tensor_group(is_expert: bool, groups: Any) -> dist.ProcessGroup:
    found = getattr(groups, "expt_tp" if is_expert else "tp", None)
    if found is not None:
        return found  # type: ignore[no-any-return]
    if is_expert:
        return attribute(parallel_state, "get_expert_tensor_parallel_group")()  # type: ignore[no-any-return]
    return attribute(parallel_state, "get_tensor_model_parallel_group")()  # type: ignore[no-any-return]


_GROUPS: dict[tuple[Any, ...], dist.ProcessGroup] = {}


def _group_of(
    ranks: tuple[int, ...], candidates: Sequence[dist.ProcessGroup]
) -> dist.ProcessGroup | None:
    """A process group of these ranks: an existing one, or a new one that is made at most once.

    Every rank of the world calls this, with no ranks if it needs no group, because a communicator
    that is split from the world's is made by all of it.
    """
    existing = next(
        (
            group
            for group in (dist.group.WORLD, *candidates)
            if group is not None and tuple(sorted(dist.get_process_group_ranks(group))) == ranks
        ),
        None,
    )
    key = (dist.group.WORLD, ranks)
    forget_other_worlds(_GROUPS)
    missing = ranks if ranks and existing is None and key not in _GROUPS else ()
    wanted: list[tuple[int, ...]] = [missing] * dist.get_world_size()
    dist.all_gather_object(wanted, missing)
    for members in sorted(set(wanted) - {()}):
        _GROUPS[dist.group.WORLD, members] = dist.new_group(list(members))
    return existing or _GROUPS.get(key)
