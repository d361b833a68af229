"""The Triton backend: in the interpreter on the CPU, compiled where a GPU is present.

The oracle is a float64 product. The tolerance is the error that torch makes in the same dtype.
"""

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, Triton's own included

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from flashns_dist.orthogonalize import METHODS, orthogonalize  # noqa: E402
from flashns_dist.orthogonalize.gram import run_steps  # noqa: E402
from flashns_dist.orthogonalize.kernels.combine import combine  # noqa: E402
from flashns_dist.orthogonalize.kernels.interface import Multiple  # noqa: E402
from flashns_dist.orthogonalize.kernels.quack_backend import (  # noqa: E402
    mirror_diagonal_blocks,
)
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels  # noqa: E402
from flashns_dist.orthogonalize.kernels.triton_backend import TritonKernels  # noqa: E402
from flashns_dist.orthogonalize.kernels.triton_configs import TileConfig  # noqa: E402
from flashns_dist.orthogonalize.kernels.triton_passes import launch_mirror  # noqa: E402
from flashns_dist.orthogonalize.kernels.triton_tiles import (  # noqa: E402
    triangle_tile,
    triangle_wide,
)

pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.cdiv, InterpretedFunction),
    reason="Triton was imported before its interpreter was asked for; test_triton_compile.py runs "
    "this file in a process of its own",
)
DEVICE = "cuda" if CUDA else "cpu"
REFERENCE = TorchKernels()
HALF = (torch.float16, torch.bfloat16)
# Small tiles, so that the interpreter's small matrices have several of them.

TILES = TileConfig(64, 64, 64, 4, 3) if CUDA else TileConfig(32, 32, 32, 4, 2)
WIDE = TileConfig(64, 128, 64, 4, 3) if CUDA else TileConfig(32, 64, 32, 4, 2)

# On a GPU no smaller than 64, below which Triton takes another tensor-core instruction.
OTHER = TileConfig(64, 64, 64, 8, 2, group=2) if CUDA else TileConfig(16, 16, 64, 4, 2, group=2)


