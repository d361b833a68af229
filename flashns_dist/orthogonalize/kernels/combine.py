"""Linear combinations of matrices in Gram space: a pass over memory, not a product."""

from __future__ import annotations

import torch
from torch import Tensor

from flashns_dist.orthogonalize.kernels.interface import Kernels, Scalar, column, is_number


def combine(
    kernels: Kernels,
    a: Tensor,
    b: Tensor,
    *,
    alpha: Scalar,
    beta: Scalar,
    gamma: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """``alpha * a + beta * b + gamma * I``, computed in fp32 at least and rounded once.

    Args:
        kernels: A backend. If it has a method ``combine`` with the other arguments, that runs;
            otherwise torch operations, which read and write about four times as much.
        a: ``(batch, n, n)``, symmetric.
        b: The same shape and dtype.
        alpha: A scalar.
        beta: The same.
        gamma: The same.
        out: Where to write it: may be ``a``, contiguous. Default: a new tensor.

    Returns:
        ``(batch, n, n)`` in the dtype of ``a``, symmetric.
    """
    fused = getattr(kernels, "combine", None)
    if fused is not None:
        result: Tensor = fused(a, b, alpha=alpha, beta=beta, gamma=gamma, out=out)
        return result
    wide = torch.promote_types(a.dtype, torch.float32)
    result = a.to(wide) * column(alpha)
    result += b * column(beta)
    if not is_number(gamma) or gamma != 0.0:
        result.diagonal(dim1=-2, dim2=-1)[:, None].add_(column(gamma))
    return result.to(a.dtype) if out is None else out.copy_(result)
