"""What FlashMuon does not do under Megatron, refused before training starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

SHARDING_TYPES = ("fully_reshardable", "dp_reshardable")
CHECKPOINT_FORMATS = ("torch_dist",)


def check_supported(config: Any, chunks: Sequence[nn.Module]) -> None:
    """Raise for a feature that would be wrong or has not been made to work.

    Args:
        config: Megatron's ``OptimizerConfig``.
        chunks: The model's chunks.

    Raises:
        NotImplementedError: Names the setting, the reason and what to do.
    """
    for setting, reason in _refusals(config, chunks):
        raise NotImplementedError(f"FlashMuon does not support Megatron's {setting}: {reason}")


def check_skipping(config: Any, chunks: Sequence[nn.Module]) -> None:
    """Raise where a step would be skipped on some ranks only: Megatron's FP32Optimizer."""
    model = getattr(chunks[0], "config", None)
    degrees = ("pipeline_model_parallel_size", "expert_model_parallel_size")
    if config.fp16 or config.bf16 or config.use_distributed_optimizer:
        return
    if any((getattr(model, degree, None) or 1) > 1 for degree in degrees):
        raise NotImplementedError(
            "FlashMuon does not support --flashmuon-nonfinite skip with pipeline or expert "
            "parallelism in Megatron's fp32 without the distributed optimizer, which looks for no "
            "overflow: one part of the model would step and another not. Use "
            "--use-distributed-optimizer, or --flashmuon-nonfinite raise."
        )


def check_arguments(args: Any) -> None:
    """The same for the command line, before anything is built."""
    if getattr(args, "save", None) or getattr(args, "load", None):
        check_checkpoint_format(getattr(args, "ckpt_format", "torch_dist"))


def check_checkpoint_format(name: str) -> None:
    if name not in CHECKPOINT_FORMATS:
        raise NotImplementedError(
            f"FlashMuon does not support Megatron's --ckpt-format {name}: its state has been made "
            "to work with torch_dist only. Use --ckpt-format torch_dist."
        )


def check_sharding_type(name: str | None) -> None:
    if name not in SHARDING_TYPES:
        raise NotImplementedError(
            f"FlashMuon does not support Megatron's checkpoint format {name} of the distributed "
            f"optimizer. Use one of {SHARDING_TYPES} "
            "(--dist-ckpt-optim-fully-reshardable chooses the first)."
        )


def _refusals(config: Any, chunks: Sequence[nn.Module]) -> Iterator[tuple[str, str]]:
    if getattr(config, "optimizer_cpu_offload", False):
        yield (
            "optimizer_cpu_offload",
            "matrices would be orthogonalized on the CPU. FlashMuon's state is half of Adam's for "
            "matrices: leave it out, or use --use-distributed-optimizer.",
        )
    if getattr(config, "offload_optimizer_states", False):
        yield "offload_optimizer_states", "it moves states of Adam's between steps. Leave it out."
    if getattr(config, "use_precision_aware_optimizer", False):
        yield (
            "use_precision_aware_optimizer",
            "it leaves master weights and their precision to TransformerEngine's Adam. Leave it "
            "out.",
        )
    if getattr(config, "use_layer_wise_distributed_optimizer", False):
        yield (
            "use_layer_wise_distributed_optimizer",
            "it gives whole matrices to ranks, FlashMuon shares them itself. Use "
            "--use-distributed-optimizer.",
        )
    if getattr(config, "optimizer_cuda_graph", False):
        yield "optimizer_cuda_graph", "a step communicates. Leave it out."
    if not getattr(config, "decoupled_weight_decay", True):
        yield "decoupled_weight_decay=False", "auxiliary parameters always get AdamW."
    for chunk in chunks:
        yield from _of_chunk(chunk)


def _experts_reduced_as_dense(chunk: nn.Module, config: Any) -> bool:
    """Whether experts that are cut in their own way are not marked (``allreduce=False``) so."""
    degree = getattr(config, "tensor_model_parallel_size", 1)
    return getattr(config, "expert_tensor_parallel_size", None) not in (None, degree) and any(
        ".experts." in name and getattr(param, "allreduce", True)
        for name, param in chunk.named_parameters()
    )


def _of_chunk(chunk: nn.Module) -> Iterator[tuple[str, str]]:
    ddp = getattr(chunk, "ddp_config", None)
    if getattr(ddp, "use_megatron_fsdp", False) or getattr(ddp, "use_custom_fsdp", False):
        yield (
            "Megatron-FSDP",
            "it shards parameters in another way. Use --use-distributed-optimizer, or torch's "
            "FSDP2 with flashns_dist.FlashMuon.",
        )
    if ddp is None or not hasattr(chunk, "buffers") or callable(chunk.buffers):
        yield (
            f"{type(chunk).__name__} as a model chunk",
            "its parameters lie in no buffers of megatron.core's DistributedDataParallel. Wrap the "
            "model in it; for torch's FSDP2 use flashns_dist.FlashMuon directly.",
        )
    config = getattr(chunk, "config", None)
    for name, value in vars(config).items() if config is not None else ():
        if name.endswith("gtp_weight_remat_size") and isinstance(value, int) and value > 1:
            yield (
                f"{name}={value} (generalized tensor parallelism)",
                "it shards weights in a third way, which is not described to FlashMuon. Leave it "
                "out.",
            )
    if config is not None and _experts_reduced_as_dense(chunk, config):
        yield (
            f"expert_tensor_parallel_size={config.expert_tensor_parallel_size} with "
            f"tensor_model_parallel_size={config.tensor_model_parallel_size} and one "
            "expert-parallel rank",
            "this version of megatron-core averages the gradients of experts over the ranks of "
            "dense layers, so that copies of an expert drift apart, with any optimizer. Use expert "
            "parallelism, equal tensor-parallel sizes, or megatron-core 0.19.2.",
        )
    known = (torch.float32, torch.float16, torch.bfloat16)
    for name, param in chunk.named_parameters():
        if param.requires_grad and (
            param.dtype not in known or type(param).__name__ not in ("Parameter", "Tensor")
        ):
            yield (
                f"{type(param).__name__} of {param.dtype} for {name} (fp8 or fp4 parameters)",
                "they have not been made to work. Leave --fp8-param-gather out.",
            )