def random(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def error(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


def assert_as_good(result, reference, exact):
    """At most 1.25 times torch's error in the same dtype, and a few fp32 roundings.

    On a GPU fp32 is computed in three tf32 passes, which lose about three bits.
    """
    assert error(result, exact) <= 1.25 * error(reference, exact) + (1e-5 if CUDA else 1e-6)


def kernels_of(descriptors, config=TILES):
    # Descriptors cannot be compiled before Hopper.
    if CUDA and descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need compute capability 9.0")
    return TritonKernels(descriptors=descriptors, config=config)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(("batch", "n", "m"), [(1, 1, 1), (2, 40, 72), (3, 33, 70), (1, 70, 41)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_products_are_as_exact_as_torch(batch, n, m, dtype, descriptors):
    kernels = kernels_of(descriptors)
    x = random(batch, n, m, dtype=dtype) / 8
    gram = kernels.gram(x)
    wide = x.double()
    assert_as_good(gram, REFERENCE.gram(x), wide @ wide.mT)
    assert torch.equal(gram, gram.mT)
    c = kernels.gram(random(batch, n, m, seed=1, dtype=dtype) / 8)
    scalars = {"alpha": 0.7, "beta": 0.3, "gamma": -2.0}
    square = kernels.symmetric(gram, gram, c=c, **scalars)
    exact = REFERENCE.symmetric(gram.double(), gram.double(), c=c.double(), **scalars)
    assert_as_good(square, REFERENCE.symmetric(gram, gram, c=c, **scalars), exact)
    assert torch.equal(square, square.mT)
    scalars = {"alpha": 0.7, "beta": 2.0, "dtype": dtype}
    product = kernels.product(square, x, c=x, **scalars)
    exact = 0.7 * square.double() @ wide + 2 * wide
    assert_as_good(product, REFERENCE.product(square, x, c=x, **scalars), exact)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("transpose", [False, True])
def test_a_shift_and_an_addend_of_another_dtype(dtype, descriptors, transpose):
    kernels = kernels_of(descriptors)
    a, b = (random(2, 72, 72, seed=seed, dtype=dtype) / 8 for seed in (0, 1))
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    c = random(2, 72, 72, seed=2, dtype=other)
    beta = torch.tensor([0.3, -2.0], device=DEVICE)
    scalars = {"alpha": 0.7, "beta": beta, "shift": -5.0, "transpose": transpose}
    found = kernels.product(a, b, c=c, **scalars)
    exact = 0.7 * a.double() @ b.double() - 3.5 * a.double()
    exact = exact + beta[:, None, None] * c.double()
    expected = REFERENCE.product(a, b, c=c, **scalars)
    assert_as_good(found, expected, exact.mT if transpose else exact)
    for backend in (kernels, REFERENCE):
        multiple = backend.product(a, b, c=c, **scalars | {"beta": Multiple(beta / 4, 4.0)})
        assert torch.equal(multiple, backend.product(a, b, c=c, **scalars))


def test_multiples_are_multiplied_where_they_are_read():
    x = random(3, 40, 56, dtype=torch.float16) / 8
    values = torch.tensor([0.5, 2.0, -1.0], device=DEVICE)
    multiple = 0.5 * Multiple(values * 4) / 2.0  # powers of two: no rounding
    for kernels in (TritonKernels(), REFERENCE):
        gram = kernels.gram(x, alpha=multiple)
        assert torch.equal(gram, kernels.gram(x, alpha=values))
        for name in ("alpha", "beta", "gamma"):
            given = {"alpha": 0.5, "beta": 2.0, "gamma": 0.25, name: multiple}
            plain = given | {name: values}
            found = kernels.symmetric(gram, gram, c=gram, **given)
            assert torch.equal(found, kernels.symmetric(gram, gram, c=gram, **plain)), name
            found = combine(kernels, gram, gram, **given)
            assert torch.equal(found, combine(kernels, gram, gram, **plain)), name
    square = multiple * multiple
    assert torch.equal(square.tensor(), values * values)


@pytest.mark.parametrize("descriptors", [False, True])
def test_scalars_may_differ_by_matrix(descriptors):
    kernels = kernels_of(descriptors)
    x = random(3, 40, 56, dtype=torch.float16) / 8
    gram = kernels.gram(x)
    values = torch.tensor([0.5, 2.0, -1.0], device=DEVICE)
    together = kernels.symmetric(gram, gram, alpha=values, c=gram, beta=values, gamma=values)
    product = kernels.product(gram, x, alpha=values, c=x, beta=values)
    for index, value in enumerate(values.tolist()):
        one = gram[index : index + 1]
        alone = kernels.symmetric(one, one, alpha=value, c=one, beta=value, gamma=value)
        assert torch.equal(together[index], alone[0])
        one_x = x[index : index + 1]
        alone = kernels.product(one, one_x, alpha=value, c=one_x, beta=value)
        assert torch.equal(product[index], alone[0])


@pytest.mark.parametrize("descriptors", [False, True])
def test_every_memory_layout_gives_the_same_bits(descriptors):
    kernels = kernels_of(descriptors)
    x = random(2, 40, 72, dtype=torch.float16) / 8
    transposed = x.mT.contiguous().mT
    sliced = torch.zeros(2, 50, 90, dtype=x.dtype, device=DEVICE)[:, 3:43, 7:79].copy_(x)
    expanded = x[:1].expand(2, -1, -1)
    gram = kernels.gram(x)
    product = kernels.product(gram, x, c=x, beta=2.0)
    for view in (transposed, sliced):
        assert torch.equal(kernels.gram(view), gram)
        assert torch.equal(kernels.product(gram.mT, view, c=view, beta=2.0), product)
        assert torch.equal(kernels.symmetric(view, view.mT), gram)
    assert torch.equal(kernels.gram(expanded)[1], gram[0])
    turned = kernels.product(gram, x, c=x, beta=2.0, transpose=True)
    assert turned.is_contiguous()
    assert torch.equal(turned, product.mT)
    out = torch.full_like(product, torch.nan)
    assert kernels.product(gram, x, c=x, beta=2.0, out=out) is out
    assert torch.equal(out, product)


def test_all_configurations_agree_bitwise():
    x = random(1, 72, 100, dtype=torch.float16) / 8
    if not CUDA:
        x = (x * 16).round() / 16  # NumPy sums blocks in an order of its own: make sums exact
    results = []
    for config in (TILES, WIDE, OTHER):
        for descriptors in (False, True):
            kernels = kernels_of(descriptors, config)
            gram = kernels.gram(x)
            result = kernels.symmetric(x, x.mT, alpha=0.3, c=gram, beta=0.7, gamma=0.1)
            results.append((gram, result, kernels.product(gram.round(), x, c=x, beta=0.5)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_matrix_does_not_depend_on_its_batch():
    kernels = TritonKernels(config=WIDE)
    x = random(33, 34, 40, dtype=torch.bfloat16)
    gram = kernels.gram(x)
    normalized, norms = kernels.normalize(x, dtype=torch.float16, transpose=False)
    for index in (0, 17, 32):
        one = x[index : index + 1]
        assert torch.equal(kernels.gram(one)[0], gram[index])
        alone, norm = kernels.normalize(one, dtype=torch.float16, transpose=False)
        assert torch.equal(alone[0], normalized[index])
        assert norm[0] == norms[index]


@pytest.mark.parametrize("descriptors", [False, True])
def test_nan_stays_in_its_matrix(descriptors):
    kernels = kernels_of(descriptors)
    x = random(3, 33, 48, dtype=torch.float16) / 8
    clean = kernels.gram(x), kernels.product(kernels.gram(x), x)
    spoilt = x.clone()
    spoilt[1, 5, 7] = torch.nan
    gram = kernels.gram(spoilt)
    for result, expected in zip((gram, kernels.product(gram, spoilt)), clean, strict=True):
        assert result[1].isnan().any()
        assert torch.equal(result[::2], expected[::2])


def test_column_scale_is_rounded_into_the_first_factor():
    kernels = TritonKernels(config=TILES)
    x = random(2, 33, 50, dtype=torch.float16)
    a, scale = kernels.gram(x), torch.rand(2, 33, device=DEVICE)
    result = kernels.product(a, x, column_scale=scale, transpose=True, dtype=torch.bfloat16)
    expected = kernels.product((a * scale[:, None]).half(), x, dtype=torch.bfloat16).mT
    assert torch.equal(result, expected)


@pytest.mark.parametrize("n", [40, 150])
@pytest.mark.parametrize("each", [False, True])
def test_combine_is_rounded_once(each, n):
    kernels = TritonKernels()
    a, b = (random(3, n, n, seed=seed, dtype=torch.float16) for seed in (0, 1))
    a, b = a.tril() + a.tril(-1).mT, (b.tril() + b.tril(-1).mT).mT
    scalars = [torch.tensor([s, -s, 2 * s], device=DEVICE) if each else s for s in (0.3, 0.7, 5.0)]
    result = kernels.combine(a, b, alpha=scalars[0], beta=scalars[1], gamma=scalars[2])
    x, y, z = (s.double()[:, None, None] if each else s for s in scalars)
    exact = x * a.double() + y * b.double() + z * torch.eye(n, device=DEVICE)
    assert_as_good(result, exact.half(), exact)
    assert torch.equal(result, result.mT)
    compiled = torch.compile(kernels.combine, fullgraph=True, backend="aot_eager")
    again = compiled(a, b, alpha=scalars[0], beta=scalars[1], gamma=scalars[2])
    assert torch.equal(again, result)
    # In place, and of the lower triangle alone.
    spoilt = a + torch.full_like(a, torch.nan).triu(1).nan_to_num(7.0)
    kernels.combine(
        spoilt, b.tril(), alpha=scalars[0], beta=scalars[1], gamma=scalars[2], out=spoilt
    )
    assert torch.equal(spoilt, result)


def test_the_upper_triangle_of_c_is_not_read():
    kernels = TritonKernels(config=TILES)
    a = kernels.gram(random(1, 40, 40, dtype=torch.float16) / 8)
    poisoned = a + torch.full_like(a, torch.nan).triu(1).nan_to_num(0.0)
    poisoned[:, 0, 39] = torch.nan
    expected = kernels.symmetric(a, a, c=a, beta=1.0)
    assert torch.equal(kernels.symmetric(a, a, c=poisoned, beta=1.0), expected)


@pytest.mark.parametrize("n", [64, 100, 256, 300])
def test_squares_on_the_diagonal_are_mirrored_as_torch_does_it(n):
    for rows in (True, False):
        matrix = random(2, n, n, dtype=torch.float16)
        matrix = matrix if rows else matrix.mT
        expected = matrix.clone()
        mirror_diagonal_blocks(expected, 128)
        launch_mirror(matrix, 128)
        assert torch.equal(matrix, expected)


@pytest.mark.parametrize("shape", [(3, 20, 33), (1, 182, 200)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_normalize_takes_every_finite_scale(shape, transpose, source):
    kernels = TritonKernels()
    sizes = (1e-42, 1e-30, 3e37) if source == torch.float32 else (1.0, 1e37)
    for size in sizes:
        x = (random(*shape) * size).to(source)
        result, norms = kernels.normalize(x, dtype=torch.float16, transpose=transpose, scale=4.0)
        exact, _ = REFERENCE.normalize(
            x.double(), dtype=torch.float64, transpose=transpose, scale=4.0
        )
        rounded = exact.half()
        assert result.is_contiguous()
        assert_as_good(result, rounded, exact)
        true_norms = torch.linalg.vector_norm(x.double(), dim=(1, 2))
        if size < 1e37:
            assert torch.allclose(norms.double(), true_norms, rtol=1e-5, atol=2e-45)


@pytest.mark.parametrize("shape", [(3, 20, 33), (2, 182, 200)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_inverse_norms_take_every_scale_and_layout(shape, source):
    kernels = TritonKernels()
    for size in (1.0,) if source == torch.float16 else (1e-30, 1.0, 1e30):
        x = (random(*shape) * size).to(source)
        x[-1] = 0
        exact = 3.0 / torch.linalg.vector_norm(x.double(), dim=(1, 2))
        exact[-1] = 0
        wide = torch.zeros(shape[0], 200, 300, dtype=source, device=DEVICE)
        wide = wide[:, : shape[1], : shape[2]].copy_(x)
        for view in (x, x.mT.contiguous().mT, wide):
            for backend in (kernels, REFERENCE):
                found = backend.inverse_norms(view, scale=3.0)
                assert torch.allclose(found.double(), exact.to(found.device), rtol=1e-5, atol=0)
    x[0, 1, 2] = torch.nan
    assert kernels.inverse_norms(x).isnan().tolist() == [True] + [False] * (shape[0] - 1)


@pytest.mark.parametrize("shape", [(2, 130, 200), (3, 64, 33), (1, 200, 96)])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_a_sketch_takes_every_scale_and_layout(shape, source):
    kernels = TritonKernels()
    batch, n, m = shape
    signs = (random(1, 64, n).sign() / n**0.5).to(source)
    for size in (1.0, 3e4 / 5) if source == torch.float16 else (1e-30, 1.0, 1e30):
        x = (random(*shape).clamp(-5, 5) * size).to(source)
        x[-1] = 0
        wide = torch.zeros(batch, 200, 304, dtype=source, device=DEVICE)
        wide = wide[:, :n, :m].copy_(x)
        norms = torch.linalg.vector_norm(x.double(), dim=(1, 2))
        exact = torch.where(norms == 0, 0, 200.0 / norms)
        expected = exact[:, None, None] * (signs.double() @ x.double())
        for view in (x, x.mT.contiguous().mT, wide):
            for backend in (kernels, REFERENCE):
                found, inverse = backend.sketch(signs, view, scale=200.0)
                assert (found.dtype, found.shape) == (source, (batch, 64, m))
                assert torch.allclose(inverse.double(), exact, rtol=1e-5, atol=0)
                error = (found.double() - expected).abs().max()
                assert error <= 2 * torch.finfo(source).eps * expected.abs().max()
    clean, _ = kernels.sketch(signs, x)
    x[0, 1, 2] = torch.nan
    found, inverse = kernels.sketch(signs, x)
    assert inverse.isnan().tolist() == [True] + [False] * (batch - 1)
    assert torch.equal(found[1:], clean[1:])


def test_normalize_isolates_zeros_and_nans():
    kernels = TritonKernels()
    for shape in ((3, 20, 33), (3, 182, 200)):
        x = random(*shape)
        clean, _ = kernels.normalize(x, dtype=torch.float16, transpose=False)
        x[0] = 0
        x[1, 3, 5] = torch.nan
        result, norms = kernels.normalize(x, dtype=torch.float16, transpose=False)
        assert (result[0] == 0).all()
        assert norms[0] == 0
        assert result[1].isnan().any()
        assert torch.equal(result[2], clean[2])


def test_normalize_takes_views_and_scales_by_matrix():
    kernels = TritonKernels()
    x = random(2, 20, 33)
    scale = torch.tensor([1.0, 3.0], device=DEVICE)
    result, _ = kernels.normalize(x, dtype=torch.float32, transpose=False, scale=scale)
    norms = torch.linalg.vector_norm(result.double(), dim=(1, 2)).cpu()
    assert torch.allclose(norms, torch.tensor([1.0, 3.0], dtype=torch.float64))
    wide = torch.zeros(2, 25, 40, device=DEVICE)[:, :20, :33].copy_(x)
    for view in (x.mT.contiguous().mT, wide):
        again, _ = kernels.normalize(view, dtype=torch.float32, transpose=False, scale=scale)
        assert torch.allclose(again, result, rtol=1e-6)
        turned, _ = kernels.normalize(view, dtype=torch.float32, transpose=True, scale=scale)
        assert torch.allclose(turned.mT, result, rtol=1e-6)


ROWS = ((8.3, -24.1, 17.5), (4.04, -2.95, 0.545), (3.55, -6.70, 6.058, -2.3389, 0.3189))


@pytest.mark.parametrize("steps", [slice(0, 1), slice(0, 3), slice(1, 3)])
@pytest.mark.parametrize(("n", "m"), [(5, 9), (33, 100), (64, 64)])
def test_gram_space_does_what_separate_products_do(n, m, steps):
    x = random(2, n, m, dtype=torch.float16)
    x /= x.float().norm(dim=(1, 2), keepdim=True)
    kernels = TritonKernels()
    rows = ROWS[steps]
    result, shift = kernels.gram_space(x, rows, alpha=2.0, scale=0.5)
    separate, same = run_steps(REFERENCE, REFERENCE.gram(x, alpha=2.0), rows, 0.5)
    exact, _ = run_steps(REFERENCE, REFERENCE.gram(x.double(), alpha=2.0), rows, 0.5)
    assert shift == same
    assert torch.equal(result, result.mT)
    # Roundings are correlated over few steps: three times torch's own error bounds them.
    assert error(result, exact) <= 3 * error(separate, exact) + 1e-6


def test_gram_space_refuses_what_does_not_fit():
    kernels = TritonKernels()
    assert kernels.supports_gram_space(128, torch.float16)
    with pytest.raises(ValueError, match="n=129"):
        kernels.gram_space(torch.zeros(1, 129, 200, dtype=torch.float16), ROWS)
    with pytest.raises(ValueError, match="degree"):
        kernels.gram_space(torch.zeros(1, 4, 8, dtype=torch.float16), [(1.0, 2.0, 3.0, 4.0)])


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_a_float64_result_is_computed_in_fp32(dtype):
    kernels = TritonKernels()
    a, x = random(2, 40, 40, dtype=dtype) / 8, random(2, 40, 72, seed=1, dtype=dtype)
    options = {"alpha": 0.7, "c": x, "beta": 2.0, "transpose": True}
    expected = kernels.product(a, x, **options, dtype=torch.float32).double()
    assert torch.equal(kernels.product(a, x, **options, dtype=torch.float64), expected)
    out = torch.full_like(expected, torch.nan)
    assert kernels.product(a, x, **options, out=out) is out
    assert torch.equal(out, expected)
    compiled = torch.compile(kernels.product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, x, **options, dtype=torch.float64), expected)
    out.fill_(torch.nan)
    compiled(a, x, **options, out=out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 24, 40), (40, 24)])
def test_float64_inputs_are_taken_in_every_iteration_dtype(method, shape):
    x = random(*shape).double()
    for dtype in (*HALF, torch.float32, None):
        result = orthogonalize(x, method=method, dtype=dtype, backend="triton")
        assert result.dtype == torch.float64
        expected = orthogonalize(x, method=method, dtype=dtype, backend="torch")
        iterated = dtype or (torch.float16 if CUDA else torch.float32)
        bound = {torch.bfloat16: 0.1, torch.float16: 2e-2, torch.float32: 1e-3}[iterated]
        assert error(result, expected) < bound
    if CUDA:
        assert orthogonalize(x, method=method).dtype == torch.float64


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match=r"torch\.float64"):
        TritonKernels().gram(torch.zeros(1, 4, 4, dtype=torch.float64))


def test_empty_batches_launch_nothing():
    kernels = TritonKernels()
    x = torch.zeros(0, 4, 8, dtype=torch.float16, device=DEVICE)
    gram = kernels.gram(x)
    assert gram.shape == (0, 4, 4)
    assert kernels.product(gram, x).shape == x.shape
    assert kernels.normalize(x, dtype=torch.float16, transpose=True)[0].shape == (0, 8, 4)
    assert kernels.gram_space(x, ROWS)[0].shape == (0, 4, 4)


@triton.jit
def list_tiles(rows, cols, num_blocks, GROUP: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    t = tl.arange(0, SIZE)
    if WIDE:
        row, col = triangle_wide(t, num_blocks)
    else:
        row, col = triangle_tile(t, num_blocks, GROUP)
    tl.store(rows + t, row)
    tl.store(cols + t, col)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 8, 9, 16, 33, 61])
def test_tile_orders_cover_the_lower_triangle_once(num_blocks):
    lower = {(i, j) for i in range(num_blocks) for j in range(i + 1)}
    size = 2048
    rows, cols = (torch.empty(size, dtype=torch.int32, device=DEVICE) for _ in range(2))
    list_tiles[(1,)](rows, cols, num_blocks, GROUP=8, WIDE=False, SIZE=size)
    found = list(zip(rows.tolist(), cols.tolist(), strict=True))[: len(lower)]
    assert len(found) == len(lower)
    assert set(found) == lower
    list_tiles[(1,)](rows, cols, num_blocks, GROUP=8, WIDE=True, SIZE=size)
    count = sum(row // 2 + 1 for row in range(num_blocks))
    found = list(zip(rows.tolist(), cols.tolist(), strict=True))[:count]
    covered = [(i, 2 * j + offset) for i, j in found for offset in (0, 1)]
    beyond = [(i, i + 1) for i in range(0, num_blocks, 2)]
    assert len(covered) == len(lower) + len(beyond)
    assert set(covered) == {*lower, *beyond}


def test_torch_compile_sees_one_operator_per_product():
    kernels = TritonKernels()
    x = random(2, 24, 40, dtype=torch.float16)
    scale = torch.rand(2, 24, device=DEVICE)

    def function(x, scale):
        x, norms = kernels.normalize(x, dtype=torch.float16, transpose=False, scale=4.0)
        gram = kernels.gram(x, alpha=Multiple(norms, 0.01))
        gram = kernels.symmetric(gram, gram, c=gram, beta=0.5, gamma=1.0)
        factor, _ = kernels.gram_space(x, ROWS[:2], alpha=1 / 16)
        gram = kernels.product(gram, gram, alpha=kernels.inverse_norms(x), shift=2.0)
        return kernels.product(gram + factor, x, column_scale=scale, transpose=True)

    expected = function(x, scale)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, scale), expected)


def test_torch_compile_sees_a_sketch_as_one_operator_where_descriptors_are_used():
    kernels = TritonKernels(descriptors=None if CUDA else True)
    signs, x = random(1, 64, 128).half(), random(2, 128, 72).half()
    compiled = torch.compile(kernels.sketch, fullgraph=True, backend="aot_eager")
    expected = kernels.sketch(signs, x, scale=3.0)
    for found, wanted in zip(compiled(signs, x, scale=3.0), expected, strict=True):
        assert torch.equal(found, wanted)


def test_importing_the_package_imports_no_triton():
    code = "import sys, flashns_dist.orthogonalize; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def all_candidates(product):
    """Backends forced to each candidate, with descriptors where there can be any, and without."""
    from flashns_dist.orthogonalize.kernels import triton_configs

    few = ("FLAT", "NARROW", "SHALLOW") if product == "PRODUCT" else ()
    for kind in ("TMA", *few):
        for config in getattr(triton_configs, f"{product}_{kind}"):
            yield TritonKernels(config=config)
    for config in getattr(triton_configs, f"{product}_POINTER"):
        yield TritonKernels(config=config, descriptors=False)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
class TestOnDevice:
    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(
        ("batch", "n", "m"),
        [
            *[(300, 64, 200), (24, 768, 768), (3, 1000, 1504), (1, 2048, 5000)],
            # Strides that descriptors cannot express, and sizes beside those of the tiles.
            *[(5, 129, 131), (3, 127, 65), (2, 257, 255), (1, 63, 1), (2, 65, 97), (1, 300, 777)],
        ],
    )
    def test_every_candidate_gives_the_same_correct_bits(self, batch, n, m, dtype):
        x = (random(batch, n, m) / m**0.5).to(dtype)
        exact = x.double() @ x.double().mT
        expected = None
        for kernels in all_candidates("SYMMETRIC"):
            gram = kernels.gram(x)
            square = kernels.symmetric(gram, gram, alpha=0.3, c=gram, beta=0.7, gamma=0.1)
            assert torch.equal(gram, gram.mT)
            assert torch.equal(square, square.mT)
            assert_as_good(gram, REFERENCE.gram(x), exact)
            expected = expected or (gram, square)
            assert torch.equal(gram, expected[0])
            assert torch.equal(square, expected[1])
        first = None
        for kernels in all_candidates("PRODUCT"):
            product = kernels.product(expected[0], x, c=x, beta=0.5)
            turned = kernels.product(expected[0], x, c=x, beta=0.5, transpose=True)
            first = product if first is None else first
            assert torch.equal(product, first)
            assert torch.equal(turned.mT, first)

    def test_products_run_in_a_cuda_graph(self):
        kernels = TritonKernels()
        x = random(4, 256, 512, dtype=torch.float16) / 16

        def step():
            normalized, _ = kernels.normalize(x, dtype=torch.float16, transpose=False)
            gram = kernels.gram(normalized)
            return kernels.product(kernels.symmetric(gram, gram), normalized, transpose=True)

        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, expected)
