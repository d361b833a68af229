"""The spectral bound and the shrinking of dominant singular values, against float64."""

import pytest
import torch

from flashns_dist.orthogonalize.bound import spectral_bound
from flashns_dist.orthogonalize.deflation import (
    BASIS_ROW,
    MARGIN,
    SHRINK_ROW,
    deflate,
    shrink_weights,
)
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels
from flashns_dist.orthogonalize.methods import find_method
from flashns_dist.orthogonalize.solver import minimax_row, step_multiplier, step_value
from flashns_dist.orthogonalize.spectral import fast
from flashns_dist.testing.spectra import adversarial, flat_tops, spectra

KERNELS = TorchKernels()


def suites(n, aspect):
    return spectra(n, aspect) | adversarial(n, aspect)


@pytest.mark.parametrize("weight", [None, 96**-0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("aspect", [1, 4])
def test_the_bound_is_above_the_largest_eigenvalue_and_below_the_trace(dtype, aspect, weight):
    for name, x in suites(96, aspect).items():
        gram = (x @ x.T) * (96 / x.square().sum())
        largest = torch.linalg.eigvalsh(gram.to(dtype).double())[-1]
        found = spectral_bound(KERNELS, gram.to(dtype)[None], weight)
        bound, square = 1 / found.scale, found.square
        # The variance of equal eigenvalues is a difference of equal terms.
        assert bound.item() >= largest * (1 - max(torch.finfo(dtype).eps, 1e-7)), name
        assert bound.item() <= 96 * (1 + 1e-3), name
        exact = gram @ gram
        error = square.matrix[0].double() * square.weight.item() * bound.item() ** 2 - exact
        allowed = 20 if dtype == torch.float64 else 2  # the sum's own rounding, and one more
        assert error.abs().max() <= allowed * torch.finfo(dtype).eps * exact.abs().max(), name


def test_the_bound_is_tight_where_theory_says_so():
    one = torch.zeros(1, 50, 50, dtype=torch.float64)
    one[0, 0, 0] = 7.0
    assert 1 / spectral_bound(KERNELS, one).scale.item() == pytest.approx(7.0)
    equal = 3 * torch.eye(50, dtype=torch.float64)[None]
    assert 1 / spectral_bound(KERNELS, equal).scale.item() == pytest.approx(3.0, rel=1e-6)
    x = spectra(256, 1)["gaussian"]
    gram = x @ x.T
    slack = 1 / spectral_bound(KERNELS, gram[None]).scale.item() / torch.linalg.eigvalsh(gram)[-1]
    assert slack**0.5 < 1.5
    assert (gram.trace() / torch.linalg.eigvalsh(gram)[-1]) ** 0.5 > 7


def test_a_zero_matrix_has_a_harmless_bound():
    bound = spectral_bound(KERNELS, torch.zeros(2, 4, 4))
    assert (bound.scale > 0).all()
    assert torch.isfinite(bound.scale).all()
    assert torch.equal(bound.root, bound.scale.sqrt())
    assert torch.equal(bound.square.matrix, torch.zeros(2, 4, 4))


def test_shrink_weights_are_those_of_the_polynomial():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    weights = shrink_weights(((basis * values) @ basis.T)[None])[0]
    ratio = step_multiplier(SHRINK_ROW, values) / step_multiplier(SHRINK_ROW, 0 * values)
    assert torch.allclose(basis.T @ weights @ basis, ((1 - ratio) / values).diag(), atol=1e-9)


def test_shrinking_keeps_every_singular_value_positive_and_small():
    assert minimax_row(1 / 60, 1.0, 17) == pytest.approx(SHRINK_ROW, rel=1e-9)
    x = torch.linspace(0, 1, 10001, dtype=torch.float64)
    slope = step_multiplier(SHRINK_ROW, torch.zeros(1, dtype=torch.float64)).item()
    shrunk = step_value(SHRINK_ROW, x) / slope
    assert (shrunk[1:] > 0).all()
    assert shrunk.max() < 0.0751
    assert (shrunk <= x).all()


@pytest.mark.parametrize("aspect", [1, 4])
def test_deflation_bounds_the_norm_and_keeps_the_polar_factor(aspect):
    n = 128
    for name, x in suites(n, aspect).items():
        size = (n * n * aspect) ** 0.5
        x = x * (size / x.norm())
        result = deflate(KERNELS, x[None], size, normalized=True)[0]
        left, values, right = torch.linalg.svd(x)
        shrunk = torch.linalg.svdvals(result)
        assert (shrunk <= values + 1e-9 * values[0]).all(), name
        # 65 singular values above a norm cannot each exceed an eighth of it.
        assert shrunk[0] < size / 6, name
        # S = U (I - E) U^T would leave nothing outside the diagonal.
        keep = int((values > 1e-3 * values[0]).sum())
        core = left[:, :keep].T @ result @ right[:keep].T
        other_left, _, other_right = torch.linalg.svd(core)
        polar = other_left @ other_right
        error = (polar - torch.eye(keep)).norm() / keep**0.5
        assert error < 0.05, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_bound_is_small_where_random_directions_are_ill_conditioned(dtype):
    n = 384
    for name, x in flat_tops(n, 1).items():
        result = deflate(KERNELS, (x * (n / x.norm())).to(dtype)[None], float(n), normalized=True)
        gram = KERNELS.gram(result.double(), alpha=1 / n**2)
        # With 0.167 the two steps are as exact as five of Polar Express.
        assert spectral_bound(KERNELS, gram).scale.item() ** -0.5 < 0.165, name


@pytest.mark.parametrize("tall", [False, True])
def test_deflation_scales_casts_and_transposes_what_it_reads(tall):
    x = torch.stack([spectra(96, 2)[name] for name in ("power_1", "one_dominant")]).bfloat16()
    size = 128.0
    scale = KERNELS.inverse_norms(x, scale=size)
    source = x.mT.contiguous() if tall else x
    result = deflate(KERNELS, source, size, normalized=False, dtype=torch.float16)
    normalized = x.double() * scale[:, None, None].double()
    expected = deflate(KERNELS, normalized, size, normalized=True)
    assert result.dtype == torch.float16
    assert result.shape == (2, 96, 192)
    # What is shrunk is a difference of what bfloat16 factors of norm `size` have rounded.
    assert torch.linalg.matrix_norm(result.double() - expected, 2).max() < size / 128
    zero = torch.zeros(1, 40, 50, dtype=torch.bfloat16)
    assert not deflate(KERNELS, zero, size, normalized=False).any()


def test_an_expanded_batch_is_read_as_its_matrix_is(monkeypatch):
    kernels, strides = TorchKernels(), []

    def sketch(signs, x, *, scale):
        strides.append(x.stride())
        return TorchKernels.sketch(kernels, signs, x, scale=scale)

    monkeypatch.setattr(kernels, "sketch", sketch)
    coefficients = find_method("fast").default_for(torch.float16)
    x = spectra(96, 2)["gaussian"].bfloat16()[None]
    for batch in (x.expand(3, -1, -1), x):
        fast(kernels, batch, coefficients, dtype=torch.float16, transpose=False)
    assert strides[0] == (96 * 192, 192, 1)
    assert strides[1][1:] == (192, 1)


def test_deflation_leaves_a_flat_spectrum_nearly_alone():
    x = spectra(256, 4)["gaussian"]
    size = (256 * 1024) ** 0.5
    x = x * (size / x.norm())
    result = deflate(KERNELS, x[None], size, normalized=True)[0]
    ratio = torch.linalg.svdvals(result)[-1] / torch.linalg.svdvals(x)[-1]
    assert 0.7 < ratio <= 1.0


def test_the_margin_covers_the_basis():
    for name, x in suites(128, 1).items():
        x = x * (128.0 / x.norm())
        # The worst that the basis can do is on the matrix itself: A^T A <= MARGIN ||X||^2.
        result = deflate(KERNELS, x.half()[None], 128.0, normalized=True)[0]
        assert torch.isfinite(result).all(), name
        assert result.float().norm() <= 128.0 * (1 + 1e-3), name


def test_the_basis_row_is_the_solvers_and_within_the_margin():
    assert minimax_row(1 / 8, 1.0, 17) == pytest.approx(BASIS_ROW, rel=1e-9)
    x = torch.linspace(0, 1, 10001, dtype=torch.float64)
    assert 1.15 < step_value(BASIS_ROW, x).max().item() ** 2 < MARGIN
