"""How many floating-point operations an orthogonalization takes."""

from __future__ import annotations

import torch

from flashns_dist.orthogonalize.coefficients import Coefficients, resolve_coefficients
from flashns_dist.orthogonalize.deflation import NUM_DIRECTIONS
from flashns_dist.orthogonalize.methods import METHODS, check_coefficients, find_method
from flashns_dist.orthogonalize.restarts import ordered_restarts, restart_positions

FAST_ROWS = 768
"""From here on ``"fast"`` was faster than ``"unbiased"`` on an H200, by up to 1.35, but for two
small batches where it was 3 % slower (docs/benchmarks/orthogonalize-h200.jsonl). Below, its many
small operations cost more than the products that it saves."""

STANDARD_ROWS = 512
"""Up to here ``"standard"`` was faster than ``"unbiased"`` there for square matrices."""

_FACTOR_PRODUCTS = {2: 0, 3: 1, 5: 2, 9: 3}
"""Symmetric products that ``stages.step_factor`` takes, by the length of a row."""


def flop_count(
    method: str,
    n: int,
    m: int,
    coefficients: Coefficients | str | None = None,
) -> int:
    """FLOPs of one orthogonalization of an ``n x m`` matrix (either side may be the longer).

    A symmetric product computes one triangle: ``n^3`` FLOPs in Gram space and ``n^2 m`` for a Gram
    matrix, half of a full product. Elementwise work is not counted.

    Args:
        method: As in ``orthogonalize``; ``"auto"`` counts what would run.
        n: Rows.
        m: Columns.
        coefficients: As in ``orthogonalize``.

    Raises:
        ValueError: If the method or the coefficients are unknown, or do not fit each other.
    """
    if method == "auto":
        return flop_count(choose_method(n, m, coefficients), n, m, coefficients)
    chosen = resolve_coefficients(coefficients, find_method(method).default)
    check_coefficients(method, chosen)
    n, m = min(n, m), max(n, m)
    num_symmetric, num_runs = _count(method, chosen, n, m)
    total = num_symmetric * n**3 + num_runs * 3 * n * n * m
    return total + _deflation_flops(n, m) if method == "fast" else total


def choose_method(
    n: int,
    m: int,
    coefficients: Coefficients | str | None = None,
    dtype: torch.dtype = torch.float16,
) -> str:
    """What ``method="auto"`` means for an ``n x m`` matrix and an iteration in ``dtype``.

    With coefficients, the method with the fewest FLOPs that they were designed for. Without, what
    was measured to be fastest among those that pass the accuracy gates of ``docs/numerics.md``, by
    the shape alone, so that the choice depends neither on the batch nor on the machine. ``"gram"``
    is not among them: its largest singular values reach 1.41 in float16 (and 4 in bfloat16, where
    it is left out with coefficients too).

    Args:
        n: Rows.
        m: Columns.
        coefficients: As in ``orthogonalize``.
        dtype: Of the iteration.

    Raises:
        ValueError: If the coefficients are unknown.
    """
    if coefficients is None:
        if min(n, m) >= FAST_ROWS:
            return "fast"
        # In bfloat16 the standard steps miss the gates where many singular values are equal.
        standard = n == m <= STANDARD_ROWS and dtype != torch.bfloat16
        return "standard" if standard else "unbiased"
    chosen = resolve_coefficients(coefficients, find_method("gram").default)
    if chosen.normalization == "ws8":  # Only its own steps are made for deflated matrices.
        fast = find_method("fast")
        return "fast" if chosen in (fast.default, fast.bfloat16) else "unbiased"
    names = [name for name, each in METHODS.items() if chosen.normalization in each.normalizations]
    if dtype == torch.bfloat16 and "gram" in names:
        names.remove("gram")
    return min(names, key=lambda name: flop_count(name, n, m, coefficients))


def _count(method: str, coefficients: Coefficients, n: int, m: int) -> tuple[int, int]:
    """Symmetric ``n x n`` products, a full one counting twice, and runs without a restart.

    Every run takes a Gram matrix and a product with ``X``.
    """
    factors = sum(_FACTOR_PRODUCTS[len(row)] for row in coefficients.rows)
    if method == "standard":
        return factors, coefficients.num_steps
    if method == "gram":
        num_runs = len(restart_positions(coefficients)) + 1
        # Within a run, each further step updates R (two half products) and Q (one).
        return factors + 3 * (coefficients.num_steps - num_runs), num_runs
    num_runs = len(ordered_restarts(coefficients, n, m, torch.float16)) + 1
    # Here one of those for R is a full product, and so is the one for Q.
    return factors + 5 * (coefficients.num_steps - num_runs), num_runs


def _deflation_flops(n: int, m: int) -> int:
    """Four products of ``k n m``, and what works on ``k`` rows only."""
    k = min(NUM_DIRECTIONS, n)
    return 8 * k * n * m + 3 * k * k * (n + m)
