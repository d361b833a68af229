"""Minimax steps of degree 17 that cost three products: the three squarings of a nine-number row.

A polynomial of degree 8 in the Gram matrix needs four products in general. Three squarings with a
linear term each, ``t <- alpha t^2 + beta y + gamma``, have seven free parameters instead of nine,
and lift nearly as far: to an error of 0.11, singular values down to 1/9.6 where degree 9 (two
products) reaches 1/6.0 and the full degree 17 1/10.7. All squares, so that every product is exactly
symmetric whatever the rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Where the search for another interval starts: lower end of the interval, and the parameters
# (beta, gamma, alpha, beta, gamma, beta, gamma) of the three squarings on [lower, 1] with the first
# alpha 4 and the last 1. There are two families of local optima; narrow intervals belong to the
# first. Found by least squares from random starts, then linear programming.
_STARTS = (
    (
        0.12019708,
        (-5.2255910, 1.3131004, 2.0534311, 2.2244720, -0.99151728, -3.3661212, 2.8889451),
    ),
    (
        0.00869565,
        (-4.2803, 0.6915, 14.312, 0.798, -1.972, -0.598, 0.795),
    ),
)
_MAX_RATIO = 1.15
"""By how much the interval's lower end moves between two solutions of the search."""


def chain_row(lower: float, upper: float) -> tuple[float, ...]:
    """The best nine-number row found for ``[lower, upper]``: closest to 1 in the maximum norm.

    Raises:
        ValueError: If the interval is not ``0 < lower <= upper``, or is so narrow (``lower`` above
            a fifth of ``upper``) or so wide (below 1/1000) that the search is not set up for it.
    """
    ratio = lower / upper
    if not 1e-3 <= ratio <= 1 / 5:
        raise ValueError(
            f"interval [{lower}, {upper}]: a step of degree 17 is solved for ratios of 5 to 1000. "
            "Use degree 5 or 9 for a narrower one, and more steps for a wider one."
        )
    found = [
        _follow(torch.tensor(start, dtype=torch.float64, device="cpu"), at, ratio)
        for at, start in _STARTS
    ]
    best = min(found, key=lambda pair: pair[1])[0].tolist()
    b1, g1, a2, b2, g2, b3, g3 = best
    square = upper * upper
    return (
        *(4 / square**2, b1 / square, g1),
        *(a2, b2 / square, g2),
        *(1 / upper, b3 / square / upper, g3 / upper),
    )


def chain_multiplier(row: tuple[float, ...], y: Tensor) -> Tensor:
    """``h(y)`` for the step ``x h(x^2)`` of a nine-number row, at ``y`` of any shape."""
    value = y
    for alpha, beta, gamma in (row[0:3], row[3:6], row[6:9]):
        value = alpha * value * value + beta * y + gamma
    return value


def _follow(parameters: Tensor, start: float, stop: float) -> tuple[Tensor, float]:
    """Solutions from one interval's to another's, in small steps; the last, and its error."""
    steps = max(1, math.ceil(abs(math.log(stop / start)) / math.log(_MAX_RATIO)))
    error = math.inf
    for step in range(1, steps + 1):
        lower = start * (stop / start) ** (step / steps)
        parameters, error = _exchange(parameters, lower)
    return parameters, error


def _exchange(parameters: Tensor, lower: float) -> tuple[Tensor, float]:
    """Remez exchange for the seven parameters: equal errors at the eight largest extrema."""
    ends = torch.linspace(math.log(lower), 0, 3001, dtype=torch.float64, device="cpu").exp()
    even = torch.linspace(lower, 1, 3001, dtype=torch.float64, device="cpu")
    grid = torch.cat([ends, even]).sort().values
    best, best_error = parameters, math.inf
    for _ in range(60):
        error = _evaluate(parameters, grid)[0]
        largest = error.abs().max().item()
        if largest >= best_error * (1 - 1e-12):
            if largest > 4 * best_error:
                break
        else:
            best, best_error = parameters, largest
        nodes = _largest_extrema(grid, error)
        if len(nodes) < 8:
            break
        value, jacobian = _evaluate(parameters, grid[nodes])
        system = torch.cat([jacobian, -value.sign()[:, None]], dim=1)
        update = torch.linalg.solve(system, -value)[:7]
        length = (update.abs() / parameters.abs().clamp_min(0.05)).max().item()
        parameters = parameters + update * min(1.0, 0.3 / max(length, 1e-300))
        if length < 1e-13:
            break
    return best, best_error


def _evaluate(parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Error ``x h(x^2) - 1`` and its derivatives, ``(len(x), 7)``."""
    b1, g1, a2, b2, g2, b3, g3 = parameters
    y, one = x * x, torch.ones_like(x)
    u = 4 * y * y + b1 * y + g1
    w = a2 * u * u + b2 * y + g2
    of_u = 2 * a2 * u
    columns = [2 * w * part for part in (of_u * y, of_u, u * u, y, one)] + [y, one]
    return x * (w * w + b3 * y + g3) - 1, x[:, None] * torch.stack(columns, dim=1)


def _largest_extrema(grid: Tensor, error: Tensor) -> Tensor:
    """Indices of the eight largest local extrema of the error, ends included, ascending."""
    inner = (error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) <= 0
    ends = torch.ones(1, dtype=torch.bool, device="cpu")
    places = torch.cat([ends, inner, ends]).nonzero().flatten()
    kept: list[int] = []
    for place in places.tolist():
        if kept and (error[kept[-1]] > 0) == (error[place] > 0):
            if error[place].abs() > error[kept[-1]].abs():
                kept[-1] = place
        else:
            kept.append(place)
    largest = sorted(kept, key=lambda place: -error[place].abs().item())[:8]
    return torch.tensor(sorted(largest), device="cpu")
