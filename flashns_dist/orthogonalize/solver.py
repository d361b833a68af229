"""Minimax Newton-Schulz coefficients for any interval, degrees and safety factor.

The greedy composition of Polar Express (Amsel et al. 2025, arXiv:2505.16932): each step is the odd
polynomial that is closest to one, in the maximum norm, on the interval that the steps before it
leave. Composing such steps is optimal for given degrees. Torch float64 only; no SciPy.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flashns_dist.orthogonalize.chain import chain_multiplier, chain_row
from flashns_dist.orthogonalize.coefficients import Coefficients, fold_safety

POLAR_EXPRESS_CUSHION = 0.02407327424182761
"""The cushion with which Polar Express computed its published numbers (with lower_bound=1e-3)."""


def step_multiplier(row: tuple[float, ...], y: Tensor) -> Tensor:
    """``h(y)`` for the step ``x h(x^2)`` that a row stands for, at ``y`` of any shape."""
    if len(row) == 9:
        return chain_multiplier(row, y)
    value = torch.zeros_like(y)
    for coefficient in reversed(row):
        value = value * y + coefficient
    return value


def step_value(row: tuple[float, ...], x: Tensor) -> Tensor:
    """Value of the odd polynomial that a row stands for, at ``x`` of any shape."""
    return x * step_multiplier(row, x * x)


def minimax_row(lower: float, upper: float, degree: int) -> tuple[float, ...]:
    """The odd polynomial of ``degree`` that is closest to 1 on ``[lower, upper]`` (Remez exchange).

    For degree 17 it is the best of those that three products can evaluate (see ``chain.py``); for
    the others the row holds the coefficients of ``x``, ``x^3`` and so on.

    Raises:
        ValueError: If the interval is not ``0 < lower <= upper`` or the degree is not odd.
    """
    if not 0.0 < lower <= upper:
        raise ValueError(f"interval [{lower}, {upper}]: needs 0 < lower <= upper.")
    if degree < 3 or degree % 2 == 0:
        raise ValueError(f"degree {degree}: needs an odd number of at least 3.")
    if degree == 17:
        return chain_row(lower, upper)
    num_terms = (degree + 1) // 2
    if (1 - lower / upper) ** num_terms < 1e-10:  # Too narrow for Remez in float64, and its limit
        return _taylor_row(upper, degree)  # is as good: the error is of that order.
    angle = torch.linspace(0, math.pi, num_terms + 1, dtype=torch.float64, device="cpu")
    nodes = (lower + upper) / 2 - (upper - lower) / 2 * angle.cos()
    signs = torch.tensor(
        [(-1.0) ** i for i in range(num_terms + 1)], dtype=torch.float64, device="cpu"
    )
    powers = torch.arange(num_terms, device="cpu") * 2 + 1
    last_error = math.inf
    for _ in range(100):
        system = torch.cat([nodes[:, None] ** powers, signs[:, None]], dim=1)
        solution = torch.linalg.solve(system, torch.ones_like(nodes))
        row, error = solution[:-1], abs(solution[-1].item())
        extrema = _interior_extrema(row, lower, upper)
        if len(extrema) != num_terms - 1 or abs(error - last_error) < 1e-15:
            break
        nodes[1:-1], last_error = extrema, error
    return tuple(row.tolist())


def _interior_extrema(row: Tensor, lower: float, upper: float) -> Tensor:
    """Where the derivative of an odd polynomial vanishes inside ``(lower, upper)``, ascending."""
    derivative = row * (torch.arange(len(row), device="cpu") * 2 + 1)
    size = len(row) - 1
    companion = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    companion[1:, :-1] = torch.eye(size - 1, dtype=torch.float64, device="cpu")
    companion[:, -1] = -derivative[:-1] / derivative[-1]
    squares = torch.linalg.eigvals(companion)
    squares = squares.real[squares.imag.abs() < 1e-9 * squares.abs().clamp_min(1e-300)]
    roots = squares[squares > 0].sqrt().sort().values
    inside: Tensor = roots[(roots > lower) & (roots < upper)]
    return inside


def _taylor_row(upper: float, degree: int) -> tuple[float, ...]:
    """The odd polynomial with value one and as many zero derivatives as fit, at ``upper``."""
    num_terms = (degree + 1) // 2
    # sign(x) = x (x^2)^(-1/2): the binomial series in 1 - x^2, expanded in powers of x^2.
    row = [0.0] * num_terms
    for order in range(num_terms):
        weight = math.comb(2 * order, order) / 4.0**order
        for power in range(order + 1):
            row[power] += weight * math.comb(order, power) * (-1.0) ** power
    return tuple(value / upper ** (2 * power + 1) for power, value in enumerate(row))


def composition(
    lower: float, degrees: tuple[int, ...], *, cushion: float = 0.0
) -> tuple[tuple[tuple[float, ...], ...], tuple[float, float]]:
    """Greedy minimax steps of the given degrees on ``[lower, 1]``, and the band that they end in.

    Args:
        lower: Smallest normalized singular value.
        degrees: Degree of each step.
        cushion: No step is designed for an interval wider than ``[cushion * upper, upper]``. That
            keeps the first steps from dipping low in mid-interval; Polar Express uses 0.024.

    Returns:
        The rows, without a safety factor, and the interval that contains the images of
        ``[lower, 1]``.

    Raises:
        ValueError: If ``lower`` is not in ``(0, 1]`` or a degree is not odd.
    """
    rows, low, high = [], float(lower), 1.0
    for degree in degrees:
        row = minimax_row(max(low, cushion * high), high, degree)
        if cushion * high > low:  # Centre the image of the whole interval on one.
            if degree == 17:
                raise ValueError("a cushion is not offered for degree 17: set cushion=0.")
            ends = step_value(row, torch.tensor([low, high], dtype=torch.float64, device="cpu"))
            row = tuple(value * 2.0 / ends.sum().item() for value in row)
        grid = torch.linspace(
            math.log(low), math.log(high), 20001, dtype=torch.float64, device="cpu"
        ).exp()
        if degree != 17:  # Where rounding the grid would show: converged steps.
            extrema = _interior_extrema(
                torch.tensor(row, dtype=torch.float64, device="cpu"), low, high
            )
            grid = torch.cat([grid, extrema])
        image = step_value(row, grid)
        rows.append(row)
        low, high = image.min().item(), image.max().item()
    return tuple(rows), (low, high)


@lru_cache(maxsize=64)
def polar_express(
    lower_bound: float = 1e-3,
    num_steps: int = 5,
    *,
    safety: float = 1.05,
    cushion: float = POLAR_EXPRESS_CUSHION,
    degrees: tuple[int, ...] | None = None,
    normalization: str = "frobenius",
) -> Coefficients:
    """Coefficients of Polar Express (arXiv 2505.16932) for any smallest singular value and steps.

    Args:
        lower_bound: Smallest normalized singular value to lift, in ``(0, 1)``.
        num_steps: Number of steps of degree 5; ignored if ``degrees`` is given.
        safety: Folded into every row: ``p(x / safety)``, so that singular values up to ``safety``
            stay bounded.
        cushion: See ``composition``.
        degrees: Degree of each step, of 3, 5, 9 and 17; 17 needs ``cushion=0``.
        normalization: Recorded in the result.

    Returns:
        The coefficients. The defaults give the preset ``POLAR_EXPRESS``.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 0.0 < lower_bound < 1.0:
        raise ValueError(f"lower_bound={lower_bound}: needs a number between 0 and 1.")
    degrees = (5,) * num_steps if degrees is None else tuple(degrees)
    if not degrees or not set(degrees) <= {3, 5, 9, 17}:
        raise ValueError(f"degrees={degrees}: needs one or more of 3, 5, 9 and 17.")
    rows, _ = composition(lower_bound, degrees, cushion=cushion)
    steps = "-".join(str(degree) for degree in degrees)
    return Coefficients(
        name=f"polar_express({lower_bound:g}, {steps})",
        rows=fold_safety(rows, safety),
        normalization=normalization,
        safety=safety,
        lower_bound=lower_bound,
    )
