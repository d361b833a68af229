"""The operators that torch.compile sees in place of the Triton backend's methods.

Outside of it the methods launch directly, which saves the dispatcher's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Multiple, Scalar, is_number
from flashns_dist.orthogonalize.kernels.triton_passes import (
    launch_combine,
    launch_gram_space,
    launch_inverse_norms,
    launch_normalize,
)
from flashns_dist.orthogonalize.kernels.triton_prepared import arguments


def on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one that holds ``t``."""
    if t.device.type != "cuda" or t.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


def split_scalars(scalars: tuple[Scalar, ...]) -> tuple[list[float], list[Tensor | None]]:
    """Scalars as a custom operator takes them: numbers, and the tensors that they multiply."""
    numbers: list[float] = []
    tensors: list[Tensor | None] = []
    for scalar in scalars:
        if is_number(scalar):
            numbers.append(float(scalar))
            tensors.append(None)
        else:
            multiple = scalar if isinstance(scalar, Multiple) else Multiple(torch.as_tensor(scalar))
            numbers.append(multiple.factor)
            tensors.append(multiple.each)
    return numbers, tensors


def _join(numbers: Sequence[float], tensors: Sequence[Tensor | None]) -> tuple[Scalar, ...]:
    pairs = zip(numbers, tensors, strict=True)
    return tuple([n if t is None else Multiple(t, n) for n, t in pairs])


@cache
def _backend() -> Any:
    from flashns_dist.orthogonalize.kernels.triton_backend import TritonKernels

    return TritonKernels()


@torch.library.custom_op("flashns_dist::symmetric", mutates_args=("out",))
def _symmetric_op(
    a: Tensor,
    b: Tensor,
    turned: bool,
    c: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    with on_device_of(a):
        _backend()._symmetric(a, b, turned, c, _join(numbers, tensors), out)


@torch.library.custom_op("flashns_dist::product", mutates_args=("out",))
def _product_op(
    a: Tensor,
    x: Tensor,
    c: Tensor | None,
    column_scale: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    transpose: bool,
    out: Tensor,
) -> None:
    scalars = _join(numbers, tensors)
    with on_device_of(a):
        _backend()._product(a, x, c, column_scale, scalars, transpose, out)


@torch.library.custom_op("flashns_dist::normalize", mutates_args=("out", "norms"))
def _normalize_op(
    x: Tensor, scale: float, scale_each: Tensor | None, transpose: bool, out: Tensor, norms: Tensor
) -> None:
    (factor,) = _join([scale], [scale_each])
    with on_device_of(x):
        launch_normalize(x, factor, transpose, out, norms)


@torch.library.custom_op("flashns_dist::inverse_norms", mutates_args=("out",))
def _inverse_norms_op(x: Tensor, scale: float, out: Tensor) -> None:
    with on_device_of(x):
        launch_inverse_norms(x, scale, out)


@torch.library.custom_op("flashns_dist::sketch", mutates_args=("out", "inverse"))
def _sketch_op(signs: Tensor, x: Tensor, scale: float, out: Tensor, inverse: Tensor) -> None:
    with on_device_of(x):
        _backend()._sketch(signs, x, scale, out, inverse)


@torch.library.custom_op("flashns_dist::gram_space", mutates_args=("out",))
def _gram_space_op(
    x: Tensor,
    coefficients: Sequence[float],
    lengths: Sequence[int],
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    values = iter(coefficients)
    steps = tuple(tuple(next(values) for _ in range(length)) for length in lengths)
    alpha, scale = _join(numbers, tensors)
    with on_device_of(x):
        launch_gram_space(x, steps, alpha, scale, out)


@torch.library.custom_op("flashns_dist::combine", mutates_args=("out",))
def _combine_op(
    a: Tensor,
    b: Tensor,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    alpha, beta, gamma = _join(numbers, tensors)
    with on_device_of(a):
        launch_combine(a, b, arguments(alpha, beta, gamma), out)


def _fake(*_: object) -> None:
    """Nothing to describe: every operator writes into tensors that exist."""


for _operator in (
    _symmetric_op,
    _product_op,
    _normalize_op,
    _inverse_norms_op,
    _sketch_op,
    _gram_space_op,
    _combine_op,
):
    _operator.register_fake(_fake)
