"""The public function: shapes, dtypes, scales, batches, and what it refuses."""

import re
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flashns_dist.orthogonalize import METHODS, POLAR_EXPRESS, Coefficients, orthogonalize

ALL_METHODS = ("auto", *METHODS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_dtype_come_back_and_the_input_stays(method, dtype):
    for shape in ((24, 40), (40, 24), (3, 16, 20), (2, 2, 20, 16), (1, 1), (1, 9), (9, 1)):
        x = gaussian(*shape, dtype=dtype)
        before = x.clone()
        result = orthogonalize(x, method=method)
        assert result.shape == x.shape
        assert result.dtype == dtype
        assert torch.equal(x, before)
        assert result.data_ptr() != x.data_ptr()
        assert torch.isfinite(result).all()
        assert result.float().norm() > 0.5


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 5, 0), (0, 0), (2, 0, 3, 4)])
def test_empty_inputs_give_empty_outputs(method, shape):
    assert orthogonalize(torch.empty(shape), method=method).shape == shape


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_matrix_gives_zeros_beside_others(method, dtype):
    x = gaussian(3, 20, 30)
    x[1] = 0
    result = orthogonalize(x, method=method, dtype=dtype)
    assert torch.equal(result[1], torch.zeros(20, 30))
    assert (result[[0, 2]].norm(dim=(-2, -1)) > 3).all()


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_entry_stays_in_its_own_matrix(method, bad):
    x = gaussian(3, 20, 30)
    x[1, 4, 5] = bad
    result = orthogonalize(x, method=method, dtype=torch.float16)
    assert not torch.isfinite(result[1]).all()
    for index in (0, 2):
        assert torch.equal(result[index], orthogonalize(x[index], method=method, dtype=torch.half))


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_scale_of_the_input_does_not_matter(method, dtype):
    x = gaussian(32, 64)
    expected = orthogonalize(x, method=method, dtype=dtype)
    # A power of two changes no mantissa, so that even the rounding is the same.
    for exponent in (-100, -60, -20, 20, 60, 100):
        scaled = orthogonalize(x * 2.0**exponent, method=method, dtype=dtype)
        assert torch.equal(scaled, expected), exponent


@pytest.mark.parametrize("method", ALL_METHODS)
def test_any_scale_from_1e_minus_30_to_1e30_works(method):
    x = gaussian(32, 64)
    expected = orthogonalize(x, method=method)
    for scale in (1e-30, 1e-8, 1e8, 1e30):
        scaled = orthogonalize(x * scale, method=method)
        # The input is rounded anew, and no method lifts singular values by more than 1000.
        assert (scaled - expected).abs().max() < 1000 * torch.finfo(torch.float32).eps, scale


def test_float64_inputs_beyond_the_range_of_float32_work():
    x = gaussian(8, 12, dtype=torch.float64)
    expected = orthogonalize(x)
    for scale in (2.0**-500, 2.0**500):
        assert torch.equal(orthogonalize(x * scale), expected)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_matrix_does_not_depend_on_its_batch(method):
    for shape in ((5, 48, 48), (5, 33, 70), (5, 70, 33), (5, 128, 256)):
        x = gaussian(*shape)
        for dtype in (torch.float32, torch.float16):
            together = orthogonalize(x, method=method, dtype=dtype)
            for part in (slice(0, 2), slice(3, 5), slice(1, 2)):
                alone = orthogonalize(x[part], method=method, dtype=dtype)
                assert torch.equal(alone, together[part])
            assert torch.equal(orthogonalize(x[4], method=method, dtype=dtype), together[4])


def test_no_batch_exceeds_cudas_grids(monkeypatch):
    sizes = []

    def iteration(kernels, x, *_, **options):
        sizes.append(len(x))
        return x.clone()

    monkeypatch.setitem(METHODS, "gram", replace(METHODS["gram"], iteration=iteration))
    x = torch.empty(2, 35000, 2, 3, device="meta")
    assert orthogonalize(x, method="gram").shape == x.shape
    assert sizes == [65535, 4465]


@pytest.mark.parametrize("method", ALL_METHODS)
def test_strides_do_not_matter(method):
    x = gaussian(3, 24, 40)
    expected = orthogonalize(x, method=method)
    transposed = x.mT.contiguous().mT
    padded = torch.full((3, 50, 90), 7.0)[:, 1:49:2, 5:85:2]
    padded.copy_(x)
    permuted = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for view in (transposed, padded, permuted):
        assert not view.is_contiguous()
        assert torch.equal(orthogonalize(view, method=method), expected)
    expanded = x[:1].expand(3, 24, 40)
    assert torch.equal(orthogonalize(expanded, method=method)[2], expected[0])


@pytest.mark.parametrize("method", [name for name in ALL_METHODS if name != "aol"])
def test_a_tall_matrix_gives_the_transpose_of_the_wide_one(method):
    x = gaussian(2, 24, 40)
    tall = orthogonalize(x.mT.contiguous(), method=method)
    assert torch.allclose(tall.mT, orthogonalize(x, method=method), atol=1e-5)


