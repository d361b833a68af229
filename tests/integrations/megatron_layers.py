"""What Megatron takes from GPU libraries for its layers, on the CPU."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def layer_spec(experts: int, cp: int, *, packed: bool) -> Any:
    """Megatron's own layers; with context parallelism, its attention over gathered keys."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    options = {"moe_use_legacy_grouped_gemm": True} if packed else {}
    spec = get_gpt_layer_local_spec(experts or None, moe_grouped_gemm=packed, **options)
    if cp > 1:
        spec.submodules.self_attention.submodules.core_attention = gathering_attention
    return spec


def positions(length: int, cp: int, rank: int) -> Tensor:
    """Which of a sequence's positions a context-parallel rank has: one early and one late part."""
    parts = torch.arange(length).chunk(2 * cp)
    return torch.cat([parts[rank], parts[2 * cp - 1 - rank]])


def positions_here(length: int) -> Tensor:
    """This rank's positions; Megatron's rotary embeddings take the same."""
    from megatron.core import parallel_state as state

    if state.get_context_parallel_world_size() == 1:
        return torch.arange(length)
    group = state.get_context_parallel_group()
    return positions(length, group.size(), group.rank())


def gathering_attention(config: Any, *args: Any, **kwargs: Any) -> Any:
    """Megatron's ``DotProductAttention`` of this rank's queries to the keys of all.

    That class refuses context parallelism, as it sees the keys of one rank only.
    """
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class GatheringAttention(DotProductAttention):
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any
        ) -> Tensor:
            group = state.get_context_parallel_group()
            length = len(query) * group.size()
            found = torch.cat([positions(length, group.size(), r) for r in range(group.size())])
            key, value = (
                gather_from_sequence_parallel_region(t.contiguous(), group=group)
                for t in (key, value)
            )
            is_later = found > positions_here(length)[:, None]
            return super().forward(query, key, value, is_later[None, None], **others)

    alone = copy.copy(config)
    alone.context_parallel_size = 1
    return GatheringAttention(alone, *args, **kwargs)


def grouped_gemm(tokens: Tensor, weights: Tensor, counts: Tensor, trans_b: bool = False) -> Tensor:
    """``grouped_gemm.ops.gmm``: each expert's (in, out) weight times its rows of the tokens."""
    assert not trans_b
    parts = tokens.split(counts.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def packed_experts_patches() -> list[tuple[Any, str, Any]]:
    """What ``GroupedMLP`` needs of the package; nothing where Megatron has no such class."""
    try:
        from megatron.core.transformer.moe import experts, grouped_gemm_util
    except ImportError:
        return []
    library = SimpleNamespace(ops=SimpleNamespace(gmm=grouped_gemm))
    return [
        (grouped_gemm_util, "grouped_gemm", library),
        (grouped_gemm_util, "ops", library.ops),
        (experts, "jit_fuser", lambda function: function),
    ]


def allow_fp32(model: nn.Module) -> None:
    """Let ``GroupedMLP`` pass its check for bf16, which is about the package's kernels."""
    for module in model.modules():
        if type(module).__name__ == "GroupedMLP":
            module.config = copy.copy(module.config)
            module.config.bf16 = True  # type: ignore[union-attr]


def add_convolutions(model: nn.Module) -> None:
    """What patches of pictures and state-space layers have; nothing is computed with them."""
    model.patches = nn.Conv2d(4, 12, 3, bias=False)
    model.grouped = nn.Conv2d(8, 12, (3, 2), groups=2, bias=False)
    model.conv1d = nn.Conv1d(4, 10, 5, bias=False)
