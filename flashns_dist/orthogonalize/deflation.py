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

The columns of ``A`` are ``X`` times a nearly orthonormal basis of ``X^T Omega``, for fixed random
signs ``Omega``: one step of subspace iteration. The basis is made orthonormal by one Newton-Schulz
step of degree 17, so that there is no QR, no eigenvalue solver and nothing that depends on the
data's values. It is normalized by the tight bound of ``bound.py``, because random directions are
ill-conditioned where nearly ``k`` singular values are equal: of 60, the sketch holds 28 below a
tenth of its Frobenius norm, but only 8 below an eighth of that bound. Everything is linear in the
size of ``X``: about five passes over its memory, and ``8 k n m`` FLOPs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashns_dist.orthogonalize.bound import spectral_bound
from flashns_dist.orthogonalize.coefficients import slope
from flashns_dist.orthogonalize.kernels import small
from flashns_dist.orthogonalize.kernels.interface import Kernels, Multiple, Scalar, column
from flashns_dist.orthogonalize.stages import step_factor

NUM_DIRECTIONS = 64
"""How many singular values may be shrunk; all of them in a matrix with no more rows."""

# One step of degree 17 that makes a basis nearly orthonormal: chain_row(1/8, 1). Directions below
# an eighth of the bound on the sketch's norm stay partly in.
BASIS_ROW = (
    *(4.0, -5.246617556793261, 1.3306287938625043),
    *(1.9556559325751854, 2.1754634082935502, -0.952123429503511),
    *(1.0, -3.3427377078663834, 2.88761066145372),
)

# The polynomial c, not normalized: chain_row(1/60, 1). sqrt(t) c(t) is at most 0.075, so that the
# dominant singular values end below 1/13 of the Frobenius norm.
SHRINK_ROW = (
    *(4.0, -4.285958823600919, 0.7006445983859749),
    *(12.73787788505711, 0.6625725634921974, -1.711737906341321),
    *(1.0, -0.994756735162257, 1.3295003505117922),
)

# A^T A / (MARGIN ||X||^2) has eigenvalues in [0, 1]: the basis has norm at most 1.076.
MARGIN = 1.17


