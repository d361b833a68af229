"""The reference backend against float64 products."""

import pytest
import torch

from flashns_dist.orthogonalize.kernels import get_kernels, load_backend
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels, exact_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(result, expected):
    """Within one rounding of the result, as for a sum in fp32 that is rounded once."""
    tolerance = 2 * torch.finfo(result.dtype).eps * expected.abs().max()
    return (result.double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_matrix", [False, True])
def test_products_match_float64(dtype, per_matrix):
    kernels = TorchKernels()
    x, c = random(3, 7, 19, dtype=dtype), random(3, 7, 19, seed=1, dtype=dtype)
    gram = kernels.gram(x)
    alpha, beta, gamma = (torch.tensor([v, 2 * v, -v]) if per_matrix else v for v in (0.5, 3, -2.0))
    wide = [v.double()[:, None, None] if per_matrix else v for v in (alpha, beta, gamma)]
    assert close(gram, x.double() @ x.double().mT)
    result = kernels.symmetric(gram, gram, alpha=alpha, c=gram, beta=beta, gamma=gamma)
    exact = gram.double()
    expected = wide[0] * exact @ exact + wide[1] * exact + wide[2] * torch.eye(7)
    assert close(result, expected)
    assert torch.equal(result, result.mT)
    scale = torch.rand(3, 7)
    result = kernels.product(
        gram, x, alpha=alpha, c=c, beta=beta, column_scale=scale, transpose=True, dtype=dtype
    )
    exact = (gram * scale[:, None]).to(dtype).double()
    assert close(result, (wide[0] * exact @ x.double() + wide[1] * c.double()).mT)
    assert result.is_contiguous()
    assert kernels.product(gram, x, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_matrix", [False, True])
def test_sums_that_cancel_are_rounded_once(source, per_matrix):
    """As when deflation takes 19 twentieths of a matrix away."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 32, 64, generator=g).to(source)
    x = torch.randn(2, 64, 48, generator=g).to(source)
    whole = a.double() @ x.double()
    c = (-0.95 * whole).to(source)
    one = torch.ones(2, device=DEVICE) if per_matrix else 1.0
    found = TorchKernels().product(
        a.to(DEVICE), x.to(DEVICE), alpha=one, c=c.to(DEVICE), beta=one, dtype=torch.float16
    )
    exact = whole + c.double()
    # One rounding of the result, and fp32 sums of 64 terms.
    allowed = 2.0**-11 * exact.abs() + 2.0**-18 * (a.abs().double() @ x.abs().double())
    assert found.dtype == torch.float16
    assert ((found.cpu().double() - exact).abs() <= allowed).all()


def test_out_is_filled_and_inputs_stay():
    kernels = TorchKernels()
    a = kernels.gram(random(2, 5, 6))
    before, out = a.clone(), torch.empty(2, 5, 5)
    assert kernels.symmetric(a, a, gamma=1.0, c=a, beta=2.0, out=out) is out
    assert torch.equal(a, before)
    assert torch.equal(out, kernels.symmetric(a, a, gamma=1.0, c=a, beta=2.0))


def test_normalize_returns_unit_norm_and_the_norms():
    x = random(4, 6, 9) * torch.tensor([1e-30, 1.0, 1e30, 0.0])[:, None, None]
    result, norms = TorchKernels().normalize(x, dtype=torch.float32, transpose=True, scale=3.0)
    assert result.shape == (4, 9, 6)
    expected = torch.linalg.vector_norm(x.double(), dim=(-2, -1))
    assert torch.allclose(norms.double(), expected, rtol=1e-6, atol=0)
    found = torch.linalg.vector_norm(result.double(), dim=(-2, -1))
    assert torch.allclose(found, torch.tensor([3.0, 3.0, 3.0, 0.0], dtype=torch.float64))


def test_auto_is_torch_on_the_cpu():
    found = get_kernels("auto", device=torch.device("cpu"), shape=(1, 4, 4), dtype=torch.float32)
    assert found is load_backend("torch")


def test_users_settings_of_cublas_come_back():
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    try:
        matmul.allow_fp16_reduced_precision_reduction = False
        with exact_sums():
            assert not any(getattr(matmul, name) for name in names)
        assert [getattr(matmul, name) for name in names] == [False, before[1]]
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before[0]


def test_settings_of_cublas_come_back_after_the_last_of_several_threads():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    first, second = exact_sums(), exact_sums()  # as two threads would
    try:
        matmul.allow_bf16_reduced_precision_reduction = True
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not matmul.allow_bf16_reduced_precision_reduction
        second.__exit__(None, None, None)
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