@pytest.mark.parametrize("method", ALL_METHODS)
def test_autocast_around_it_changes_nothing(method):
    x = gaussian(2, 24, 40)

    def call(t):
        return [orthogonalize(t, method=method, dtype=dtype) for dtype in DTYPES]

    expected = call(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(x) + torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    for result, right in zip(found, expected * 2, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fake_tensors_give_fake_ones_and_leave_nothing_behind(method, dtype):
    """As where the memory of a training step is estimated before it is run."""
    orthogonalize(gaussian(8, 9), method=method)  # searches for restarts, with data
    for _ in range(2):
        with FakeTensorMode():
            fake = orthogonalize(torch.empty(2, 70, 101, dtype=dtype), method=method)
        assert isinstance(fake, FakeTensor)
        assert fake.shape == (2, 70, 101)
        result = orthogonalize(gaussian(2, 70, 101, dtype=dtype), method=method)
        assert type(result) is torch.Tensor


def test_no_gradient_flows_through():
    x = gaussian(8, 12).requires_grad_()
    assert not orthogonalize(x).requires_grad


def test_rows_and_names_mean_the_same_as_objects():
    x = gaussian(16, 32)
    expected = orthogonalize(x, method="gram", coefficients=POLAR_EXPRESS)
    assert torch.equal(orthogonalize(x, method="gram", coefficients="polar_express"), expected)
    rows = [list(row) for row in POLAR_EXPRESS.rows]
    assert torch.equal(orthogonalize(x, method="gram", coefficients=rows), expected)
    other = orthogonalize(x, method="gram", coefficients="keller_jordan")
    assert not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(3)}, ["(3,)", "two dims"]),
        ({"x": torch.zeros(3, 3, dtype=torch.int32)}, ["int32", "float16"]),
        ({"x": torch.zeros(3, 3, dtype=torch.complex64)}, ["complex64"]),
        ({"dtype": torch.int8}, ["dtype", "int8"]),
        ({"method": "svd"}, ["method='svd'", "standard"]),
        ({"coefficients": "quartic"}, ["coefficients='quartic'", "polar_express"]),
        ({"coefficients": 3}, ["coefficients=3"]),
        ({"coefficients": [(1.0, 2.0, 3.0, 4.0)]}, ["row 0", "4 numbers"]),
        ({"coefficients": [(1.0, float("nan"), 1.0)]}, ["row 0", "finite"]),
        ({"coefficients": []}, ["no rows"]),
        ({"backend": "tpu"}, ["backend='tpu'", "torch"]),
        ({"method": "gram", "coefficients": "aol_flash"}, ["aol_flash", "gram", "frobenius"]),
        ({"method": "aol", "coefficients": "you"}, ["you", "aol"]),
    ],
)
def test_a_wrong_argument_is_named_with_the_fix(arguments, words):
    x = arguments.pop("x", torch.zeros(3, 4))
    with pytest.raises(ValueError) as caught:
        orthogonalize(x, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_argument_is_refused_for_empty_inputs_too():
    with pytest.raises(ValueError, match="method"):
        orthogonalize(torch.empty(0, 3, 4), method="svd")


def test_a_backend_that_is_not_installed_says_how_to_get_it(monkeypatch):
    from flashns_dist.orthogonalize import kernels

    missing = ("quack_backend_missing", "QuackKernels", "pip install 'flashns-dist[quack]'")
    monkeypatch.setitem(kernels._BACKENDS, "quack", missing)
    kernels.load_backend.cache_clear()
    with pytest.raises(ImportError, match=r"flashns-dist\[quack\]"):
        orthogonalize(torch.ones(3, 4), backend="quack")
    kernels.load_backend.cache_clear()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "aol"])
def test_user_coefficients_of_every_degree_run(method):
    if "frobenius" not in METHODS[method].normalizations:
        pytest.skip("this method has its own normalization")
    x = gaussian(16, 24)
    taylor_3 = (1.5, -0.5)
    taylor_9 = (2.4609375, -3.28125, 2.953125, -1.40625, 0.2734375)
    mixed = Coefficients("mixed", ((3.0, -3.2, 1.2), taylor_3, *(taylor_9,) * 4))
    result = orthogonalize(x, method=method, coefficients=mixed, dtype=torch.float64)
    identity = torch.eye(16)
    assert (result @ result.mT - identity).abs().max() < 1e-5


@pytest.mark.parametrize("method", ALL_METHODS)
def test_torch_compile_takes_it_whole(method):
    x = gaussian(2, 24, 40).mT

    def call(t):
        return orthogonalize(2 * t, method=method) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))


@pytest.mark.parametrize(
    "coefficients",
    ["you", [(3.0, -3.2, 1.2), (1.5, -0.5, 0.0)], Coefficients("own", ((3.0, -3.2, 1.2),) * 3)],
)
def test_torch_compile_takes_all_kinds_of_coefficients(coefficients):
    x = gaussian(24, 40)

    def call(t):
        return orthogonalize(t, method="gram", coefficients=coefficients, dtype=torch.float64)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))


@pytest.mark.parametrize("coefficients", ["", [], (), [[]]])
def test_empty_coefficients_are_refused_under_torch_compile_too(coefficients):
    x = gaussian(8, 12)

    def call(t):
        return orthogonalize(t, method="gram", coefficients=coefficients)

    with pytest.raises(ValueError) as caught:
        call(x)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=re.escape(str(caught.value))):
        compiled(x)


def test_the_operator_for_torch_compile_is_well_formed():
    arguments = (gaussian(3, 8, 5), "gram", None, [], None, "", 1.0, None, None, None, "auto")
    torch.library.opcheck(torch.ops.flashns_dist.orthogonalize.default, arguments)
