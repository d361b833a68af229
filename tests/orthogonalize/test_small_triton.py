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
from flashns_dist.orthogonalize.bound import bound_scalars, spectral_bound  # noqa: E402
from flashns_dist.orthogonalize.deflation import _signs, shrink_factors  # noqa: E402
from flashns_dist.orthogonalize.kernels import load_backend, small  # noqa: E402
from flashns_dist.testing.spectra import (  # noqa: E402
    largest_singular_value,
    orthogonality_error,
    polar_factor,
    spectra,
    with_singular_values,
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


@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [96, 130])
def test_shrink_factors_are_those_of_the_separate_operations(backends, dtype, n, weights_dtype):
    fused, reference = backends
    size = float(2 * n)
    suite = spectra(n, 4)
    flat = torch.where(torch.arange(n) < 60, 1.0, 0.01)  # Hardly spanned by 64 directions.
    matrices = [suite[name] for name in NAMES] + [with_singular_values(flat, 4 * n, 1)]
    matrices = [matrix * (size / matrix.norm()) for matrix in matrices]
    x = torch.stack([*matrices, torch.zeros(n, 4 * n)]).to(dtype).to(DEVICE)
    signs = _signs(n, 64, dtype, x.device)
    sketch = reference.product(signs.expand(len(x), -1, -1), x)
    image = reference.product(sketch, x.mT, alpha=1 / size)
    assert small.runs_triton(fused, image)
    assert not small.runs_triton(reference, image)
    results = [shrink_factors(kernels, image, signs, size, weights_dtype) for kernels in backends]
    assert all(a.dtype == dtype and weights.dtype == weights_dtype for a, weights in results)
    shrinks = [
        torch.eye(n, device=DEVICE) - weights.float().mT @ a.float() / size
        for a, weights in results
    ]
    # S differs by the rounding of its two factors.
    difference = torch.linalg.matrix_norm(shrinks[0] - shrinks[1], 2).max()
    assert difference < 4 * max(torch.finfo(dtype).eps, torch.finfo(weights_dtype).eps)
    assert torch.equal(results[0][0][-1], torch.zeros_like(results[0][0][-1]))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("n", [1, 96, 130, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_and_bound_scalars_are_those_of_the_separate_operations(n, dtype, each):
    x = torch.randn(4, n, n, generator=torch.Generator().manual_seed(n))
    matrix = (x @ x.mT / n * torch.tensor([3.0, 1e-2, 0.0, 20.0])[:, None, None]).to(dtype)
    matrix = matrix.to(DEVICE)
    exact = torch.linalg.vector_norm(matrix.double(), dim=(1, 2)).float()
    inverse = small.inverse_norms(matrix)
    assert torch.allclose(inverse, 1 / exact.clamp_min(1e-12), rtol=1e-5)
    weight = inverse if each else 0.25
    factor = inverse[:, None, None].double() if each else 0.25
    square = (matrix.double() @ matrix.double() * factor).to(dtype)
    trace = square.double().diagonal(dim1=1, dim2=2).sum(1)
    norm = torch.linalg.vector_norm(square.double(), dim=(1, 2))
    expected = bound_scalars(trace, norm, weight.double() if each else weight, n)
    for found, exact in zip(small.bound_scalars(square, weight), expected, strict=True):
        assert torch.allclose(found.double(), exact, rtol=1e-4 if n > 1 else 1e-2)
        assert torch.isfinite(found).all()
    clean = torch.stack((inverse, *small.bound_scalars(square, weight)))
    matrix[1, 0, 0] = square[1, 0, 0] = float("nan")
    spoiled = torch.stack((small.inverse_norms(matrix), *small.bound_scalars(square, weight)))
    assert spoiled[:, 1].isnan().all()
    assert torch.equal(spoiled[:, [0, 2, 3]], clean[:, [0, 2, 3]])


@pytest.mark.parametrize("weight", [None, 130**-0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bound_is_that_of_the_separate_operations(backends, dtype, weight):
    x = torch.stack([spectra(130, 2)[name] for name in NAMES])
    gram = (x @ x.mT * (130 / x.square().sum((1, 2)))[:, None, None]).to(dtype).to(DEVICE)
    bound, reference = (spectral_bound(k, gram, weight) for k in backends)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(bound.scale, reference.scale, rtol=4 * eps)
    assert torch.equal(bound.root, bound.scale.double().sqrt().float())
    assert torch.allclose(bound.square.weight, reference.square.weight, rtol=8 * eps)


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


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["fast", "unbiased"])
def test_a_method_is_as_good_on_triton_as_on_torch(method, source):
    for name in NAMES:
        x = spectra(96, 2)[name].to(source)
        x = x.mT.contiguous() if name == "power_1" else x
        exact = polar_factor(x.double())
        errors = {}
        for backend in ("triton", "torch"):
            result = orthogonalize(
                x.to(DEVICE), method=method, backend=backend, dtype=torch.float16
            ).cpu()
            errors[backend] = orthogonality_error(result, exact)
            assert largest_singular_value(result) <= 1.25
        assert errors["triton"] <= 1.1 * errors["torch"] + 0.01, name
