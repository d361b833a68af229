"""Coefficients of Newton-Schulz steps, with the normalization that they were designed for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

NORMALIZATIONS = ("frobenius", "aol", "aol_unguarded", "ws8")


@dataclass(frozen=True)
class Coefficients:
    """The rows of a Newton-Schulz iteration and what they assume about their input.

    A row ``(a, b, c)`` is the odd polynomial ``a x + b x^3 + c x^5`` of the singular values;
    ``(a, b)`` has degree 3 and ``(a, b, c, d, e)`` degree 9. Rows are applied as they stand.

    Attributes:
        name: Shown in errors and tables.
        rows: One row per step, with the safety factor already folded in: ``p(x / safety)``.
        normalization: How the input is scaled so that its singular values lie in ``[0, 1]``:
            ``"frobenius"`` (by the Frobenius norm), ``"aol"`` and ``"aol_unguarded"`` (by the AOL
            diagonal, see ``aol.py``) or ``"ws8"`` (by a tight bound on the largest).
        safety: The factor folded into ``rows``, kept as a record. Rounding errors may push singular
            values above one; rows with a safety factor stay bounded there.
        lower_bound: The smallest normalized singular value that the rows were designed to lift, or
            None where the author states none.
        restarts: Steps before which a Gram iteration recomputes its Gram matrix, or None to choose
            them (``restarts.restart_positions``).

    Raises:
        ValueError: If a row has no known degree, a number is not finite, or a field is invalid.
    """

    name: str
    rows: tuple[tuple[float, ...], ...]
    normalization: str = "frobenius"
    safety: float = 1.0
    lower_bound: float | None = None
    restarts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        rows = tuple(tuple(float(value) for value in row) for row in self.rows)
        object.__setattr__(self, "rows", rows)
        if not rows:
            raise ValueError(f"coefficients {self.name!r}: no rows. Give at least one (a, b, c).")
        for index, row in enumerate(rows):
            if len(row) not in (2, 3, 5):
                raise ValueError(
                    f"coefficients {self.name!r}: row {index} has {len(row)} numbers. "
                    "A step of degree 3, 5 or 9 needs 2, 3 or 5."
                )
            if not all(math.isfinite(value) for value in row):
                raise ValueError(f"coefficients {self.name!r}: row {index} is not finite: {row}.")
            if len(row) == 5 and row[4] == 0.0:
                raise ValueError(
                    f"coefficients {self.name!r}: row {index} ends in 0. Write it as (a, b, c)."
                )
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"coefficients {self.name!r}: unknown normalization {self.normalization!r}. "
                f"Choose one of {', '.join(NORMALIZATIONS)}."
            )
        if not self.safety >= 1.0:
            raise ValueError(f"coefficients {self.name!r}: safety {self.safety} is below 1.")
        if self.restarts is not None:
            restarts = tuple(sorted({int(position) for position in self.restarts}))
            object.__setattr__(self, "restarts", restarts)
            if any(not 0 < position < len(rows) for position in restarts):
                raise ValueError(
                    f"coefficients {self.name!r}: restarts {restarts} are not all between 1 and "
                    f"{len(rows) - 1}, the steps that a restart can precede."
                )

    @property
    def num_steps(self) -> int:
        """Number of Newton-Schulz steps."""
        return len(self.rows)

    def digest(self) -> str:
        """Sixteen hex digits that are equal on two ranks only if all fields but the name are."""
        parts = [self.normalization, float(self.safety).hex(), repr(self.restarts)]
        parts.append("None" if self.lower_bound is None else float(self.lower_bound).hex())
        parts += [",".join(value.hex() for value in row) for row in self.rows]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def fold_safety(rows: Iterable[tuple[float, ...]], safety: float) -> tuple[tuple[float, ...], ...]:
    """Rows of ``p(x / safety)`` for each row ``p``."""
    return tuple(
        tuple(value / safety ** (2 * power + 1) for power, value in enumerate(row)) for row in rows
    )


KELLER_JORDAN = Coefficients(
    name="keller_jordan",
    rows=((3.4445, -4.7750, 2.0315),) * 5,
)
"""Jordan et al. 2024: the quintic of the first Muon. Singular values end in about [0.7, 1.2]."""

YOU = Coefficients(
    name="you",
    rows=(
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
)
"""Jiacheng You 2025: five different quintics, tuned numerically."""

# The five-step set of Polar Express for l = 1e-3; solver.polar_express() finds the same numbers (a
# test compares them), so that import costs no solving.
_POLAR_EXPRESS_ROWS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

POLAR_EXPRESS = Coefficients(
    name="polar_express",
    rows=fold_safety(_POLAR_EXPRESS_ROWS, 1.05),
    safety=1.05,
    lower_bound=1e-3,
)
"""Amsel et al. 2025 (arXiv:2505.16932), five steps, and gram-newton-schulz's safety factor."""

AOL_FLASH = Coefficients(
    name="aol_flash",
    rows=(
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    ),
    normalization="aol_unguarded",
)
"""The four steps of flash-newton-schulz, for AOL-preconditioned input. Biased: see ``aol.py``."""

PRESETS = {preset.name: preset for preset in (KELLER_JORDAN, YOU, POLAR_EXPRESS, AOL_FLASH)}


def resolve_coefficients(
    coefficients: Coefficients | str | Iterable[Iterable[float]] | None,
    default: Coefficients,
) -> Coefficients:
    """The Coefficients object meant by an argument: an object, a preset's name, or rows.

    Args:
        coefficients: None for ``default``. Bare rows take the normalization of ``default``, no
            safety factor, and automatic restarts.
        default: What the method uses when nothing is asked for.

    Raises:
        ValueError: If the name is unknown or the rows are malformed.
    """
    if coefficients is None:
        return default
    if isinstance(coefficients, Coefficients):
        return coefficients
    if isinstance(coefficients, str):
        if coefficients not in PRESETS:
            raise ValueError(
                f"coefficients={coefficients!r} is not a preset. Choose one of "
                f"{', '.join(PRESETS)}, or pass rows (a, b, c) or a Coefficients object."
            )
        return PRESETS[coefficients]
    try:
        rows = tuple(tuple(float(value) for value in row) for row in coefficients)
    except TypeError:
        raise ValueError(
            f"coefficients={coefficients!r} is neither a Coefficients object, nor a preset's name, "
            "nor a list of rows (a, b, c)."
        ) from None
    return Coefficients(name="custom", rows=rows, normalization=default.normalization)
