"""A tight upper bound on the largest eigenvalue of a Gram matrix, from products needed anyway.

Frobenius normalization wastes most of the reach of the first steps when many singular values are
alike: it bounds the largest one by the root of the sum of all squares. The second and fourth
moments of the eigenvalues say more (Wolkowicz and Styan 1980, applied to ``R^2``): with
``m = tr R^2 / n`` and ``v = tr R^4 / n - m^2``,

    lambda_max^2 <= m + sqrt((n - 1) v)

which is exact for one dominant eigenvalue and for equal ones. It costs ``R^2``, which the first
step needs too. For a square Gaussian matrix of 256 rows it exceeds the largest singular value by a
factor of 1.4, where the Frobenius norm exceeds it by 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels import small
from flashns_dist.orthogonalize.kernels.interface import Kernels
from flashns_dist.orthogonalize.stages import Square

TINY = 1e-12
"""Below this a norm counts as zero. Gram matrices come here with a trace of about ``n``."""


@dataclass(frozen=True)
class SpectralBound:
    """A bound on the largest eigenvalue of each Gram matrix ``R``.

    Attributes:
        scale: One over it, ``(batch,)`` in fp32 (fp64 for fp64), finite for a zero matrix too.
        root: The square root of ``scale``.
        square: Of ``scale * R``.
    """

    scale: Tensor
    root: Tensor
    square: Square


def spectral_bound(
    kernels: Kernels,
    gram: Tensor,  # (8, 1024, 1024)
    weight: float | None = None,
) -> SpectralBound:
    """A bound on the largest eigenvalue of each Gram matrix.

    Args:
        kernels: The backend.
        gram: ``(batch, n, n)``, symmetric and positive semidefinite up to rounding.
        weight: Such that the dtype holds ``weight * R^2``. Default: one over the Frobenius norm of
            each matrix, so that float16 holds the square of any matrix that it holds; this takes
            one more pass.
    """
    n = gram.shape[-1]
    if small.runs_triton(kernels, gram):
        each = small.inverse_norms(gram) if weight is None else weight
        square = kernels.symmetric(gram, gram, alpha=each)
        scale, root, rest = small.bound_scalars(square, each)
        return SpectralBound(scale, root, Square(square, rest))
    each = _frobenius(gram).clamp_min(TINY).reciprocal() if weight is None else weight
    square = kernels.symmetric(gram, gram, alpha=each)
    trace = square.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=_wide(square))
    scale, root, rest = bound_scalars(trace, _frobenius(square), each, n)
    return SpectralBound(scale, root, Square(square, rest))


def bound_scalars(
    trace: Tensor, norm: Tensor, weight: float | Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The scale of ``spectral_bound``, its root, and the weight of its square.

    Args:
        trace: Of ``weight * R^2``, ``(batch,)``.
        norm: Its Frobenius norm.
        weight: A number, or ``(batch,)``.
        n: Rows.
    """
    trace = trace.clamp_min(TINY)
    # With eigenvalues in units of the norm of R: tr R^2 = 1 and tr R^4 = the ratio's square.
    fourth = (norm / trace).square()
    variance = (fourth / n - 1 / n**2).clamp_min(0)
    relative = (1 / n + ((n - 1) * variance).sqrt()).sqrt()
    scale = (weight / trace).sqrt() / relative
    return scale, scale.sqrt(), scale * scale / weight


def _frobenius(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=_wide(matrix))
    return norms


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
