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
        ValueError: If the name is unknown, or the backend takes no such device or dtype.
        ImportError: If the backend's package is not installed.
    """
    if name == "auto":
        select = __name__ + ".select"
        if device.type != "cuda" or importlib.util.find_spec(select) is None:
            return load_backend("torch")
        chosen = importlib.import_module(select).choose(device, shape, dtype)
        return load_backend(chosen) if isinstance(chosen, str) else chosen
    kernels = load_backend(name)
    if name != "torch":
        _check_triton(name, device, dtype)
    return kernels


def _check_triton(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where Triton, or quack with it, cannot iterate on a device in a dtype."""
    if dtype == torch.float64:
        raise ValueError(
            f"backend={name!r} does not iterate in {dtype}. Use float16, bfloat16 or float32, or "
            "backend='auto' or 'torch'."
        )
    if device.type != "cpu" or importlib.util.find_spec("triton") is None:
        return
    module = importlib.import_module(f"{__name__}.triton_interpreter")
    if not module.interpreting():
        raise ValueError(
            f"backend={name!r} cannot compute on the CPU: Triton needs a GPU, or its interpreter "
            "(TRITON_INTERPRET=1 in the environment). Use backend='auto' or 'torch'."
        )


@cache
def load_backend(name: str) -> Kernels:
    """The one instance of a named backend. Raises as ``get_kernels`` does."""
    if name not in _BACKENDS:
        raise ValueError(f"backend={name!r} is unknown. Choose one of {', '.join(BACKENDS)}.")
    module, attribute, install = _BACKENDS[name]
    try:
        backend = importlib.import_module(f"{__name__}.{module}")
        kernels: Kernels = getattr(backend, attribute)()
    except ImportError as error:
        raise ImportError(
            f"backend={name!r} cannot be used here: {error}. It comes with {install}; or use "
            "backend='auto' or 'torch'."
        ) from error
    return kernels


__all__ = ["BACKENDS", "Kernels", "Scalar", "get_kernels", "load_backend"]
