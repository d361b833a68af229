"""The public function: orthogonalize a batch of matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional, TypeAlias

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import Coefficients, resolve_coefficients
from flashns_dist.orthogonalize.cost import choose_method
from flashns_dist.orthogonalize.kernels import BACKENDS, get_kernels
from flashns_dist.orthogonalize.kernels.recording import repeated
from flashns_dist.orthogonalize.methods import check_coefficients, find_method

CoefficientsLike: TypeAlias = Coefficients | str | Iterable[Iterable[float]]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_MATRICES = 65535
"""At a time: CUDA's bound on the second and third dimension of a grid, where kernels have them."""


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    method: str = "auto",
    coefficients: CoefficientsLike | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Approximates the polar factor ``U V^T`` of each matrix ``X = U S V^T`` of a batch.

    A zero matrix gives zeros, and a NaN or infinity spoils its own matrix only. On the CPU the
    result for a matrix is bitwise the same whatever else is in its batch. Under torch.compile all
    of it is one custom operator, which runs as it does outside.

    Sources: Polar Express (arXiv 2505.16932) for the steps of ``"standard"`` and ``"gram"``,
    gram-newton-schulz (Zhang et al. 2026) for the latter's recurrence, Turbo-Muon (arXiv
    2512.04632) for AOL; ``docs/numerics.md`` for the others.

    Args:
        x: ``(..., n, m)``, tall or wide, float16, bfloat16, float32 or float64, any strides and any
            finite scale (bfloat16 in a half-precision ``"fast"``: Frobenius norms of 1e-35 to
            1e35); not changed. Gradients do not flow through.
        method: ``"standard"``: Newton-Schulz on ``X``; ``"gram"``: the same steps on ``X X^T``;
            ``"unbiased"``: three steps of high degree after a tight normalization, the most
            accurate; ``"fast"``: two such steps after shrinking the dominant singular values;
            ``"aol"``: AOL-preconditioned, a different result (see ``aol.py``); ``"auto"``: the
            fastest for the shape that passes the accuracy gates (see ``cost.choose_method``).
        coefficients: A ``Coefficients`` object, the name of a preset, or rows ``(a, b, c)`` for the
            normalization of ``method``. Default: the method's own.
        dtype: Of the iteration, any of the four. Default: float16 on an accelerator, whose matrix
            units it is as fast on as bfloat16 and eight times as exact; float32 on the CPU, which
            has no such units.
        backend: ``"torch"``, ``"triton"``, ``"quack"``, or ``"auto"`` for the fastest present.

    Returns:
        A new tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: If ``x`` has fewer than two dimensions or another dtype, or if ``method``,
            ``coefficients``, ``dtype`` or ``backend`` is unknown or does not fit the others or the
            device.
        ImportError: If the backend asked for is not installed.
    """
    if torch.compiler.is_compiling():
        operator = torch.ops.flashns_dist.orthogonalize
        compiled: Tensor = operator(x, method, *_flatten(coefficients), dtype, backend)
        return compiled
    return _orthogonalize(x, method, coefficients, dtype, backend)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raise what ``orthogonalize`` would for matrices on a device, without any.

    Args:
        backend: As ``orthogonalize`` takes.
        device: Where they would be.
        dtype: As ``orthogonalize`` takes.

    Raises:
        ValueError: If the backend is unknown, or takes no such device or dtype.
        ImportError: If it is not installed.
    """
    get_kernels(backend, device=device, shape=(1, 1, 1), dtype=dtype or _default_dtype(device))


