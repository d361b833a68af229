"""Coefficient objects, the minimax solver, restart positions and FLOP counts."""

import math
import pickle
import subprocess
import sys

import pytest
import torch

from flashns_dist.orthogonalize import (
    AOL_FLASH,
    FAST,
    KELLER_JORDAN,
    POLAR_EXPRESS,
    PRESETS,
    UNBIASED,
    YOU,
    Coefficients,
    choose_method,
    flop_count,
    polar_express,
)
from flashns_dist.orthogonalize.coefficients import slope
from flashns_dist.orthogonalize.restarts import (
    growth,
    main,
    ordered_restarts,
    restart_positions,
)
from flashns_dist.orthogonalize.solver import composition, minimax_row, step_value


def test_presets_are_hashable_picklable_and_found_by_name():
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert pickle.loads(pickle.dumps(preset)) == preset
        assert hash(pickle.loads(pickle.dumps(preset))) == hash(preset)
    assert len({preset.digest() for preset in PRESETS.values()}) == len(PRESETS)


def test_a_digest_tells_settings_apart_and_ignores_the_name():
    base = Coefficients("a", ((3, -3, 1),))
    assert base.digest() == Coefficients("b", [[3.0, -3.0, 1.0]]).digest()
    others = [
        Coefficients("a", ((3, -3, 1.0000000001),)),
        Coefficients("a", ((3, -3, 1),), normalization="aol"),
        Coefficients("a", ((3, -3, 1),), safety=1.01),
        Coefficients("a", ((3, -3, 1),), lower_bound=0.1),
        Coefficients("a", ((3, -3, 1), (3, -3, 1))),
        Coefficients("a", ((3, -3, 1), (3, -3, 1)), restarts=(1,)),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == len(others) + 1


def test_a_digest_is_the_same_in_another_process():
    code = "from flashns_dist.orthogonalize import YOU; print(YOU.digest(), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == YOU.digest()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rows": ()}, "no rows"),
        ({"rows": ((1.0,),)}, "1 numbers"),
        ({"rows": ((1.0, 2.0, 3.0, 4.0, 0.0),)}, "ends in 0"),
        ({"normalization": "max"}, "normalization"),
        ({"safety": 0.9}, "safety"),
        ({"restarts": (5,)}, "restarts"),
        ({"restarts": (0,)}, "restarts"),
    ],
)
def test_malformed_coefficients_are_refused(fields, word):
    arguments = {"name": "bad", "rows": ((3, -3, 1),) * 5} | fields
    with pytest.raises(ValueError, match=word):
        Coefficients(**arguments)


def test_the_solver_reproduces_the_polar_express_preset():
    found = polar_express()
    assert found.safety == POLAR_EXPRESS.safety
    assert found.lower_bound == POLAR_EXPRESS.lower_bound
    rows = zip(found.rows, POLAR_EXPRESS.rows, strict=True)
    difference = max(abs(a - b) for mine, theirs in rows for a, b in zip(mine, theirs, strict=True))
    assert difference < 1e-12


@pytest.mark.parametrize(
    ("preset", "degrees"),
    [
        ("fast", (17, 17)),
        ("unbiased", (17, 17, 9)),
        ("unbiased_bfloat16", (9, 17, 17)),
        ("fast_bfloat16", (9, 9, 5)),
        ("aol", (17, 17)),
    ],
)
def test_the_solver_reproduces_the_high_degree_presets(preset, degrees):
    expected = PRESETS[preset]
    found = polar_express(
        expected.lower_bound, degrees=degrees, safety=expected.safety, cushion=0.0
    )
    rows = zip(found.rows, expected.rows, strict=True)
    difference = max(abs(a / b - 1) for one, two in rows for a, b in zip(one, two, strict=True))
    assert difference < 1e-6


@pytest.mark.parametrize("lower", [1 / 950, 1 / 120, 1 / 30, 1 / 10, 1 / 6])
def test_a_chain_of_three_squarings_equioscillates(lower):
    row = minimax_row(lower, 1.0, 17)
    x = torch.linspace(math.log(lower), 0, 100001, dtype=torch.float64).exp()
    error = step_value(row, x) - 1
    # Seven parameters and the error itself: eight extrema of the same size, ends included.
    places = ((error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) <= 0).nonzero().flatten() + 1
    extrema = torch.cat([error[:1], error[places], error[-1:]]).abs()
    assert int((extrema > 0.999 * error.abs().max()).sum()) == 8
    # Better than degree 9, with one product more, and no better than degree 17 can be.
    assert error.abs().max() < (step_value(minimax_row(lower, 1.0, 9), x) - 1).abs().max()
    assert 0 < slope(row) == pytest.approx((step_value(row, x[:1] * 1e-6) / x[:1] / 1e-6).item())


@pytest.mark.parametrize("degree", [3, 5, 9])
@pytest.mark.parametrize("lower", [0.01, 0.3, 0.9, 0.99, 0.9999])
def test_a_minimax_row_equioscillates(degree, lower):
    row = minimax_row(lower, 1.0, degree)
    x = torch.linspace(lower, 1, 100001, dtype=torch.float64)
    error = step_value(row, x) - 1
    largest = error.abs().max()
    # By Chebyshev's theorem the best polynomial of k terms attains its error k + 1 times, with
    # alternating signs. Below 1e-10 float64 cannot show it.
    if largest < 1e-9:
        return
    signs = error[error.abs() > 0.999 * largest].sign()
    assert 1 + int((signs[1:] != signs[:-1]).sum()) == (degree + 1) // 2 + 1


