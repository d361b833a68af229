"""Shrinking the few dominant singular values of ``X``, so that the others need less lifting.

Momentum has a small stable rank: a few singular values hold most of the Frobenius norm, and the
steps of a Newton-Schulz iteration mostly serve to lift all others to them. Deflation brings the top
ones down instead. With ``A`` an ``n x k`` matrix whose columns span (nearly) the dominant left
singular vectors and ``A A^T <= X X^T``, multiply ``X`` by

    S = I - A phi(A^T A) A^T,  that is  c(A A^T)  with  c(t) = 1 - t phi(t)

for the polynomial ``c``, the first step's ``h(t) / h(0)``: 1 at zero, positive, and such that
``sqrt(t) c(t)`` is nearly constant for larger ``t``. ``S`` nearly commutes with ``X X^T`` and is
positive definite, so that the polar factor stays nearly the same. No more than 64 singular values
exceed an eighth of the Frobenius norm; with ``k = 64`` the rest is bounded by that whatever the
spectrum, and the reach that five Polar Express steps need falls by the same factor.

``A = X Y`` where ``Y`` is an orthonormal basis of ``X^T Omega``, for fixed random signs ``Omega``:
one half-step of subspace iteration. ``Y`` itself comes from a short Gram iteration, so that there
is no QR, no eigenvalue solver and nothing that depends on the data's values. Everything is linear
in the size of ``X``: about five passes over its memory, and ``8 k n m`` FLOPs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import slope
from flashns_dist.orthogonalize.gram import gram_steps
from flashns_dist.orthogonalize.kernels.interface import Kernels

NUM_DIRECTIONS = 64
"""How many singular values may be shrunk; all of them in a matrix with no more rows."""

# Steps of degree 9 that make a basis orthonormal: polar_express(1/32, degrees=(9, 9), safety=1.01,
# cushion=0). Directions below 1/32 of the norm are not worth shrinking and stay partly in.
BASIS_ROWS = (
    (
        11.640004573031646,
        -101.61423881931819,
        321.98138312278667,
        -400.0118186439347,
        169.1837602291759,
    ),
    (
        3.2296236336563457,
        -5.680261426269999,
        5.174955106447072,
        -2.081408992511652,
        0.3006732322746727,
    ),
)

# The polynomial c, not normalized: chain_row(1/60, 1). sqrt(t) c(t) is at most 0.075, so that the
# dominant singular values end below 1/13 of the Frobenius norm.
SHRINK_ROW = (
    *(4.0, -4.285958823600919, 0.7006445983859749),
    *(12.73787788505711, 0.6625725634921974, -1.711737906341321),
    *(1.0, -0.994756735162257, 1.3295003505117922),
)

# A^T A / (MARGIN ||X||^2) has eigenvalues in [0, 1]: the basis is orthonormal to 7%.
MARGIN = 1.2


def deflate(
    kernels: Kernels,
    x: Tensor,  # (8, 1024, 4096)
    size: float,
) -> Tensor:
    """``S X`` for each matrix of a batch; its singular values are at most those of ``X``.

    Args:
        kernels: The backend.
        x: ``(batch, n, m)`` with ``n <= m`` and Frobenius norm ``size``, or zero.
        size: The norm, ``stages.entry_scale(n, m)``.

    Returns:
        A new tensor of the shape and dtype of ``x``, not normalized again.
    """
    n, m = x.shape[-2:]
    # All that has k rows is small, and in fp32 where rounding would show: a shrunk singular value
    # is a difference, a twentieth of its terms.
    wide = torch.promote_types(x.dtype, torch.float32)
    if n <= NUM_DIRECTIONS:
        sketch = x.to(wide)
    else:
        signs = _signs(n, NUM_DIRECTIONS, x.dtype, x.device).expand(x.shape[0], -1, -1)
        sketch = kernels.product(signs, x, dtype=wide)
    basis = _orthonormal(kernels, sketch).to(x.dtype)
    # Basis vectors have norm sqrt(m), so that float16 holds their entries; hence 1 / sqrt(m).
    a = kernels.product(basis, x.mT, alpha=1 / math.sqrt(m))
    wide_a = a.to(wide)
    inner = kernels.gram(wide_a, alpha=1 / (MARGIN * size * size))
    weights = kernels.product(
        shrink_weights(inner).to(wide), wide_a, alpha=1 / (MARGIN * size), dtype=x.dtype
    )
    projection = kernels.product(a, x, alpha=1 / size)
    return kernels.product(weights.mT, projection, alpha=-1.0, c=x, beta=1.0)


def shrink_weights(inner: Tensor) -> Tensor:
    """``phi(M)`` for ``c(t) = 1 - t phi(t) = h(t) / h(0)``, without a division by ``M``.

    Args:
        inner: ``M``, ``(batch, k, k)`` with eigenvalues in ``[0, 1]``.

    Returns:
        ``(batch, k, k)`` in float64: ``c`` is small where ``t phi(t)`` is nearly one, and tensor
        cores (tf32) would leave only noise of the difference.
    """
    matrix = inner.double()
    alpha, beta, gamma, alpha2, beta2, gamma2, alpha3, beta3, _ = SHRINK_ROW
    weight = -1 / slope(SHRINK_ROW)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # Each t of the chain is its value at zero plus M times a polynomial: first, second and third.
    first = torch.add(beta * identity, matrix, alpha=alpha)
    value = torch.baddbmm(identity, matrix, first, beta=gamma)
    half = value.add(identity, alpha=gamma)
    second = torch.baddbmm(identity, first, half, beta=beta2, alpha=alpha2)
    start = alpha2 * gamma * gamma + gamma2
    value = torch.baddbmm(identity, matrix, second, beta=start)
    half = value.add(identity, alpha=start)
    return torch.baddbmm(identity, second, half, beta=beta3 * weight, alpha=alpha3 * weight)


def _orthonormal(
    kernels: Kernels,
    sketch: Tensor,  # (8, 64, 4096)
) -> Tensor:
    """Rows of norm ``sqrt(m)`` that are nearly orthogonal and span those of ``sketch``."""
    norm = torch.linalg.vector_norm(sketch, dim=(-2, -1))
    inverse = 1 / torch.where(norm == 0, 1, norm)
    k, m = sketch.shape[-2:]
    factor, _ = gram_steps(kernels, sketch, BASIS_ROWS, alpha=k * inverse * inverse, scale=1 / k)
    return kernels.product(factor, sketch, alpha=math.sqrt(m) * inverse)


def _signs(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``Omega^T``, ``(1, k, n)``: signs over ``sqrt(n)``, the same on every rank and device."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or torch.compiler.is_compiling():
        # What a capture allocates lives as long as its graph: nothing to keep.
        return _hashed_signs(n, k, dtype, device)
    return _kept_signs(n, k, dtype, device)


def _hashed_signs(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Signs from the bits of a hashed index: integer operations, exact on every device."""
    bits = torch.arange(1, k * n + 1, device=device)
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16)):
        bits = (bits * factor) & 0xFFFFFFFF
        bits = bits ^ (bits >> shift)
    signs = (1 - 2 * (bits & 1)).view(1, k, n)
    return (signs / math.sqrt(n)).to(dtype)


_kept_signs = lru_cache(maxsize=32)(_hashed_signs)
