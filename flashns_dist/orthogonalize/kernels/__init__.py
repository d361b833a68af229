"""Backends for the products of an orthogonalization; see ``interface.Kernels``."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import torch

from flashns_dist.orthogonalize.kernels.interface import Kernels, Scalar

_BACKENDS = {
    "torch": ("torch_ops", "TorchKernels", "torch"),
    "triton": ("triton_backend", "TritonKernels", "pip install 'flashns-dist[triton]'"),
    "quack": ("quack_backend", "QuackKernels", "pip install 'flashns-dist[quack]'"),
}
BACKENDS = ("auto", *_BACKENDS)


def get_kernels(
    name: str,
    *,
    device: torch.device,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> Kernels:
    """The backend called ``name``, imported on first use.

    Args:
        name: ``"torch"``, ``"triton"``, ``"quack"`` or ``"auto"``: what ``select.choose`` finds
            fastest on a CUDA device, torch elsewhere.
        device: Where the matrices are.
        shape: ``(batch, n, m)`` with ``n <= m``.
        dtype: Of the iteration.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If the backend's package is not installed.
    """
    if name == "auto":
        select = __name__ + ".select"
        if device.type != "cuda" or importlib.util.find_spec(select) is None:
            return load_backend("torch")
        chosen = importlib.import_module(select).choose(device, shape, dtype)
        return load_backend(chosen) if isinstance(chosen, str) else chosen
    return load_backend(name)


@cache
def load_backend(name: str) -> Kernels:
    """The one instance of a named backend. Raises as ``get_kernels`` does."""
    if name not in _BACKENDS:
        raise ValueError(f"backend={name!r} is unknown. Choose one of {', '.join(BACKENDS)}.")
    module, attribute, install = _BACKENDS[name]
    try:
        backend = importlib.import_module(f"{__name__}.{module}")
    except ImportError as error:
        raise ImportError(
            f"backend={name!r} cannot be imported here ({error}). Install it with "
            f"{install}, or use backend='auto' or 'torch'."
        ) from error
    kernels: Kernels = getattr(backend, attribute)()
    return kernels


__all__ = ["BACKENDS", "Kernels", "Scalar", "get_kernels", "load_backend"]