def test_a_composition_maps_its_interval_into_its_band():
    for degrees in ((5, 5, 5, 9), (5, 9, 9), (3, 3, 3, 3), (5,) * 8):
        rows, (low, high) = composition(1e-2, degrees)
        x = torch.logspace(-2, 0, 5001, dtype=torch.float64)
        for row in rows:
            x = step_value(row, x)
        assert low - 1e-9 <= x.min()
        assert x.max() <= high + 1e-9
    assert high - low < 1e-6  # Eight quintics converge.


@pytest.mark.parametrize(
    "arguments",
    [
        {"lower_bound": 0.0},
        {"lower_bound": 1.0},
        {"num_steps": 0},
        {"degrees": (5, 4)},
        {"degrees": (17, 17)},  # With the default cushion.
        {"degrees": (17, 17), "lower_bound": 0.5, "cushion": 0.0},
    ],
)
def test_the_solver_refuses_what_it_cannot_solve(arguments):
    with pytest.raises(ValueError):
        polar_express(**arguments)


def test_polar_express_gets_one_restart_before_its_third_step():
    assert restart_positions(POLAR_EXPRESS) == (2,)
    assert restart_positions(POLAR_EXPRESS, 1) == (2,)
    assert restart_positions(YOU, 1) == (2,)


def test_restarts_never_make_the_growth_worse():
    for preset in (KELLER_JORDAN, YOU, POLAR_EXPRESS, AOL_FLASH):
        growths = [
            growth(preset, restart_positions(preset, count)) for count in range(preset.num_steps)
        ]
        assert growths == sorted(growths, reverse=True)


def test_the_restarts_of_the_coefficients_win():
    fixed = Coefficients("fixed", POLAR_EXPRESS.rows, restarts=(3, 1))
    assert restart_positions(fixed) == (1, 3)
    none = Coefficients("none", POLAR_EXPRESS.rows, restarts=())
    assert restart_positions(none) == ()
    assert restart_positions(Coefficients("one", ((1.5, -0.5),))) == ()


def test_ordered_restarts_follow_cost_and_precision():
    half, brain = torch.float16, torch.bfloat16
    assert ordered_restarts(FAST, 100, 100, half) == (1,)
    assert ordered_restarts(FAST, 768, 1536, half) == ()
    assert ordered_restarts(FAST, 512, 1024, half) == (1,)  # Rounding weighs more here.
    assert ordered_restarts(FAST, 256, 512, brain) == (1,)
    assert ordered_restarts(UNBIASED, 100, 100, half) == (1, 2)
    assert len(ordered_restarts(UNBIASED, 100, 800, half)) == 1
    fixed = Coefficients("fixed", FAST.rows, normalization="ws8", restarts=())
    assert ordered_restarts(fixed, 100, 100, brain) == ()


def test_too_many_restarts_are_refused():
    with pytest.raises(ValueError, match="num_restarts=5"):
        restart_positions(POLAR_EXPRESS, 5)


def test_the_command_line_prints_positions(capsys):
    main(["--coefficients", "polar_express", "--num-restarts", "1"])
    assert "polar_express: restarts [2]" in capsys.readouterr().out
    main(["--coefficients", "3.4445,-4.7750,2.0315;3.4445,-4.7750,2.0315"])
    assert "custom: restarts []" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--coefficients", "nonsense"])


def test_flop_counts_are_those_of_the_formulas():
    n, m = 1024, 4096
    for rows, columns in ((n, m), (m, n)):
        assert flop_count("gram", rows, columns) == 14 * n**3 + 6 * n**2 * m
        assert flop_count("standard", rows, columns) == 5 * (n**3 + 3 * n**2 * m)
        assert flop_count("aol", rows, columns, AOL_FLASH) == 19 * n**3 + 3 * n**2 * m
        assert flop_count("unbiased", rows, columns) == 13 * n**3 + 6 * n**2 * m
        deflation = 8 * 64 * n * m + 3 * 64**2 * (n + m)
        assert flop_count("fast", rows, columns) == 11 * n**3 + 3 * n**2 * m + deflation
    assert flop_count("standard", n, n) == 20 * n**3
    assert flop_count("unbiased", n, n) == 8 * n**3 + 9 * n**3
    assert flop_count("fast", 4096, 4096) < 0.61 * flop_count("gram", 4096, 4096)


def test_auto_goes_by_the_shape_or_by_the_coefficients():
    assert choose_method(64, 64) == "standard"
    assert choose_method(64, 128) == choose_method(128, 64) == "unbiased"
    assert choose_method(640, 640) == "unbiased"
    assert choose_method(767, 4096) == "unbiased"
    assert choose_method(768, 768) == choose_method(14336, 4096) == "fast"
    assert flop_count("auto", 64, 128) == flop_count("unbiased", 64, 128)
    assert choose_method(256, 256, POLAR_EXPRESS) == "standard"
    assert choose_method(64, 128, AOL_FLASH) == "aol"
    assert choose_method(64, 128, FAST) == "fast"
    assert choose_method(64, 128, UNBIASED) == "unbiased"


def test_the_default_device_does_not_matter():
    found = []
    for device in ("cpu", "meta"):
        for cached in (polar_express, restart_positions):
            cached.cache_clear()
        with torch.device(device):
            steps = polar_express(2e-3, 4)
            found.append(
                (steps, restart_positions(steps, len(steps.rows) - 2), minimax_row(0.01, 1.0, 17))
            )
    assert found[0] == found[1]
