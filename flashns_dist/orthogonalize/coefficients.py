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
    ``(a, b)`` has degree 3 and ``(a, b, c, d, e)`` degree 9. Nine numbers are three squarings, a
    polynomial of degree 17 that costs three products: with ``y = x^2`` and ``t = y``, three times
    ``t <- alpha t^2 + beta y + gamma``; the step is ``x t``. Rows are applied as they stand.

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
            if len(row) not in (2, 3, 5, 9):
                raise ValueError(
                    f"coefficients {self.name!r}: row {index} has {len(row)} numbers. "
                    "A step of degree 3, 5, 9 or 17 needs 2, 3, 5 or 9."
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


def slope(row: tuple[float, ...]) -> float:
    """Derivative of a step at zero: what it multiplies tiny singular values by."""
    if len(row) != 9:
        return row[0]
    value = 0.0
    for alpha, _, gamma in (row[0:3], row[3:6], row[6:9]):
        value = alpha * value * value + gamma
    return value


def fold_safety(rows: Iterable[tuple[float, ...]], safety: float) -> tuple[tuple[float, ...], ...]:
    """Rows of ``p(x / safety)`` for each row ``p``."""
    return tuple(_fold_row(row, safety) for row in rows)


def _fold_row(row: tuple[float, ...], safety: float) -> tuple[float, ...]:
    if len(row) != 9:
        return tuple(value / safety ** (2 * power + 1) for power, value in enumerate(row))
    square = safety * safety
    first, second, third = row[0:3], row[3:6], row[6:9]
    return (
        *(first[0] / square**2, first[1] / square, first[2]),
        *(second[0], second[1] / square, second[2]),
        *(third[0] / safety, third[1] / square / safety, third[2] / safety),
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

FAST = Coefficients(
    name="fast",
    rows=(
        (
            *(3.843921377931265, -4.194970013163869, 0.6911883279321291),
            *(14.532845437252327, 0.7998983941631435, -2.007253899596137),
            *(0.9900990099009901, -0.5320662495059371, 0.7213160001082017),
        ),
        (
            *(0.3626036054452391, -1.5577899956859644, 1.270684248768942),
            *(2.321343185534507, 0.7078548939937771, -1.0951000923992724),
            *(0.5487101978421485, -0.563829015146384, 1.581465993685945),
        ),
    ),
    normalization="ws8",
    safety=1.01,
    lower_bound=1 / 128,
)
"""Two steps of degree 17 for deflated matrices: polar_express(1/128, degrees=(17, 17), safety=1.01,
cushion=0). Singular values above the lower bound end in [0.90, 1.10]."""

UNBIASED = Coefficients(
    name="unbiased",
    rows=(
        (
            *(3.843921377931265, -4.190501857543244, 0.6849004709726767),
            *(16.116994485997598, 0.9301054024327979, -2.2663599974648454),
            *(0.9900990099009901, -0.08174696935008909, 0.1104112064178279),
        ),
        (
            *(0.2550181494327922, -1.0818624560177528, 0.6987832988688917),
            *(13.048835896336714, 0.17406579907680586, -1.7630725971187107),
            *(0.5024904064828699, -0.11719257920973353, 0.6196102133752909),
        ),
        (
            3.344055706618802,
            -6.041540068855872,
            5.491794920501682,
            -2.175072826345002,
            0.30732294035658553,
        ),
    ),
    normalization="ws8",
    safety=1.01,
    lower_bound=1 / 950,
)
"""Steps of degree 17, 17 and 9: polar_express(1/950, degrees=(17, 17, 9), safety=1.01, cushion=0).
Singular values above the lower bound end in [0.92, 1.08]."""

UNBIASED_BFLOAT16 = Coefficients(
    name="unbiased_bfloat16",
    rows=(
        (
            14.313800735390817,
            -127.38205767406507,
            384.7055787645057,
            -448.6415778946719,
            177.07551416303124,
        ),
        (
            *(0.21412936370265032, -0.9904870402755209, 0.6935168352053968),
            *(14.036911631442436, 0.17907325435105328, -1.925837725900762),
            *(0.48100994851407625, -0.07568600030714784, 0.4353768765250584),
        ),
        (
            *(0.34610015084922224, -1.5615072254613518, 1.3826883953825349),
            *(1.7031236532126592, 0.6004287696988359, -0.8465052395485089),
            *(0.542357249149698, -0.5207150590144364, 1.5582162817874572),
        ),
    ),
    normalization="ws8",
    safety=1.05,
    lower_bound=1 / 750,
)
"""Steps of degree 9, 17 and 17: polar_express(1/750, degrees=(9, 17, 17), safety=1.05, cushion=0).

bfloat16's eight bits survive neither a first step of degree 17, whose slope is 28 (on spectra that
decay like a power the largest singular value reached 60), nor a safety factor of 1.01: with flat
spectra of 40 rows the singular values left the interval, and then every number (1e14). From 1/900
on, matrices of rank 10 had errors of 0.118 to 0.126."""

FAST_BFLOAT16 = Coefficients(
    name="fast_bfloat16",
    rows=(
        (
            13.581707939287124,
            -118.66854502425241,
            356.4539770803882,
            -414.61164986463825,
            163.39266872555174,
        ),
        (
            5.078582506259943,
            -10.560137495388348,
            8.3814815579441,
            -2.641028371409841,
            0.28472878105415633,
        ),
        (
            2.050315620426311,
            -1.3240801252189933,
            0.31671975810074593,
        ),
    ),
    normalization="ws8",
    safety=1.05,
    lower_bound=1 / 140,
)
"""Steps of degree 9, 9 and 5: polar_express(1/140, degrees=(9, 9, 5), safety=1.05, cushion=0), for
the same reasons. From 1/128 on, 72 equal singular values and the rest 100 times smaller had an
error 1.03 times that of ``gram``."""

AOL = Coefficients(
    name="aol",
    rows=(
        (
            *(3.843921377931265, -4.194178795321217, 0.6900671936942664),
            *(14.787075188688256, 0.8209290750970683, -2.0489311455927073),
            *(0.9900990099009901, -0.464062144396118, 0.6286326407137143),
        ),
        (
            *(0.34285428104089566, -1.4952069540212043, 1.2167514138928162),
            *(2.7428413634090063, 0.7409302894426258, -1.2477546743407624),
            *(0.5410811399518429, -0.5451562954349876, 1.539211388028162),
        ),
    ),
    normalization="aol",
    safety=1.01,
    lower_bound=1 / 150,
)
"""Two steps of degree 17 for AOL-preconditioned input: polar_express(1/150, degrees=(17, 17),
safety=1.01, cushion=0). Singular values above the lower bound end in [0.86, 1.14]."""

PRESETS = {
    preset.name: preset
    for preset in (
        KELLER_JORDAN,
        YOU,
        POLAR_EXPRESS,
        AOL_FLASH,
        AOL,
        UNBIASED,
        UNBIASED_BFLOAT16,
        FAST,
        FAST_BFLOAT16,
    )
}


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
