"""Accuracy against exact polar factors, in units of the plain torch iteration of the same dtype."""

from functools import cache

import pytest
import torch

from flashns_dist.orthogonalize import POLAR_EXPRESS, orthogonalize
from flashns_dist.testing.spectra import (
    adversarial,
    largest_singular_value,
    orthogonality_error,
    polar_factor,
    spectra,
)


@cache
def cases(aspect):
    """``(name, matrix, exact polar factor)`` of every matrix of both suites, ``96 x 96 aspect``."""
    suites = spectra(96, aspect) | adversarial(96, aspect)
    return [(name, x, polar_factor(x)) for name, x in suites.items()]


def baseline(x, dtype):
    """Standard Newton-Schulz as a reader would write it, with nothing of the package."""
    y = (x / x.norm()).to(dtype)
    for a, b, c in POLAR_EXPRESS.rows:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.double()


@pytest.mark.parametrize("aspect", [1, 2, 8])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_float64_is_the_composed_polynomial_of_the_singular_values(method, aspect):
    for name, x, _ in cases(aspect):
        left, values, right = torch.linalg.svd(x, full_matrices=False)
        values = values / values.norm()
        for a, b, c in POLAR_EXPRESS.rows:
            values = a * values + b * values**3 + c * values**5
        expected = (left * values) @ right
        result = orthogonalize(x, method=method, dtype=torch.float64)
        # Rounding of 1e-16, amplified by at most the product of the slopes (1e3) for the standard
        # iteration, and by its square in Gram space.
        assert (result - expected).abs().max() < 1e-9, name


@pytest.mark.parametrize("aspect", [1, 2, 8])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_float32_is_as_exact_as_plain_torch(method, aspect):
    for name, x, exact in cases(aspect):
        error = orthogonality_error(orthogonalize(x.float(), method=method), exact)
        plain = orthogonality_error(baseline(x, torch.float32), exact)
        # The Gram iteration's own rounding reaches 1e-7 * 160, see restarts.growth.
        assert error <= 1.001 * plain + 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_standard_is_as_exact_as_plain_torch(dtype):
    for name, x, exact in cases(2):
        result = orthogonalize(x.float(), method="standard", dtype=dtype)
        plain = orthogonality_error(baseline(x, dtype), exact)
        assert orthogonality_error(result, exact) <= 1.05 * plain + 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("aspect", [2, 8])
def test_float16_gram_stays_bounded_on_adversarial_spectra(aspect):
    for name, x in adversarial(96, aspect).items():
        result = orthogonalize(x, method="gram", dtype=torch.float16)
        assert largest_singular_value(result) < 1.4, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_as_good_as_float32_inputs_that_were_rounded(dtype):
    for name, x, _ in cases(2):
        rounded = x.to(dtype)
        result = orthogonalize(rounded, method="gram", dtype=torch.float32)
        expected = orthogonalize(rounded.float(), method="gram", dtype=torch.float32)
        assert torch.equal(result, expected.to(dtype)), name


def test_aol_approximates_the_polar_factor_of_the_scaled_matrix():
    for name, x, _ in cases(2):
        if name in ("zero_rows", "single_entry"):
            continue  # The guard for zero rows changes the scales there.
        scale = (x @ x.T).abs().sum(1).rsqrt()
        scaled = scale[:, None] * x
        exact = polar_factor(scaled)
        result = orthogonalize(x, method="aol", coefficients="aol_flash", dtype=torch.float64)
        values = torch.linalg.svdvals(scaled)
        for a, b, c in ((4.6051, -9.6552, 5.6769), (4.7505, -6.0861, 2.1790)):
            values = a * values + b * values**3 + c * values**5
        for a, b, c in ((2.7763, -2.3190, 0.5523), (2.4231, -2.2861, 0.8193)):
            values = a * values + b * values**3 + c * values**5
        values = values[: exact.rank]
        core = exact.left.T @ result @ exact.right.T
        assert (core - values.diag()).abs().max() < 1e-6, name


def test_aol_keeps_zero_rows_at_zero():
    x = adversarial(96, 2)["zero_rows"]
    for dtype in (torch.float16, torch.float64):
        result = orthogonalize(x, method="aol", dtype=dtype)
        assert torch.equal(result[:48], torch.zeros_like(result[:48]))
        assert 0.5 < largest_singular_value(result) < 1.4