def deflate(
    kernels: Kernels,
    x: Tensor,  # (8, 1024, 4096), or (8, 4096, 1024)
    size: float,
    *,
    normalized: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``S X`` for each matrix of a batch; its singular values are at most those of ``X``.

    Args:
        kernels: The backend.
        x: ``(batch, rows, columns)``; ``X`` is ``x``, transposed if that is tall, and multiplied so
            that its Frobenius norm is ``size``, unless it is zero. The products read ``x`` as it
            is, so that a scale and a cast need no pass of their own.
        size: The norm, ``stages.entry_scale(n, m)``.
        normalized: Whether ``x`` has this norm already.
        dtype: Of the result, ``x.dtype`` by default.

    Returns:
        A new tensor ``(batch, n, m)``, ``n <= m``, not normalized again.
    """
    dtype = dtype or x.dtype
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    n = wide.shape[-2]
    # Nothing is kept from or for FakeTensorMode, whose tensors have no data.
    make = _signs if type(x) is Tensor else _hashed_signs
    signs = make(n, min(NUM_DIRECTIONS, n), x.dtype, x.device)
    scale: Scalar = 1.0
    if normalized:
        sketch = kernels.product(signs.expand(x.shape[0], -1, -1), wide)
    else:
        sketch, each = kernels.sketch(signs, wide, scale=size)
        scale = Multiple(each)
    unit = scale / size
    # X Y has norm size^2 at most, and float16 holds size. Its long sums are worth many programs:
    # there are more of them with n rows than with k.
    image = kernels.product(wide, sketch.mT, alpha=unit, transpose=True)
    a, weights = shrink_factors(kernels, image, signs, size, dtype)
    projection = kernels.product(a, wide, alpha=unit, dtype=dtype)
    left, right = (projection.mT, weights) if tall else (weights.mT, projection)
    return kernels.product(left, right, alpha=-1.0, c=x, beta=scale, transpose=tall, dtype=dtype)


def shrink_factors(
    kernels: Kernels,
    image: Tensor,  # (8, 64, 1024)
    signs: Tensor,  # (1, 64, 1024)
    size: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``A^T`` and ``phi(A^T A) A^T / ||X||^2``, the factors of ``S``, from ``(X Y)^T / size``.

    ``A = X Y h(G)`` where ``Y h(G)`` has nearly orthonormal columns for ``G = Y^T Y``. ``Y`` is the
    sketch ``X^T Omega`` here, so that ``G = Omega^T X Y`` needs no pass over ``Y``.

    Args:
        kernels: The backend; one fused kernel if it runs Triton.
        image: ``(batch, k, n)``.
        signs: ``Omega^T``.
        size: ``||X||``.
        dtype: Of the second result, that of ``image`` by default.

    Returns:
        Both ``(batch, k, n)``, the first in the dtype of ``image``; the second is multiplied by
        ``size``.
    """
    k, dtype = image.shape[1], dtype or image.dtype
    if k == NUM_DIRECTIONS and small.runs_triton(kernels, image):
        weight = -1 / slope(SHRINK_ROW)
        return small.shrink_factors(
            image, signs[0], size, dtype, MARGIN, BASIS_ROW, SHRINK_ROW, weight
        )
    # What has k rows is small, and in fp32 where rounding would show: a shrunk singular value is a
    # difference, a twentieth of its terms.
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    inner = kernels.symmetric(wide, signs.to(wide.dtype).mT.expand(len(wide), -1, -1), alpha=size)
    bound = spectral_bound(kernels, inner)
    factor = step_factor(kernels, inner, BASIS_ROW, bound.scale, bound.square)
    basis = (factor.double() + _identity(factor) * slope(BASIS_ROW)) * (size * column(bound.root))
    moments = kernels.gram(wide, alpha=1 / (MARGIN * size * size)).double()
    phi = shrink_weights(basis @ moments @ basis) @ basis / (MARGIN * size)
    a = kernels.product(basis.to(wide.dtype), wide, dtype=image.dtype)
    return a, kernels.product(phi.to(wide.dtype), wide, dtype=dtype)


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
    identity = _identity(matrix)
    # Each t of the chain is its value at zero plus M times a polynomial: first, second and third.
    first = torch.add(beta * identity, matrix, alpha=alpha)
    value = torch.baddbmm(identity, matrix, first, beta=gamma)
    half = value.add(identity, alpha=gamma)
    second = torch.baddbmm(identity, first, half, beta=beta2, alpha=alpha2)
    start = alpha2 * gamma * gamma + gamma2
    value = torch.baddbmm(identity, matrix, second, beta=start)
    half = value.add(identity, alpha=start)
    return torch.baddbmm(identity, second, half, beta=beta3 * weight, alpha=alpha3 * weight)


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)


def _signs(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``Omega^T``, ``(1, k, n)``: signs over ``sqrt(n)``, the same on every rank and device."""
    if torch.compiler.is_compiling():
        return _hashed_signs(n, k, dtype, device)
    signs = _KEPT.get((n, k, dtype, device))
    if signs is None:
        signs = _hashed_signs(n, k, dtype, device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return signs  # lives as long as the graph
            torch.cuda.current_stream(device).synchronize()  # other streams will read them
        _KEPT[n, k, dtype, device] = signs
    return signs


def _hashed_signs(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Signs from the bits of a hashed index: integer operations, exact on every device."""
    if k == n:  # Any basis will do, and signs may be singular.
        return torch.eye(n, dtype=dtype, device=device)[None]
    bits = torch.arange(1, k * n + 1, device=device)
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13), (0xC2B2AE3D, 16)):
        bits = (bits * factor) & 0xFFFFFFFF
        bits = bits ^ (bits >> shift)
    signs = (1 - 2 * (bits & 1)).view(1, k, n)
    return (signs / math.sqrt(n)).to(dtype)


# For good: CUDA graphs that were captured with them read them. Half a megabyte for n = 4096.
_KEPT: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}
