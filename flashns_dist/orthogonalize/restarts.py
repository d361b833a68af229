"""Where a Gram iteration should recompute its Gram matrix.

A Gram iteration carries ``Q`` (a polynomial of the Gram matrix) and multiplies ``X`` by it once.
Rounding makes the smallest eigenvalues of the Gram matrix slightly negative, and the polynomials
amplify negative eigenvalues step after step. A restart (``X <- Q X``, then ``X X^T`` again) cuts
that growth. The positions are chosen by following the eigenvalues of a perturbed Gram matrix
through the steps, the idea of gram-newton-schulz's tuner.

Command line: ``python -m flashns_dist.orthogonalize.restarts --coefficients polar_express``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, pairwise

import torch

from flashns_dist.orthogonalize.coefficients import (
    PRESETS,
    Coefficients,
    resolve_coefficients,
    slope,
)
from flashns_dist.orthogonalize.solver import step_multiplier

PERTURBATION = 4e-4
"""How far below zero float16 may push an eigenvalue of a Gram matrix of norm one."""

MAX_GROWTH = 256.0
"""Condition number of ``Q`` up to which no restart is needed: 2^8 of float16's 2^11.

The five Polar Express steps have 85 with a restart at 2 and 2.7e12 with none."""


def growth(
    coefficients: Coefficients, restarts: Sequence[int], perturbation: float = PERTURBATION
) -> float:
    """Largest condition number of ``Q`` over the steps, with a perturbed Gram matrix.

    An error in ``Q`` is relative to its largest eigenvalue and lands on singular values that meet
    its smallest one, hence the condition number.

    Args:
        coefficients: The steps.
        restarts: Steps before which the Gram matrix is recomputed.
        perturbation: Subtracted from every eigenvalue of a computed Gram matrix.
    """
    sigma = torch.logspace(0, -10, 4000, dtype=torch.float64, device="cpu")
    eigenvalue, factor = sigma**2 - perturbation, torch.ones_like(sigma)
    worst = 1.0
    for step, row in enumerate(coefficients.rows):
        if step in restarts:
            sigma = sigma * factor
            eigenvalue, factor = sigma**2 - perturbation, torch.ones_like(sigma)
        value = step_multiplier(row, eigenvalue)
        factor, eigenvalue = factor * value, eigenvalue * value**2
        size = factor.abs()
        ratio = (size.max() / size.min()).item()
        worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst


@lru_cache(maxsize=256)
def restart_positions(
    coefficients: Coefficients,
    num_restarts: int | None = None,
    perturbation: float = PERTURBATION,
) -> tuple[int, ...]:
    """Best restart positions for a coefficient set; the search takes milliseconds and is cached.

    Args:
        coefficients: The steps. Its own ``restarts``, if it has any, win over the search.
        num_restarts: How many; None for the fewest whose growth is at most ``MAX_GROWTH`` (or the
            best positions, if even a restart before every step exceeds it).
        perturbation: See ``growth``.

    Returns:
        Ascending steps (counted from 0) before which to restart.

    Raises:
        ValueError: If there are not that many places for a restart.
    """
    if num_restarts is None and coefficients.restarts is not None:
        return coefficients.restarts
    places = range(1, coefficients.num_steps)
    if num_restarts is not None and not 0 <= num_restarts <= len(places):
        raise ValueError(
            f"num_restarts={num_restarts}: {coefficients.name!r} has {coefficients.num_steps} "
            f"steps, so there can be 0 to {len(places)} restarts."
        )
    counts = range(len(places) + 1) if num_restarts is None else [num_restarts]
    best, best_growth = tuple(places), float("inf")
    for count in counts:
        for positions in combinations(places, count):
            candidate = growth(coefficients, positions, perturbation)
            if candidate < best_growth:
                best, best_growth = positions, candidate
        if num_restarts is None and best_growth <= MAX_GROWTH:
            break
    return best


MAX_SLOPE = 160.0
"""How much ``gram.run_ordered`` may lift tiny singular values without a restart, in float16.

With 135 the largest singular value stays below 1.2 on all adversarial spectra, and below 1.25 where
100 are equal and all others 50 times smaller (1.31 with 256 rows); three steps with 2000 reached
40."""


@lru_cache(maxsize=256)
def ordered_restarts(
    coefficients: Coefficients, n: int, m: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Restarts with the fewest FLOPs among those that keep half precision bounded.

    A restart costs ``3 n^2 m``; going on without one, by ``gram.run_ordered``, costs ``5 n^3``.
    bfloat16 restarts before every step: eight bits do not survive two.

    Args:
        coefficients: The steps. Its own ``restarts``, if it has any, win.
        n: Short side.
        m: Long side.
        dtype: Of the iteration.

    Returns:
        Ascending steps (counted from 0) before which to restart.
    """
    if coefficients.restarts is not None:
        return coefficients.restarts
    places = tuple(range(1, coefficients.num_steps))
    if dtype == torch.bfloat16:
        return places
    counts = range(len(places) + 1)
    choices = [choice for count in counts for choice in combinations(places, count)]
    # Rounding errors are random, so that their norm relative to the matrix's falls with sqrt(n);
    # where many singular values are equal they are less so, and a little more restarting is cheap.
    largest = MAX_SLOPE * min(1.0, math.sqrt(n / 768), n / 256)
    allowed = [choice for choice in choices if _largest_slope(coefficients, choice) <= largest]
    saves = 3 * m < 5 * n
    return min(allowed or [places], key=lambda choice: -len(choice) if saves else len(choice))


def _largest_slope(coefficients: Coefficients, restarts: tuple[int, ...]) -> float:
    """The largest product of the slopes of steps with no restart between them."""
    runs = pairwise((0, *restarts, coefficients.num_steps))
    return max(math.prod(slope(row) for row in coefficients.rows[begin:end]) for begin, end in runs)


def _parse_rows(text: str) -> Coefficients:
    """Coefficients from a preset's name or from ``a,b,c;a,b,c;...``."""
    if text in PRESETS:
        return PRESETS[text]
    if not any(char.isdigit() for char in text):
        return resolve_coefficients(text, PRESETS["polar_express"])
    rows = tuple(tuple(float(value) for value in row.split(",")) for row in text.split(";") if row)
    return Coefficients(name="custom", rows=rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the restart positions of a coefficient set, and the growth with and without them."""
    parser = argparse.ArgumentParser(
        prog="python -m flashns_dist.orthogonalize.restarts", description=main.__doc__
    )
    parser.add_argument(
        "--coefficients",
        default="polar_express",
        help=f"a preset ({', '.join(PRESETS)}) or rows as 'a,b,c;a,b,c;...'",
    )
    parser.add_argument("--num-restarts", type=int, help="default: the fewest that suffice")
    parser.add_argument("--perturbation", type=float, default=PERTURBATION)
    options = parser.parse_args(arguments)
    try:
        coefficients = _parse_rows(options.coefficients)
        positions = restart_positions(coefficients, options.num_restarts, options.perturbation)
    except ValueError as error:
        parser.error(str(error))
    without = growth(coefficients, (), options.perturbation)
    with_them = growth(coefficients, positions, options.perturbation)
    print(f"{coefficients.name}: restarts {list(positions)}")
    print(f"condition number of Q: {with_them:.3g} with them, {without:.3g} without")


if __name__ == "__main__":
    main()