def _orthogonalize(
    x: Tensor,
    method: str,
    coefficients: CoefficientsLike | None,
    dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    """``orthogonalize`` itself."""
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: needs (..., n, m), at least two dims.")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x has dtype {x.dtype}: needs float16, bfloat16, float32 or float64.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}: needs float16, bfloat16, float32 or float64.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown. Choose one of {', '.join(BACKENDS)}.")
    rows, columns = x.shape[-2:]
    chosen = None if coefficients is None else _coefficients(method, coefficients)
    iteration_dtype = dtype or _default_dtype(x.device)
    name = method
    if method == "auto":
        name = choose_method(rows, columns, chosen, iteration_dtype)
    algorithm = find_method(name)
    chosen = chosen or algorithm.default_for(iteration_dtype)
    check_coefficients(name, chosen)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = x.reshape(-1, rows, columns)
    shape = (flat.shape[0], min(rows, columns), max(rows, columns))
    kernels = get_kernels(backend, device=x.device, shape=shape, dtype=iteration_dtype)
    # CPU libraries may sum in another order for another batch size, so there each matrix is alone.
    batches = flat.split(1 if x.device.type == "cpu" else _MOST_MATRICES)
    transpose = rows > columns

    def iterate(batch: Tensor) -> Tensor:
        return algorithm.iteration(
            kernels, batch, chosen, dtype=iteration_dtype, transpose=transpose
        )

    settings = (name, chosen, iteration_dtype, transpose)
    with _without_autocast(x.device.type):
        results = [repeated(kernels, settings, iterate, batch) for batch in batches]
    return torch.cat(results).reshape(x.shape) if len(results) > 1 else results[0].reshape(x.shape)


def _default_dtype(device: torch.device) -> torch.dtype:
    """Of the iteration, where none is asked for."""
    return torch.float32 if device.type == "cpu" else torch.float16


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Products in the dtypes that they are given, where the caller has torch.autocast on."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def _coefficients(method: str, coefficients: CoefficientsLike) -> Coefficients:
    """The coefficients asked for; bare rows take the normalization of the method."""
    default = find_method("gram" if method == "auto" else method).default
    return resolve_coefficients(coefficients, default)


Flattened: TypeAlias = tuple[
    str | None, list[float], list[int] | None, str, float, float | None, list[int] | None
]


def _flatten(coefficients: CoefficientsLike | None) -> Flattened:
    """Coefficients as an operator's arguments: name, numbers, lengths of rows, and the rest.

    What is not given is None; the operator refuses empty names and rows, as outside of it.
    """
    if coefficients is None or isinstance(coefficients, str):
        return coefficients, [], None, "", 1.0, None, None
    if not isinstance(coefficients, Coefficients):
        rows = [list(row) for row in coefficients]
        numbers = [float(value) for row in rows for value in row]
        return None, numbers, [len(row) for row in rows], "", 1.0, None, None
    numbers = [value for row in coefficients.rows for value in row]
    restarts = None if coefficients.restarts is None else list(coefficients.restarts)
    return (
        coefficients.name,
        numbers,
        [len(row) for row in coefficients.rows],
        coefficients.normalization,
        coefficients.safety,
        coefficients.lower_bound,
        restarts,
    )


# The schema is read from these annotations, at run time.
@torch.library.custom_op("flashns_dist::orthogonalize", mutates_args=())
def _orthogonalize_op(
    x: Tensor,
    method: str,
    name: Optional[str],  # noqa: UP045
    numbers: Sequence[float],
    lengths: Optional[Sequence[int]],  # noqa: UP045
    normalization: str,
    safety: float,
    lower_bound: Optional[float],  # noqa: UP045
    restarts: Optional[Sequence[int]],  # noqa: UP045
    dtype: Optional[torch.dtype],  # noqa: UP045
    backend: str,
) -> Tensor:
    coefficients: CoefficientsLike | None = name
    if lengths is not None:
        values = iter(numbers)
        rows = tuple(tuple(next(values) for _ in range(length)) for length in lengths)
        coefficients = rows
        if name is not None:
            positions = None if restarts is None else tuple(restarts)
            coefficients = Coefficients(name, rows, normalization, safety, lower_bound, positions)
    return _orthogonalize(x, method, coefficients, dtype, backend).contiguous()


@_orthogonalize_op.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
