"""What FlashMuon does not do under DeepSpeed, refused before training starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .internals import known_defects


def check_supported(engine: Any, *, from_config: bool) -> None:
    """Raise for a feature that would be wrong or has not been made to work.

    Args:
        engine: Before its optimizer is made.
        from_config: Whether the optimizer comes from the config, not from the user's code.

    Raises:
        NotImplementedError: Names the setting, the reason and what to do.
    """
    for setting, reason in _refusals(engine, from_config):
        raise NotImplementedError(f"FlashMuon does not support DeepSpeed's {setting}: {reason}")


def _refusals(engine: Any, from_config: bool) -> Iterator[tuple[str, str]]:
    yield from _parallelism(engine)
    yield from _precision(engine)
    yield from _offload(engine, from_config)
    yield from _zero(engine)
    yield from _checkpoints(engine)
    yield from known_defects(engine)


def _parallelism(engine: Any) -> Iterator[tuple[str, str]]:
    if type(engine).__name__ == "PipelineEngine":
        yield (
            "pipeline engine",
            "its stages' parameters have numbers for names, which cannot be sorted. Use ZeRO, or "
            "Megatron with FlashMuon's Megatron adapter.",
        )
    if getattr(engine, "has_moe_layers", False):
        yield (
            "MoE layers",
            "experts have other data-parallel groups than the rest. Train experts as 3-D "
            "parameters of the model (FlashMuon orthogonalizes each), without deepspeed.moe.",
        )
    tensor_parallel = _value(engine, "tensor_parallel_config", "autotp_size", default=0)
    if tensor_parallel > 1 or getattr(engine, "mp_world_size", 1) > 1:
        yield (
            "tensor parallelism",
            "a rank's parameters are then parts of matrices, and it does not say which. Use "
            "tensor_parallel.autotp_size=0 and no mpu, or FSDP2 with DTensors.",
        )


def _precision(engine: Any) -> Iterator[tuple[str, str]]:
    if getattr(engine, "amp_enabled", lambda: False)():
        yield "amp (apex)", "use bf16 or fp16 instead."
    autocast = getattr(engine, "torch_autocast_enabled", lambda: False)()
    if autocast and str(engine.torch_autocast_dtype()) == "torch.float16":
        yield (
            "torch_autocast in fp16",
            "its gradient scaler skips steps on some ranks only. Use torch_autocast in bf16.",
        )
    if getattr(engine, "bf16_optimizer_states", lambda: False)():
        yield "bf16_optimizer_states", "momentum is kept in fp32. Leave the setting out."


def _offload(engine: Any, from_config: bool) -> Iterator[tuple[str, str]]:
    optimizer = engine.zero_offload_optimizer()
    param = engine.zero_offload_param()
    for name, config in (("offload_optimizer", optimizer), ("offload_param", param)):
        if _device(config) == "nvme":
            yield (
                f"zero_optimization.{name} to NVMe",
                "a matrix would be read from other ranks' disks. Use device=cpu or none.",
            )
    if _device(optimizer) == "cpu":
        if engine.device.type != "cpu":
            yield (
                "zero_optimization.offload_optimizer on an accelerator",
                "matrices would be orthogonalized on the CPU. FlashMuon's state is half of AdamW's "
                "for matrices: leave it out, or shard over more ranks with stage 3.",
            )
        if not from_config and engine.zero_force_ds_cpu_optimizer():
            yield (
                "zero_optimization.offload_optimizer with an optimizer object",
                'DeepSpeed insists on its own there. Use "optimizer": {"type": "FlashMuon"} in '
                'the config, or set "zero_force_ds_cpu_optimizer": false.',
            )
        if getattr(optimizer, "ratio", 1.0) != 1.0:
            yield (
                "zero_optimization.offload_optimizer.ratio below 1",
                "DeepSpeed would run AdamW on the rest. Leave the ratio at 1.",
            )
        if getattr(optimizer, "super_offload", False):
            yield "SuperOffload", "it runs its own Adam. Leave super_offload out."


def _zero(engine: Any) -> Iterator[tuple[str, str]]:
    config = engine._config.zero_config
    if getattr(config, "mics_shard_size", -1) not in (-1, 0, None):
        yield "MiCS", "it shards over part of the ranks. Use stage 3 without mics_shard_size."
    if getattr(config, "zero_hpz_partition_size", 1) > 1:
        yield (
            "zero_hpz_partition_size (ZeRO++)",
            "it keeps a second, differently sharded copy that has not been checked on GPUs. Leave "
            "it out.",
        )
    for name in ("zero_quantized_gradients", "zero_quantized_weights", "loco_param"):
        if getattr(config, name, None):
            yield (
                f"{name} (ZeRO++)",
                "quantized values differ between ranks and world sizes, and have not been checked. "
                "Leave it out.",
            )
    if getattr(config, "zenflow", None):
        yield "ZenFlow", "it runs its own Adam on part of the gradients. Leave zenflow out."
    if getattr(engine, "is_deepcompile_enabled", lambda: False)():
        yield (
            "DeepCompile",
            "it hands gradients over in another form. Set compile.deepcompile=false.",
        )


def _checkpoints(engine: Any) -> Iterator[tuple[str, str]]:
    config = engine._config.zero_config
    if getattr(config, "elastic_checkpoint", False):
        yield (
            "elastic_checkpoint",
            "it is broken in DeepSpeed. Use a universal checkpoint for another number of ranks.",
        )
    universal = getattr(engine, "load_universal_checkpoint", lambda: False)()
    if universal and getattr(config, "round_robin_gradients", False):
        yield (
            "universal checkpoints with round_robin_gradients",
            "DeepSpeed then reads parameters from wrong places. Set round_robin_gradients=false.",
        )


def _value(engine: Any, method: str, name: str, default: Any) -> Any:
    config = getattr(engine, method, lambda: None)()
    return getattr(config, name, default)


def _device(config: Any) -> str:
    device = getattr(config, "device", None)
    return str(getattr(device, "value", device) or "none")
