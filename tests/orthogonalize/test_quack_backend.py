"""The quack backend: what it hands to quack, what it does not; against a stand-in without a GPU."""

import sys
import types

import pytest
import torch

from flashns_dist.orthogonalize.kernels import load_backend, quack_backend
from flashns_dist.orthogonalize.kernels.quack_backend import (
    QuackKernels,
    mirror_diagonal_blocks,
    unavailable,
)
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels


class StandIn(types.ModuleType):
    """quack.gemm_interface as far as the backend uses it, in torch, noting what was called."""

    def __init__(self):
        super().__init__("quack.gemm_interface")
        self.calls = []

    def gemm_symmetric(self, a, b, C=None, out=None, alpha=1.0, beta=1.0):
        self.calls.append("gemm_symmetric")
        result = alpha * a.double() @ b.double()
        result = result if C is None else result + beta * C.double()
        if a.data_ptr() != b.data_ptr():  # what it does not mirror is not symmetric
            result += 0.1 * torch.ones_like(result).triu(1)
        result = result.to(a.dtype)
        return result if out is None else out.copy_(result)

    def gemm(self, a, b, out=None, alpha=1.0, out_dtype=None, tuned=True):
        assert not tuned
        self.calls.append("gemm")
        result = (alpha * a.double() @ b.double()).to(out_dtype)
        return result if out is None else out.copy_(result)

    def gemm_add(self, a, b, C, out=None, alpha=1.0, beta=1.0, out_dtype=None, tuned=True):
        assert not tuned
        self.calls.append("gemm_add")
        result = (alpha * a.double() @ b.double() + beta * C.double()).to(out_dtype)
        return result if out is None else out.copy_(result)


@pytest.fixture
def quack(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", stand_in)
    monkeypatch.setattr(quack_backend, "unavailable", lambda: None)
    monkeypatch.setattr(quack_backend, "_others", lambda: (TorchKernels(), mirror_diagonal_blocks))
    monkeypatch.setattr(
        quack_backend, "_fits", lambda first, *others: first.dtype in (torch.float16,)
    )
    return stand_in


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half() / 8


def test_products_are_those_of_torch(quack):
    kernels, reference = QuackKernels(), TorchKernels()
    x = random(2, 40, 72)
    gram = kernels.gram(x, alpha=0.5)
    assert torch.allclose(gram, reference.gram(x, alpha=0.5), rtol=2e-3, atol=1e-4)
    for transpose in (False, True):
        for c in (None, x):
            options = {"alpha": 0.5, "c": c, "beta": 2.0, "transpose": transpose}
            result = kernels.product(gram, x, dtype=torch.bfloat16, **options)
            expected = reference.product(gram, x, dtype=torch.bfloat16, **options)
            assert result.dtype == torch.bfloat16
            assert torch.allclose(result, expected, rtol=2e-2, atol=1e-3)
    for factor in (gram, gram.clone()):
        options = {"alpha": 0.5, "c": gram, "beta": 3.0}
        result = kernels.symmetric(gram, factor, **options)
        expected = reference.symmetric(gram, factor, **options)
        assert torch.allclose(result, expected, rtol=2e-3, atol=1e-4)
        assert torch.equal(result, result.mT)
    assert set(quack.calls) == {"gemm_symmetric", "gemm", "gemm_add"}


def test_what_quack_lacks_goes_to_the_other_backend(quack):
    kernels, reference = QuackKernels(), TorchKernels()
    x = random(2, 16, 24)
    gram = reference.gram(x)
    each = torch.tensor([1.0, 2.0])
    for alpha, gamma in ((each, 0.0), (1.0, 2.0)):
        result = kernels.symmetric(gram, gram, alpha=alpha, gamma=gamma)
        assert torch.equal(result, reference.symmetric(gram, gram, alpha=alpha, gamma=gamma))
    scale = torch.rand(2, 16)
    result = kernels.product(gram, x, column_scale=scale)
    assert torch.equal(result, reference.product(gram, x, column_scale=scale))
    assert torch.equal(kernels.gram(x.float()), reference.gram(x.float()))
    result, _ = kernels.normalize(x, dtype=torch.float16, transpose=True)
    assert torch.equal(result, reference.normalize(x, dtype=torch.float16, transpose=True)[0])
    assert quack.calls == []


@pytest.mark.parametrize(("n", "block"), [(8, 4), (10, 4), (3, 4)])
def test_mirroring_touches_the_diagonal_blocks_only(n, block):
    matrix = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
    expected = matrix.clone()
    for start in range(0, n, block):
        for i in range(start, min(start + block, n)):
            for j in range(start, i):
                expected[:, j, i] = matrix[:, i, j]
    mirror_diagonal_blocks(matrix, block)
    assert torch.equal(matrix, expected)


def test_absence_is_explained(monkeypatch):
    unavailable.cache_clear()
    monkeypatch.setattr(quack_backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in unavailable()
    load_backend.cache_clear()
    with pytest.raises(ImportError, match="quack-kernels is not installed"):
        QuackKernels()
    unavailable.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
class TestOnDevice:
    def test_symmetric_products_are_as_exact_as_torch_and_symmetric(self):
        kernels, reference = QuackKernels(), TorchKernels()
        generator = torch.Generator(device="cuda").manual_seed(0)
        for batch, n, m in ((3, 1000, 1512), (2, 2048, 2048)):
            x = torch.randn(batch, n, m, device="cuda", generator=generator).half() / m**0.5
            gram = kernels.gram(x)
            assert torch.equal(gram, gram.mT)
            exact = x.double() @ x.double().mT
            limit = 1.25 * (reference.gram(x).double() - exact).norm()
            assert (gram.double() - exact).norm() <= limit
            for factor in (gram, gram.clone()):
                options = {"alpha": 0.3, "c": gram, "beta": 0.7}
                square = kernels.symmetric(gram, factor, **options)
                assert torch.equal(square, square.mT)
                expected = reference.symmetric(gram.double(), factor.double(), **options)
                found = (square.double() - expected).norm() / expected.norm()
                assert found <= 1e-3
            for transpose in (False, True):
                result = kernels.product(gram, x, c=x, beta=2.0, transpose=transpose)
                exact = gram.double() @ x.double() + 2 * x.double()
                exact = exact.mT if transpose else exact
                assert (result.double() - exact).norm() <= 1e-3 * exact.norm()
