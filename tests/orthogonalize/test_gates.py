"""The accuracy gates that a method must pass to be taken by default, in half precision.

On the CPU the torch backend multiplies in fp32 and rounds each product once, as tensor cores do.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from flashns_dist.orthogonalize import METHODS, orthogonalize
from flashns_dist.testing.spectra import (
    adversarial,
    flat_tops,
    largest_singular_value,
    orthogonality_error,
    polar_factor,
    spectra,
)

MAX_SIGMA = 1.25
MAX_RATIO = 1.02
SMALL_ERROR = 0.115


@cache
def gram_errors(n, aspect):
    """``name -> (matrix, exact polar factor, error of method="gram")`` over both suites."""
    suite = spectra(n, aspect) | adversarial(n, aspect)
    cases = {}
    for name, x in suite.items():
        exact = polar_factor(x)
        result = orthogonalize(x.float(), method="gram", dtype=torch.float16)
        cases[name] = x.float(), exact, orthogonality_error(result, exact)
    return cases


@pytest.mark.parametrize(("n", "aspect"), [(128, 1), (128, 3), (128, 8), (192, 2), (256, 1)])
@pytest.mark.parametrize("method", ["fast", "unbiased", "auto"])
def test_float16_passes_the_gates(method, n, aspect):
    for name, (x, exact, reference) in gram_errors(n, aspect).items():
        result = orthogonalize(x, method=method, dtype=torch.float16)
        assert largest_singular_value(result) <= MAX_SIGMA, name
        assert orthogonality_error(result, exact) <= max(MAX_RATIO * reference, SMALL_ERROR), name


@pytest.mark.parametrize(
    ("method", "n", "aspect"), [("auto", 128, 1), ("unbiased", 192, 2), ("fast", 256, 1)]
)
def test_bfloat16_passes_the_gates(method, n, aspect):
    tops = {name: (x.float(), polar_factor(x), None) for name, x in flat_tops(n, aspect).items()}
    for name, (x, exact, _) in (gram_errors(n, aspect) | tops).items():
        result = orthogonalize(x, method=method, dtype=torch.bfloat16)
        assert largest_singular_value(result) <= MAX_SIGMA, name
        error = orthogonality_error(result, exact)
        if error > SMALL_ERROR:
            reference = orthogonalize(x, method="gram", dtype=torch.float16)
            assert error <= MAX_RATIO * orthogonality_error(reference, exact), name


@pytest.mark.parametrize(("n", "aspect"), [(128, 1), (192, 2)])
@pytest.mark.parametrize("tall", [False, True])
def test_bfloat16_input_passes_the_gates_of_float16(n, aspect, tall):
    """``fast`` reads such input as it is, and then has factors of eight bits."""
    for name, (x, _, _) in gram_errors(n, aspect).items():
        rounded = x.bfloat16()
        if not rounded.isfinite().all():
            continue
        exact = polar_factor(rounded.double())
        reference = orthogonality_error(
            orthogonalize(rounded.float(), method="gram", dtype=torch.float16), exact
        )
        source = rounded.mT.contiguous() if tall else rounded
        result = orthogonalize(source, method="fast", dtype=torch.float16)
        result = result.mT if tall else result
        assert largest_singular_value(result) <= MAX_SIGMA, name
        assert orthogonality_error(result, exact) <= max(MAX_RATIO * reference, SMALL_ERROR), name


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "aspect"), [(192, 1), (256, 2), (400, 1), (768, 2)])
def test_as_many_equal_singular_values_as_fast_shrinks_pass_the_gates(n, aspect, source):
    for name, whole in flat_tops(n, aspect).items():
        if n > 400 and name not in ("flat_56_and_0.01", "flat_72_and_0.01"):
            continue
        x = whole.to(source)
        exact = polar_factor(whole if source == torch.float32 else x.double())
        result = orthogonalize(x, method="fast", dtype=torch.float16)
        assert largest_singular_value(result) <= MAX_SIGMA, name
        error = orthogonality_error(result, exact)
        if error > SMALL_ERROR:
            reference = orthogonalize(x.float(), method="gram", dtype=torch.float16)
            assert error <= MAX_RATIO * orthogonality_error(reference, exact), name


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 13, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["fast", "unbiased"])
def test_tiny_matrices_of_nearly_rank_one_stay_bounded(method, dtype, n):
    generator = torch.Generator().manual_seed(n)

    def random():
        return torch.randn(150, n, n, generator=generator, dtype=torch.float64)

    values = torch.full((n,), 0.005, dtype=torch.float64)
    values[0] = 1.0
    x = torch.linalg.qr(random())[0] * values @ torch.linalg.qr(random())[0]
    for batch in (x, random()):
        result = orthogonalize(batch.float(), method=method, dtype=dtype)
        assert torch.linalg.matrix_norm(result.double(), 2).max() <= MAX_SIGMA


@pytest.mark.parametrize("method", ["fast", "unbiased"])
def test_the_mean_error_is_below_that_of_gram(method):
    for n, aspect in ((128, 1), (192, 2)):
        cases = gram_errors(n, aspect)
        mine = sum(
            orthogonality_error(orthogonalize(x, method=method, dtype=torch.float16), exact)
            for x, exact, _ in cases.values()
        )
        assert mine < sum(reference for _, _, reference in cases.values())


@pytest.mark.parametrize("method", ["fast", "unbiased"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_precisions_stay_bounded(method, dtype):
    for aspect in (1, 3):
        for name, (x, exact, reference) in gram_errors(128, aspect).items():
            result = orthogonalize(x, method=method, dtype=dtype)
            assert largest_singular_value(result) <= MAX_SIGMA, name
            # Eight bits cost a little, on spectra with a long tail and in the safety factor.
            coarse = dtype == torch.bfloat16
            allowed = max((1.05 if coarse else MAX_RATIO) * reference, 0.13 if coarse else 0.115)
            assert orthogonality_error(result, exact) <= allowed, name


@pytest.mark.parametrize(("n", "aspect"), [(33, 1), (40, 3), (64, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["fast", "unbiased", "auto"])
def test_small_matrices_stay_bounded_on_both_suites(method, dtype, n, aspect):
    for name, (x, exact, reference) in gram_errors(n, aspect).items():
        result = orthogonalize(x, method=method, dtype=dtype)
        assert largest_singular_value(result) <= MAX_SIGMA, name
        if dtype == torch.float16:
            allowed = max(MAX_RATIO * reference, SMALL_ERROR)
            assert orthogonality_error(result, exact) <= allowed, name


@pytest.mark.parametrize("method", ["fast", "unbiased"])
def test_the_gates_would_notice_a_missing_restart(method):
    """The same steps with all restarts left out, in bfloat16: the suites must show it."""
    broken = replace(METHODS[method].default_for(torch.bfloat16), restarts=())
    worst = max(
        largest_singular_value(
            orthogonalize(x, method=method, coefficients=broken, dtype=torch.bfloat16)
        )
        for x, _, _ in gram_errors(128, 1).values()
    )
    assert worst > MAX_SIGMA


@pytest.mark.parametrize("n", [1, 2, 5, 16, 33, 64, 65])
@pytest.mark.parametrize("method", ["fast", "unbiased"])
def test_small_matrices_are_orthogonalized_too(method, n):
    for m in (n, 3 * n):
        x = torch.randn(n, m, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        exact = polar_factor(x)
        for dtype in (torch.float16, torch.float64):
            result = orthogonalize(x, method=method, dtype=dtype)
            reference = orthogonalize(x, method="gram", dtype=torch.float64)
            allowed = max(MAX_RATIO * orthogonality_error(reference, exact), SMALL_ERROR)
            assert orthogonality_error(result, exact) <= allowed, (m, dtype)
