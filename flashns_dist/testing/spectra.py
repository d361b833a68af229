"""Matrices with chosen singular values, and measures of how well they were orthogonalized.

Three suites: ``spectra`` is what momentum may look like and what a method should be accurate on;
``adversarial`` is what breaks half-precision iterations and must stay bounded; ``flat_tops`` is the
worst for ``method="fast"``. Everything is float64 on the CPU. Benchmarks and tests share these, so
that they measure the same thing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def with_singular_values(values: Tensor, m: int, seed: int) -> Tensor:
    """A random ``n x m`` matrix, ``n = len(values) <= m``, with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    left, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))
    matrix: Tensor = (left * values.to(torch.float64)) @ right.T
    return matrix


def gaussian(n: int, m: int, seed: int) -> Tensor:
    """An ``n x m`` matrix of independent normal entries."""
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectra(n: int = 128, aspect: float = 4.0, seed: int = 0) -> dict[str, Tensor]:
    """Sixteen ``n x (aspect n)`` matrices with the spectra that momentum is known to have.

    Args:
        n: Rows, at least 32.
        aspect: Columns per row, at least 1.
        seed: Of the random directions and entries.
    """
    m = int(n * aspect)
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def low_rank(rank: int, noise: float, offset: int) -> Tensor:
        values = torch.cat([_linear(1, 0.3, rank), torch.zeros(n - rank)])
        dense = gaussian(n, m, seed + offset + 50)
        dense = dense / torch.linalg.matrix_norm(dense, 2)
        matrix: Tensor = with_singular_values(values, m, seed + offset) + noise * dense
        return matrix

    decay = torch.tensor(0.9, dtype=torch.float64) ** (ranks[:, None] - ranks[None]).abs()
    row_scale = _log(0, -2, n)[torch.randperm(n, generator=generator)]
    normals = torch.randn(n, m, 3, generator=generator, dtype=torch.float64)
    return {
        "gaussian": gaussian(n, m, seed),
        "log_uniform_1e-2": with_singular_values(_log(0, -2, n), m, seed + 1),
        "log_uniform_1e-3": with_singular_values(_log(0, -3, n), m, seed + 2),
        "log_uniform_1e-5": with_singular_values(_log(0, -5, n), m, seed + 3),
        "power_0.5": with_singular_values(ranks**-0.5, m, seed + 4),
        "power_1": with_singular_values(ranks**-1.0, m, seed + 5),
        "rank_16_noise_1e-2": low_rank(16, 1e-2, 6),
        "rank_8_noise_1e-3": low_rank(8, 1e-3, 7),
        "one_dominant": with_singular_values(_flat(n, 1, 0.05), m, seed + 8),
        "half_rank": with_singular_values(
            torch.cat([_log(0, -2, n // 2), torch.zeros(n - n // 2)]), m, seed + 9
        ),
        # Student's t with two degrees of freedom: heavy tails.
        "heavy_tails": normals[..., 0] / (normals[..., 1:].square().sum(-1) / 2).sqrt(),
        "uniform_positive": torch.rand(n, m, generator=generator, dtype=torch.float64),
        "gamma_3": with_singular_values(
            -(torch.rand(n, 3, generator=generator, dtype=torch.float64).log().sum(-1)),
            m,
            seed + 10,
        ),
        "row_scales_1e-2": row_scale[:, None] * gaussian(n, m, seed + 11),
        "correlated_rows": torch.linalg.cholesky(decay) @ gaussian(n, m, seed + 12),
        "column_scales_1e-2": gaussian(n, m, seed + 13) * _log(0, -2, m),
    }


def adversarial(n: int = 128, aspect: float = 4.0, seed: int = 100) -> dict[str, Tensor]:
    """Nineteen ``n x (aspect n)`` matrices that make half-precision iterations blow up.

    Most have a flat top and nothing, or next to nothing, below it: their rounded Gram matrix has
    negative eigenvalues, which the polynomials amplify.
    """
    m = int(n * aspect)
    rank_10 = torch.cat([_log(0, -1, 10), torch.zeros(n - 10)])
    values = {
        "linear_to_zero": _linear(0.5, 0, n),
        "log_uniform_1e-7": _log(0, -7, n),
        "log_uniform_1e-9": _log(0, -9, n),
        "flat_half": _flat(n, n // 2, 0),
        "flat_tenth": _flat(n, n // 10, 0),
        "flat_nine_tenths": _flat(n, 9 * n // 10, 0),
        "flat_few": _flat(n, max(1, n // 32), 0),
        "rank_10": rank_10,
        "rank_2": torch.cat([torch.tensor([1, 0.316]), torch.zeros(n - 2)]),
        "rank_1": _flat(n, 1, 0),
        "rank_2_and_tail": torch.cat([torch.tensor([1, 0.316]), _log(-4, -7, n - 2)]),
        "two_slopes": torch.cat([_log(0, -10, n - n // 11), _log(-4, -10, n // 11)]),
        "flat_and_1e-2": _flat(n, n // 2, 1e-2),
        "flat_and_3e-3": _flat(n, n // 2, 3e-3),
        "flat_and_1e-3": _flat(n, n // 2, 1e-3),
    }
    suite = {
        name: with_singular_values(value, m, seed + index)
        for index, (name, value) in enumerate(values.items())
    }
    zero_rows = gaussian(n, m, seed + 20)
    zero_rows[: n // 2] = 0
    repeated_rows = gaussian(n, m, seed + 21)
    repeated_rows[n // 2 :] = repeated_rows[: n - n // 2].clone()
    single_entry = torch.zeros(n, m, dtype=torch.float64)
    single_entry[0, 0] = 1
    ones = torch.ones(n, m, dtype=torch.float64)
    return suite | {
        "zero_rows": zero_rows,
        "repeated_rows": repeated_rows,
        "single_entry": single_entry,
        "ones": ones,
    }


def flat_tops(n: int = 256, aspect: float = 1.0, seed: int = 200) -> dict[str, Tensor]:
    """Ten ``n x (aspect n)`` matrices with two clusters of singular values, within 1% each.

    About as many large ones as ``fast`` shrinks, which its random directions hardly span, and all
    others about where the reach of five Polar Express steps ends. ``n`` is at least 128. (LAPACK
    may fail where they are exactly equal.)
    """
    cases = (
        *((24, 0.007), (32, 0.01), (43, 0.0083), (48, 0.007), (56, 0.01)),
        *((60, 0.01), (64, 0.01), (72, 0.01), (80, 0.02), (100, 0.02)),
    )
    m = int(n * aspect)
    return {
        f"flat_{top}_and_{rest:g}": with_singular_values(
            _flat(n, top, rest) * _linear(1, 0.99, n), m, seed + index
        )
        for index, (top, rest) in enumerate(cases)
    }


def _log(start: float, stop: float, n: int) -> Tensor:
    return torch.logspace(start, stop, n, dtype=torch.float64)


def _linear(start: float, stop: float, n: int) -> Tensor:
    return torch.linspace(start, stop, n, dtype=torch.float64)


def _flat(n: int, num_top: int, rest: float) -> Tensor:
    """``num_top`` ones, then ``rest``."""
    values = torch.full((n,), rest, dtype=torch.float64)
    values[:num_top] = 1
    return values


@dataclass(frozen=True)
class PolarFactor:
    """The exact polar factor of one matrix, from a float64 SVD, on the range of the matrix.

    Attributes:
        matrix: ``U V^T`` over the nonzero singular values, the shape of the input.
        left: ``U``, ``(rows, rank)``.
        right: ``V^T``, ``(rank, columns)``.
        rank: How many singular values exceed ``1e-12`` of the largest.
    """

    matrix: Tensor
    left: Tensor
    right: Tensor
    rank: int


def polar_factor(x: Tensor) -> PolarFactor:
    """The exact polar factor of one matrix ``(rows, columns)`` of any dtype."""
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    keep = values > 1e-12 * values.max()
    left, right = left[:, keep], right[keep]
    return PolarFactor(left @ right, left, right, int(keep.sum()))


def orthogonality_error(result: Tensor, exact: PolarFactor) -> float:
    """``||P O P - U V^T||_F / sqrt(rank)``, with ``P`` the projections onto the input's range.

    Outside the range a null direction has no right answer, and rounding noise decides: there only
    ``largest_singular_value`` counts. Infinite if ``result`` is not finite.
    """
    if not torch.isfinite(result).all():
        return math.inf
    core = exact.left.T @ result.double() @ exact.right.T
    identity = torch.eye(exact.rank, dtype=torch.float64, device=core.device)
    return float((core - identity).norm()) / math.sqrt(max(exact.rank, 1))


def largest_singular_value(result: Tensor) -> float:
    """Spectral norm in float64; infinite if ``result`` is not finite."""
    if not torch.isfinite(result).all():
        return math.inf
    return float(torch.linalg.matrix_norm(result.double(), 2))
