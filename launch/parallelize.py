"""Spread a model over a device mesh with PyTorch's own APIs."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from launch.mesh import MeshSpec
from launch.model import Transformer


def parallelize(
    model: Transformer, spec: MeshSpec, mesh: DeviceMesh | None, dtype: torch.dtype
) -> nn.Module:
    """Shard or replicate a model.

    Args:
        model: The whole model, the same on every rank; its parameters are replaced in place.
        spec: What the axes of `mesh` mean.
        mesh: The device mesh, or None to leave the model on one process.
        dtype: Dtype of the forward and backward pass. The parameters, their gradients and the
            reduction of gradients stay fp32.

    Returns:
        The module to call; `model` itself, except under DistributedDataParallel.

    Raises:
        ValueError: Heads or widths that the `tp` axis does not divide.
    """
    if mesh is None:
        return model
    if "ddp" in spec.names:
        return DistributedDataParallel(model, process_group=mesh.get_group("ddp"))
    if "tp" in spec.names:
        _split_matrices(model, mesh["tp"])
        # Lets DTensor reduce over both axes at once, as in the norm of the gradient.
        mesh["fsdp", "tp"]._flatten()
    data_mesh = mesh["replicate", "fsdp"] if "replicate" in spec.names else mesh["fsdp"]
    # The rotary tables are inputs of every block and must not be rounded to bf16.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.blocks:
        fully_shard(block, mesh=data_mesh, mp_policy=policy)
    fully_shard(model, mesh=data_mesh, mp_policy=policy)
    return model


def _split_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Apply tensor and sequence parallelism, in place."""
    config, size = model.config, mesh.size()
    for name, value in (
        ("heads", config.num_heads),
        ("kv-heads", config.num_kv_heads),
        ("hidden-dim", config.hidden_dim),
        ("vocabulary", config.vocab_size),
    ):
        if value % size:
            raise ValueError(
                f"tp={size} does not divide {name} {value}: every rank takes equal parts of the "
                "matrices of a layer. Change the model or --mesh."
            )
    sequence, whole = Shard(1), Replicate()
    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=whole, output_layouts=sequence),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=sequence, output_layouts=whole),
        },
    )
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(sequence, None, None), desired_input_layouts=(whole, None, None)
                ),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=sequence),
                "feed_forward_norm": SequenceParallel(),
                "feed_forward": PrepareModuleInput(
                    input_layouts=(sequence,), desired_input_layouts=(whole,)
                ),
                "feed_forward.w_gate": ColwiseParallel(),
                "feed_forward.w_up": ColwiseParallel(),
                "feed_forward.w_down": RowwiseParallel(output_layouts=sequence),
            },
        )
