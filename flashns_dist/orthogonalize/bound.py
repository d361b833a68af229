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
) -> SpectralBound:
    """A bound on the largest eigenvalue of each Gram matrix.

    Args:
        kernels: The backend.
        gram: ``(batch, n, n)``, symmetric and positive semidefinite up to rounding.

    """
    if small.runs_triton(kernels, gram):
        norm, inverse = small.symmetric_norms(gram)
        square = kernels.symmetric(gram, gram, alpha=inverse)
        scale, weight, root = small.bound_scalars(norm, square)
        return SpectralBound(scale, root, Square(square, weight))
    norm = _frobenius(gram)
    # Divided by the norm, so that float16 holds the square of any matrix that it holds.
    square = kernels.symmetric(gram, gram, alpha=norm.clamp_min(TINY).reciprocal())
    scale, weight, root = bound_scalars(norm, _frobenius(square), gram.shape[-1])
    return SpectralBound(scale, root, Square(square, weight))


def bound_scalars(norm: Tensor, square_norm: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scale of ``spectral_bound``, the weight of its square, and its root, from two norms.

    Args:
        norm: ``||R||_F``, ``(batch,)``.
        square_norm: ``||R^2||_F / ||R||_F``.
        n: Rows.
    """
    norm = norm.clamp_min(TINY)
    # With eigenvalues in units of the norm: tr R^2 = 1 and tr R^4 = the ratio's square.
    fourth = (square_norm / norm).square()
    variance = (fourth / n - 1 / n**2).clamp_min(0)
    relative = (1 / n + ((n - 1) * variance).sqrt()).sqrt()
    scale = 1 / (norm * relative)
    return scale, scale * scale * norm, scale.sqrt()


def _frobenius(matrix: Tensor) -> Tensor:
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=dtype)
    return norms
