"""Runs megatron-core on the CPU, for tests: what it asks of CUDA is answered by the CPU."""

from __future__ import annotations

import multiprocessing
import queue
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.integrations.megatron_layers import packed_experts_patches

if not hasattr(typing, "override"):  # megatron-core 0.17 and later on Python 3.11
    import typing_extensions

    typing.override = typing_extensions.override  # type: ignore[attr-defined]


class _CudaIsCpu(TorchFunctionMode):
    """Devices named cuda become the CPU; tensor types are reported as CUDA's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if name == "cuda":
            return args[0]
        if name == "to":
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
        result = func(*args, **kwargs)
        if name == "type" and isinstance(result, str) and ".cuda." not in result:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream:
    """Everything happens at once."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Stream:
        return self

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = wait = record = nothing


def _stream(*args: Any, **kwargs: Any) -> _Stream:
    return _Stream()


class _Norm(nn.Module):
    """torch's norm with the marks of sequence parallelism, which Megatron's wrapper refuses."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        made = kind(hidden_size, eps=eps)
        for param in made.parameters():
            param.sequence_parallel = config.sequence_parallel
        return made


def _splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor


def _patches() -> list[tuple[Any, str, Any]]:
    import megatron.core.models.backends as backends
    import megatron.core.models.gpt.gpt_layer_specs as specs
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.moe.moe_utils as moe
    import megatron.core.transformer.moe.token_dispatcher as dispatcher
    import megatron.core.transformer.transformer_block as block

    found: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: "cpu"),
        (torch.cuda, "synchronize", lambda *a, **k: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "get_rng_state", lambda *a, **k: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, *a, **k: torch.set_rng_state(state)),
        (torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
        (torch.cuda, "current_stream", _stream),
        (torch.cuda, "default_stream", _stream),
        (torch.cuda, "stream", _stream),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Stream),
        (rng, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state)),
        (rng, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state()),
        (dispatcher, "maybe_move_tensor_to_cpu", _splits),
        *packed_experts_patches(),
    ]
    if not hasattr(moe, "te_general_gemm"):
        found.append((moe, "te_general_gemm", None))
    for module in (specs, block, backends):
        for name in ("LNImpl", "WrappedTorchNorm", "LayerNormImpl"):
            if getattr(getattr(module, name, None), "__name__", "") == "WrappedTorchNorm":
                found.append((module, name, _Norm))
    return found


@contextmanager
def checkpoint_writers() -> Iterator[None]:
    """Lets a rank of the pool, which is a daemon, start the processes that write checkpoints."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    name = next(n for n in vars(filesystem_async) if n.endswith("get_write_results_queue"))
    results: queue.Queue[Any] = queue.Queue()
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    with (
        mock.patch.dict(config, daemon=False),
        mock.patch.object(filesystem_async, name, return_value=results),
    ):
        yield


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Inside, megatron-core runs on the CPU; outside, nothing is changed."""
    patchers = [
        mock.patch.object(owner, name, new, create=not hasattr(owner, name))
        for owner, name, new in _patches()
    ]
    for patcher in patchers:
        patcher.start()
    try:
        with _CudaIsCpu():
            yield
    finally:
        for patcher in reversed(patchers):
            patcher.stop()
