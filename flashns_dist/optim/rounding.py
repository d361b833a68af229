"""Writing fp32 results into low-precision parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from flashns_dist.layout import Box

_MASK = 0xFFFFFFFF


def stochastic_round_(target: Tensor, value: Tensor, noise: Tensor) -> None:
    """Round fp32 ``value`` to bf16 ``target``, up or down in proportion to the distance.

    Args:
        target: bf16, written in place.
        value: fp32, same shape.
        noise: int32 in [0, 2^16), same shape.
    """
    bits = value.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    target.copy_(torch.where(value.isfinite(), rounded, value))


def rounding_seed(name: str, step: int) -> int:
    """A number from a parameter's name and step, the same in every process and wrapper."""
    seed = 0
    for byte in _plain(name).encode():
        seed = (seed * 131 + byte) % 2_147_483_647
    return step * 1_000_003 + seed


def _plain(name: str) -> str:
    """A name without what torch.compile, activation checkpointing and DDP put into it."""
    added = ("_orig_mod", "_checkpoint_wrapped_module")
    parts = [part for part in name.split(".") if part not in added]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def element_noise(seed: int, box: Box, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Sixteen random bits per element, from its global position alone.

    The same element gets the same bits on whichever rank it lies, so that weights do not depend on
    the sharding.

    Args:
        seed: Differs between parameters and steps.
        box: Which elements of the array.
        shape: Global shape of the array.
        device: Where to make the result.

    Returns:
        int32 in [0, 2^16), shaped like the box.
    """
    index = torch.zeros(box.size, dtype=torch.int64, device=device)
    for dim, (start, size, full) in enumerate(zip(box.start, box.size, shape, strict=True)):
        positions = torch.arange(start, start + size, device=device)
        view = [1] * len(shape)
        view[dim] = size
        index = index * full + positions.view(view)
    return (_mix(index ^ _mix_int(seed)) & 0xFFFF).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finalizer (multiply and shift), on int64 tensors."""
    x = (x ^ (x >> 32)) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _mix_int(seed: int) -> int:
    return int(_mix(torch.tensor(seed & 0x7FFFFFFFFFFF, device="cpu")).item())
