"""The matrices in Megatron's parameters: fused projections and packed experts taken apart.

Everything here is in coordinates of the whole parameter, as tensor parallelism of degree one would
store it row after row, shard after shard; so that the matrices do not depend on the degree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flashns_dist.layout import Block, Flattened, Sections, leading_blocks

from .layouts import global_shape


@dataclass(frozen=True)
class Description:
    """How one parameter is to be read.

    Attributes:
        local_shape: As which array its tensor-parallel shard, row-major, is seen.
        dim: The dim of it that tensor parallelism cuts; -1 for none.
        blocks: Its matrices; empty for auxiliary parameters.
    """

    local_shape: tuple[int, ...]
    dim: int
    blocks: tuple[Block, ...]


def describe(
    name: str,
    param: Tensor,
    owners: list[nn.Module],
    num_shards: int,
    *,
    is_matrix: bool,
    split_qkv: bool,
    split_gate_up: bool,
) -> Description:
    """Read a parameter of Megatron's.

    Args:
        name: Full name, for errors.
        param: The tensor-parallel shard.
        owners: The module that holds it, the module that holds that one, and so on.
        num_shards: Tensor-parallel degree.
        is_matrix: Whether it is to be orthogonalized.
        split_qkv: Orthogonalize query, key and value of a fused projection by themselves.
        split_gate_up: Likewise the two halves of a gated ``linear_fc1``.

    Raises:
        ValueError: A fused weight has not the shape that its module's config says.
    """
    dim = tensor_parallel_dim(param) if num_shards > 1 else -1
    shape = tuple(int(size) for size in param.shape) or (1,)
    if is_packed_experts(name, owners):
        return _packed_experts(name, shape, dim, owners[0], num_shards, split_gate_up)
    if not is_matrix:
        return Description(shape, dim, ())
    whole = global_shape(shape, dim, num_shards)
    if is_convolution(owners):
        groups = int(owners[0].groups)  # type: ignore[arg-type]
        cut = num_shards if dim == 0 and groups > 1 else 1  # these are the shard's
        return Description(shape, dim, Flattened(groups * cut)(whole))
    blocks = leading_blocks(whole)
    if len(shape) == 2 and split_qkv and _module_name(name) == "linear_qkv":
        blocks = _qkv(name, whole, getattr(owners[1], "config", None))
    elif len(shape) == 2 and split_gate_up and is_gated_fc1(name, param, owners):
        blocks = _gate_up(whole, num_shards if dim == 0 else 1)
    return Description(shape, dim, blocks)


def tensor_parallel_dim(param: Tensor) -> int:
    """The dim along which a parameter is cut; -1 where every rank stores all of it."""
    if not getattr(param, "tensor_model_parallel", False):
        return -1
    return int(getattr(param, "partition_dim", -1))


def is_convolution(owners: list[nn.Module]) -> bool:
    """Whether a weight is a convolution's, ``(out, in / groups, *kernel)``."""
    return isinstance(owners[0], _ConvNd)


def is_packed_experts(name: str, owners: list[nn.Module]) -> bool:
    """Whether a 2-D weight is really a stack of expert matrices, in (in, out) order."""
    is_weight = name.rsplit(".", 1)[-1] in ("weight1", "weight2")
    return is_weight and type(owners[0]).__name__ == "GroupedMLP"


def is_gated_fc1(name: str, param: Tensor, owners: list[nn.Module]) -> bool:
    """Whether each shard of a weight is a gate projection and then an up projection."""
    if int(getattr(param, "partition_stride", 1)) == 2:
        return True
    config = next((o.config for o in owners if hasattr(o, "config")), None)
    return _module_name(name) == "linear_fc1" and bool(getattr(config, "gated_linear_unit", False))


def _module_name(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def _qkv(name: str, shape: tuple[int, ...], config: Any) -> tuple[Block, ...]:
    """Query, (output gate,) key and value; the rows of each query group follow one another."""
    rows = shape[0]
    groups, heads, width = (
        int(getattr(config, key, None) or 0)
        for key in ("num_query_groups", "num_attention_heads", "kv_channels")
    )
    query = heads // groups * width if groups else 0
    gates = [query] if getattr(config, "attention_output_gate", False) else []
    sizes = [query, *gates, width, width]
    if not groups or groups * sum(sizes) != rows:
        raise ValueError(
            f"{name}: {rows} rows are not those of {heads} attention heads of width {width} in "
            f"{groups} query groups, so that it cannot be split. Use --no-flashmuon-split-qkv "
            "(Settings(split_qkv=False)) to orthogonalize it as one matrix."
        )
    return Sections(tuple(sizes), repeats=groups)(shape)


def _gate_up(shape: tuple[int, ...], num_shards: int, dim: int = 0) -> tuple[Block, ...]:
    """Gate and up projection of rows or columns ``[gate_0, up_0, gate_1, up_1, ...]``."""
    half = shape[dim - 2] // num_shards // 2
    return Sections((half, half), dim, repeats=num_shards)(shape)


def _packed_experts(
    name: str,
    shape: tuple[int, ...],
    dim: int,
    owner: nn.Module,
    num_shards: int,
    split_gate_up: bool,
) -> Description:
    """``weight1`` is ``(experts, hidden, width)`` and ``weight2`` ``(experts, width, hidden)``."""
    experts, config = int(owner.num_local_experts), owner.config  # type: ignore[arg-type]
    is_first = name.endswith("weight1")
    if is_first:
        local_shape = (experts, shape[0], shape[1] // experts)
    else:
        local_shape = (experts, shape[0] // experts, shape[1])
    cut = (2 if is_first else 1) if dim >= 0 else -1
    whole = global_shape(local_shape, cut, num_shards)
    gated = is_first and bool(getattr(config, "gated_linear_unit", False))
    if not (gated and split_gate_up):
        return Description(local_shape, cut, leading_blocks(whole))
    return Description(local_shape, cut, _gate_up(whole, num_shards if cut >= 0 else 1, dim=1))
