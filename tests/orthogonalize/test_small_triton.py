"""The fused small kernels against the torch operations that they replace.

In Triton's interpreter on the CPU, compiled where a GPU is present.
"""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, Triton's own included

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from flashns_dist.orthogonalize import orthogonalize  # noqa: E402
from flashns_dist.orthogonalize.bound import bound_scalars  # noqa: E402
from flashns_dist.orthogonalize.deflation import _signs, shrink_factors  # noqa: E402
from flashns_dist.orthogonalize.kernels import load_backend, small  # noqa: E402
from flashns_dist.testing.spectra import (  # noqa: E402
    largest_singular_value,
    orthogonality_error,
    polar_factor,
    spectra,
)

pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.cdiv, InterpretedFunction),
    reason="Triton was imported before its interpreter was asked for",
)
DEVICE = torch.device("cuda" if CUDA else "cpu")
NAMES = ("gaussian", "power_1", "one_dominant", "log_uniform_1e-3")


@pytest.fixture(scope="module")
def backends():
    return load_backend("triton"), load_backend("torch")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [96, 130])
def test_shrink_factors_are_those_of_the_separate_operations(backends, dtype, n):
    fused, reference = backends
    size = float(2 * n)
    suite = spectra(n, 4)
    matrices = [suite[name] * (size / suite[name].norm()) for name in NAMES]
    x = torch.stack([*matrices, torch.zeros(n, 4 * n)]).to(dtype).to(DEVICE)
    signs = _signs(n, 64, dtype, x.device)
    sketch = reference.product(signs.expand(len(x), -1, -1), x)
    image = reference.product(sketch, x.mT, alpha=1 / size)
    assert small.runs_triton(fused, image)
    assert not small.runs_triton(reference, image)
    results = [shrink_factors(kernels, image, signs, size) for kernels in backends]
    shrinks = [
        torch.eye(n, device=DEVICE) - weights.float().mT @ a.float() / size
        for a, weights in results
    ]
    # S differs by the rounding of its two factors.
    difference = torch.linalg.matrix_norm(shrinks[0] - shrinks[1], 2).max()
    assert difference < 4 * torch.finfo(dtype).eps
    assert torch.equal(results[0][0][-1], torch.zeros_like(results[0][0][-1]))


def test_bound_scalars_are_those_of_the_separate_operations():
    norm = torch.tensor([3.0, 1e-3, 0.0, float("nan"), 200.0], device=DEVICE)
    square_norm = norm * torch.tensor([1.0, 0.2, 0.0, 1.0, 0.1], device=DEVICE)
    for found, expected in zip(
        small.bound_scalars(norm, square_norm, 96),
        bound_scalars(norm, square_norm, 96),
        strict=True,
    ):
        assert torch.allclose(found, expected, rtol=1e-5, atol=0, equal_nan=True)
        assert torch.isfinite(found[[0, 1, 2, 4]]).all()


def test_a_nan_stays_in_its_matrix(backends):
    signs = _signs(100, 64, torch.float16, DEVICE)
    x = torch.randn(3, 100, 200, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    image = (signs @ x @ x.mT) / 20
    image[1, 2, 3] = float("nan")
    clean = image.clone()
    clean[1] = 0
    for found, expected in zip(
        shrink_factors(backends[0], image, signs, 20.0),
        shrink_factors(backends[0], clean, signs, 20.0),
        strict=True,
    ):
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert not torch.isfinite(found[1]).all()


@pytest.mark.parametrize("method", ["fast", "unbiased"])
def test_a_method_is_as_good_on_triton_as_on_torch(method):
    for name in NAMES:
        x = spectra(96, 2)[name]
        exact = polar_factor(x)
        errors = {}
        for backend in ("triton", "torch"):
            result = orthogonalize(
                x.float().to(DEVICE), method=method, backend=backend, dtype=torch.float16
            ).cpu()
            errors[backend] = orthogonality_error(result, exact)
            assert largest_singular_value(result) <= 1.25
        assert errors["triton"] <= 1.1 * errors["torch"] + 0.01, name
