"""How many floating-point operations an orthogonalization takes."""

from __future__ import annotations

from flashns_dist.orthogonalize.coefficients import Coefficients, resolve_coefficients
from flashns_dist.orthogonalize.methods import check_coefficients, find_method
from flashns_dist.orthogonalize.restarts import restart_positions

_FACTOR_PRODUCTS = {2: 0, 3: 1, 5: 2}
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
    num_symmetric, num_grams, num_products = _count(method, chosen)
    return num_symmetric * n**3 + (num_grams + 2 * num_products) * n * n * m


def choose_method(n: int, m: int, coefficients: Coefficients | str | None = None) -> str:
    """What ``method="auto"`` means for an ``n x m`` matrix.

    With coefficients for another normalization, the method that they were designed for; otherwise
    the cheaper of ``"gram"`` and ``"standard"``, which agree in exact arithmetic.
    """
    default = find_method("gram").default
    chosen = resolve_coefficients(coefficients, default)
    if chosen.normalization.startswith("aol"):
        return "aol"
    cheaper = flop_count("gram", n, m, chosen) < flop_count("standard", n, m, chosen)
    return "gram" if cheaper else "standard"


def _count(method: str, coefficients: Coefficients) -> tuple[int, int, int]:
    """Symmetric ``n x n`` products, Gram matrices, and products with ``X``."""
    factors = sum(_FACTOR_PRODUCTS[len(row)] for row in coefficients.rows)
    if method == "standard":
        return factors, coefficients.num_steps, coefficients.num_steps
    num_runs = len(restart_positions(coefficients)) + 1
    # Within a run without a restart, each further step updates R (twice) and Q (once).
    return factors + 3 * (coefficients.num_steps - num_runs), num_runs, num_runs
