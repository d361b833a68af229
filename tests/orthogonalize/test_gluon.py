"""The Gluon kernels: which tiles their programs take, and their bits on Hopper."""

import builtins
import itertools
from types import FunctionType, SimpleNamespace

import pytest
import torch

gluon_symmetric = pytest.importorskip(
    "flashns_dist.orthogonalize.kernels.gluon_symmetric",
    reason="there is no Triton, or none whose Gluon is known",
    exc_type=ImportError,
)

from flashns_dist.orthogonalize.kernels import (  # noqa: E402
    gluon_launch,
    gluon_product,
    gluon_tiles,
)
from flashns_dist.orthogonalize.kernels.gluon_launch import (  # noqa: E402
    fits_product,
    fits_symmetric,
    gluon_kernels,
)
from flashns_dist.orthogonalize.kernels.triton_backend import TritonKernels  # noqa: E402
from flashns_dist.orthogonalize.kernels.triton_configs import (  # noqa: E402
    PRODUCT_HOPPER,
    PRODUCT_TMA,
    SPECIALIZED,
    SYMMETRIC_HOPPER,
    SYMMETRIC_TMA,
    default_product,
    default_symmetric,
)
from tests.orthogonalize import gluon_simulator  # noqa: E402

KERNELS = (gluon_symmetric.symmetric_kernel, gluon_product.product_kernel)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def scheduled(programs, num_blocks, num_matrices):
    """The tiles of every program: (whether wide, matrix, block row, block column)."""
    words = SimpleNamespace(
        float32=torch.float32, int32=torch.int32, sqrt_rn=torch.sqrt, where=torch.where,
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        num_programs=lambda axis: torch.tensor(programs),
    )  # fmt: skip
    names = {"gl": words, "__builtins__": builtins}
    for name in (
        "_wide_in_order", "_wide_tile", "turns", "wide_at", "squares_at", "square_at",
    ):  # fmt: skip
        kernel = getattr(gluon_tiles, name)
        names[name] = FunctionType(kernel.fn.__code__, names, name)
    tiles = []
    for program in range(programs):
        words.program_id = lambda axis, program=program: torch.tensor(program)
        sizes = (torch.tensor(num_blocks), torch.tensor(num_matrices))
        wide, squares, doubled, start, stop = names["turns"](*sizes)
        mine = [
            (True, *map(int, names["wide_at"](torch.tensor(turn), sizes[0], 8)))
            for turn in range(program, wide, programs)
        ]
        for turn in range(start, stop, programs):
            first, last = names["squares_at"](torch.tensor(turn), wide, squares, doubled)
            for square in range(first, last):
                batch, row = names["square_at"](torch.tensor(square), sizes[0])
                mine.append((False, int(batch), int(row), int(row)))
        tiles.append(mine)
    return tiles


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 7, 8, 9, 13, 16, 21])
@pytest.mark.parametrize(("programs", "num_matrices"), [(132, 1), (132, 3), (10, 2)])
def test_programs_cover_the_lower_triangle_once_and_evenly(programs, num_matrices, num_blocks):
    tiles = scheduled(programs, num_blocks, num_matrices)
    covered = []
    for wide, batch, row, col in [tile for program in tiles for tile in program]:
        assert wide or row == col
        covered += [(batch, row, col + offset) for offset in range(1 + wide)]
    lower = [
        (b, i, j) for b in range(num_matrices) for i in range(num_blocks) for j in range(i + 1)
    ]
    assert sorted(covered) == lower
    work = [sum(1 + wide for wide, *_ in program) for program in tiles]
    assert max(work) <= min(work) + 2


def operands(batch, n, k, dtype=torch.float16, **options):
    return [
        torch.zeros(batch, *shape, dtype=dtype, **options) for shape in ((n, k), (n, k), (n, n))
    ]


def test_only_what_whole_tiles_cover_and_descriptors_reach_fits(monkeypatch):
    monkeypatch.setattr(gluon_launch, "gluon_kernels", lambda: KERNELS)

    def fits(a, b, c, out=None, capability=9):
        out = c if out is None else out
        return fits_symmetric(a, b, c, out, capability=capability)

    a, b, c = operands(2, 256, 192)
    assert fits(a, b, c)
    assert fits(a, b, None, c)
    assert fits(a.mT.contiguous().mT, b.mT.contiguous().mT, c)
    assert not fits(a, b, c, capability=10)
    assert not fits(*operands(2, 192, 192))
    assert not fits(*operands(2, 256, 160))
    assert not fits(*operands(2, 256, 64))
    assert not fits(a, b, c.float())
    assert not fits(a, b.bfloat16(), c)
    assert not fits(a, b, c.mT)
    assert not fits(a, b, None, c.mT)
    assert not fits(a, b[:1], c)
    assert not fits(a, b, c, c[:, :128])
    spread = torch.zeros(2, 300, 192, dtype=torch.float16)[:, :256]
    assert not fits(spread, b, c)
    assert fits(spread[:1], b[:1], c[:1])
    monkeypatch.setattr(gluon_launch, "gluon_kernels", lambda: None)
    assert not fits(a, b, c)


def test_descriptors_say_where_the_blocks_are(monkeypatch):
    monkeypatch.setattr(gluon_launch, "gluon_kernels", lambda: KERNELS)
    a, b, out = operands(2, 256, 192)
    launch = gluon_launch.symmetric_launch(
        a, b.mT.contiguous().mT, None, out, (1.0,) * 6, config=SPECIALIZED, num_sms=132
    )
    found = [(d.shape, d.strides, d.block_shape) for d in launch.changing[:4]]
    square = ([512, 256], [256, 1], [64, 64])
    assert found == [
        ([512, 192], [192, 1], [64, 64]),
        ([384, 256], [256, 1], [64, 128]),
        square,
        square,
    ]
    flags = [launch.constants[name] for name in ("A_SWAPPED", "B_SWAPPED", "HAS_C")]
    assert (flags, launch.fixed, launch.grid) == ([False, True, False], (256, 192, 2), (132,))
    single = gluon_launch._descriptor(a[:1, :, :128], False, 128, 64)  # rows farther apart
    assert (single.shape, single.strides) == ([256, 128], [192, 1])


def test_it_is_the_default_where_every_sm_gets_a_tile():
    def chosen(batch, n, k=None):
        return default_symmetric(SYMMETRIC_HOPPER, batch, n, k or n, 132)

    assert {chosen(4, 2048), chosen(24, 1024), chosen(64, 768, 2048), chosen(1, 4096)} == {
        SPECIALIZED
    }
    for shape in ((2, 1536), (1, 256), (1, 2048)):
        assert chosen(*shape) == default_symmetric(SYMMETRIC_TMA, *shape, shape[1], 132)


def test_whether_a_tensor_is_both_factors_decides_what_is_launched(monkeypatch):
    monkeypatch.setattr(gluon_launch, "gluon_kernels", lambda: KERNELS)
    kernels, keys = TritonKernels(), []
    monkeypatch.setattr(kernels._launches, "launch", lambda key, *_: keys.append(key))
    x, y = (torch.zeros(2, 256, 256).half() for _ in range(2))
    for left, right in ((x, x), (x, y), (x, x.mT), (x, y.mT)):
        kernels.symmetric(left, right)
    assert len(set(keys)) == 4
    a, b, out = operands(2, 256, 256)
    same = [
        gluon_launch.symmetric_launch(
            a, right, None, out, (1.0,) * 6, config=SPECIALIZED, num_sms=132
        ).constants["SAME"]
        for right in (a, b, a.mT)
    ]
    assert same == [True, False, False]


@pytest.mark.parametrize(
    "late", [(False,) * 3, (True,) * 3, (False, True, True), (True, False, False)]
)
@pytest.mark.parametrize(
    ("batch", "n", "k", "programs"),
    [(1, 32, 64, 2), (2, 64, 128, 3), (2, 96, 32, 2), (3, 96, 16, 2), (1, 160, 144, 4)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_its_source_run_in_python_computes_the_product(batch, n, k, programs, dtype, late):
    # Tiles a quarter as wide as on the device, and small integers: every sum is exact.
    def random(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(n)
    a, b, c = random(batch, n, k), random(batch, n, k), random(batch, n, n)
    scalars = [torch.randint(-2, 3, (batch,), generator=generator) / 2 for _ in range(3)]
    for same, *swapped in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (1, 1, 1)):
        left, right = (
            t.mT.contiguous().mT if turned else t for t, turned in zip((a, b), swapped, strict=True)
        )
        right = left if same else right
        for addend in (None, c):
            for alpha, beta, gamma in ((0.5, 2.0, -3.0), scalars)[: 2 - same]:
                out = torch.full((batch, n, n), torch.nan, dtype=dtype)
                gluon_simulator.simulate_symmetric(
                    gluon_symmetric, left, right, addend, out, (alpha, beta, gamma), stages=4,
                    programs=programs, late=late, swapped=swapped,
                )  # fmt: skip
                scales = [torch.as_tensor(v).view(-1, 1, 1) for v in (alpha, beta, gamma)]
                full = scales[0] * (left.float() @ right.float().mT) + scales[2] * torch.eye(n)
                full = full if addend is None else full + scales[1] * c.float()
                assert torch.equal(out, (full.tril() + full.tril(-1).mT).to(dtype))


@pytest.mark.parametrize("num_matrices", [1, 3])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 2), (8, 5), (13, 4), (17, 1)])
def test_turns_go_through_all_tiles_of_a_product(rows, cols, num_matrices):
    words = SimpleNamespace(minimum=min)
    tile_at = FunctionType(gluon_tiles.tile_at.fn.__code__, {"gl": words}, "tile_at")
    found = [tile_at(turn, rows, cols, 8) for turn in range(num_matrices * rows * cols)]
    expected = [(b, i, j) for b in range(num_matrices) for i in range(rows) for j in range(cols)]
    assert sorted(found) == expected
    if rows >= 8:  # eight tiles in a row read the same columns
        assert found[:8] == [(0, row, 0) for row in range(8)]


def test_only_products_of_whole_tiles_fit(monkeypatch):
    monkeypatch.setattr(gluon_launch, "gluon_kernels", lambda: KERNELS)

    def fits(n=256, m=512, k=192, transpose=False, shifted=False, swap=(), capability=9, **dtypes):
        shapes = {"a": (n, k), "x": (k, m), "c": (n, m), "out": (m, n) if transpose else (n, m)}
        tensors = {
            name: torch.zeros(2, *shape, dtype=dtypes.get(name, torch.float16))
            for name, shape in shapes.items()
        }
        for name in swap:
            tensors[name] = tensors[name].mT.contiguous().mT
        return fits_product(
            *tensors.values(), transpose=transpose, shifted=shifted, capability=capability
        )

    assert fits()
    assert fits(transpose=True)
    assert fits(swap=("a", "x"))
    assert fits(n=512, k=512, shifted=True)
    assert fits(c=torch.bfloat16, out=torch.bfloat16)
    assert not fits(shifted=True)  # a is added where it is as wide as the result
    assert not fits(n=512, k=512, shifted=True, swap="a")
    assert not fits(capability=10)
    assert not fits(n=192)
    assert not fits(m=384)
    assert fits(k=64)
    assert not fits(k=160)
    assert not fits(out=torch.float32)
    assert not fits(x=torch.bfloat16)
    assert not fits(swap="c")
    assert not fits(swap=("out",))
    a, x = torch.zeros(1, 256, 192).half().expand(2, -1, -1), torch.zeros(2, 192, 512).half()
    out = torch.zeros(2, 256, 512).half()
    assert not fits_product(a, x, None, out, transpose=False, shifted=False, capability=9)
    monkeypatch.setattr(gluon_launch, "gluon_kernels", lambda: None)
    assert not fits()


def test_descriptors_of_a_product_say_where_the_blocks_are(monkeypatch):
    monkeypatch.setattr(gluon_launch, "gluon_kernels", lambda: KERNELS)
    a, x = torch.zeros(2, 256, 256).half(), torch.zeros(2, 256, 512).half()
    out = torch.zeros(2, 512, 256).half()
    launch = gluon_launch.product_launch(
        a, x, None, out, (1.0,) * 5, True, config=SPECIALIZED, num_sms=132
    )
    found = [(d.shape, d.block_shape) for d in launch.changing[:5]]
    last = ([1024, 256], [64, 64])
    own = ([512, 256], [64, 64])
    assert found == [own, ([512, 512], [64, 128]), last, own, last]
    flags = [launch.constants[name] for name in ("A_SWAPPED", "B_SWAPPED", "HAS_C", "SHIFTED")]
    assert (flags, launch.fixed) == ([False, True, False, True], (256, 512, 256, 2))


def test_the_product_is_the_default_where_the_last_round_is_nearly_full():
    def chosen(batch, n, m):
        return default_product(PRODUCT_HOPPER, batch, n, m, 132)

    assert {chosen(4, 2048, 2048), chosen(24, 1024, 4096), chosen(1, 4096, 4096)} == {SPECIALIZED}
    assert chosen(1, 2048, 2048) == SPECIALIZED  # 128 tiles
    for shape in ((2, 768, 768), (2, 1536, 7168), (2, 1536, 1536)):
        assert chosen(*shape) == default_product(PRODUCT_TMA, *shape, 132)


@pytest.mark.parametrize("late", [(False,) * 3, (True,) * 3, (True, False, False)])
@pytest.mark.parametrize(
    ("batch", "n", "m", "k", "programs"),
    [
        (1, 32, 64, 32, 2),
        (2, 64, 128, 144, 3),
        (3, 96, 64, 80, 2),
        (2, 64, 64, 64, 1),
        (3, 64, 128, 16, 2),
    ],
)
def test_the_source_of_the_product_run_in_python_computes_it(batch, n, m, k, programs, late):
    def random(*shape):
        return torch.randint(-3, 4, shape, generator=generator).half()

    generator = torch.Generator().manual_seed(n)
    a, x, c = random(batch, n, k), random(batch, k, m), random(batch, n, m).bfloat16()
    each = [torch.randint(-2, 3, (batch,), generator=generator) / 2 for _ in range(2)]
    for turn, scalars in enumerate(((0.5, 2.0), each)):
        for addend in (None, c):
            shift = 3.0 if k == m and addend is not None else 0.0
            for transpose in (False, True):
                swapped = (turn and not shift, transpose)
                left = a.mT.contiguous().mT if swapped[0] else a
                right = x if swapped[1] else x.mT.contiguous().mT
                shape = (batch, m, n) if transpose else (batch, n, m)
                out = torch.full(shape, torch.nan, dtype=torch.bfloat16)
                gluon_simulator.simulate_product(
                    gluon_product, left, right, addend, out, (*scalars, shift),
                    transpose=transpose, programs=programs, late=late, swapped=swapped,
                )  # fmt: skip
                alpha, beta = (torch.as_tensor(scalar).view(-1, 1, 1) for scalar in scalars)
                full = alpha * (a.float() @ x.float())
                full = full + alpha * shift * a.float() if shift else full
                full = full if addend is None else full + beta * c.float()
                assert torch.equal(out.mT if transpose else out, full.bfloat16())


def test_a_factor_of_minus_zero_keeps_its_sign():
    # As in the other kernels: a sum of zeros is negative only if both are.
    zeros, ones = torch.zeros(1, 64, 64).half(), torch.ones(1, 64, 64).half()
    out = torch.full((1, 64, 64), torch.nan).half()
    gluon_simulator.simulate_product(
        gluon_product, zeros, zeros.mT, ones, out, (-1.0, torch.tensor([-0.0]), 0.0),
        transpose=False, programs=1, late=(False,) * 3, swapped=(False, True),
    )  # fmt: skip
    assert torch.equal(out, zeros)
    assert out.signbit().all()


@pytest.mark.gpu
@pytest.mark.skipif(
    not HOPPER or gluon_kernels() is None, reason="needs a Hopper GPU and Triton 3.6"
)
class TestOnHopper:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("batch", "n", "k"),
        [(1, 128, 128), (2, 256, 192), (3, 384, 1024), (40, 640, 320), (7, 1152, 448),
         (5, 2048, 512), (150, 768, 256)],
    )  # fmt: skip
    def test_its_bits_are_those_of_the_other_kernels(self, batch, n, k, dtype):
        generator = torch.Generator("cuda").manual_seed(n)

        def random(*shape):
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        specialized, plain = (
            TritonKernels(config=SPECIALIZED),
            TritonKernels(config=SYMMETRIC_TMA[0]),
        )
        a, b, c = random(batch, n, k) / k**0.5, random(batch, n, k), random(batch, n, n)
        scalars = [torch.rand(batch, generator=generator, device="cuda") for _ in range(3)]
        for addend in (None, c):
            for alpha, beta, gamma in ((0.7, 0.3, -2.0), scalars):
                options = {"alpha": alpha, "c": addend, "beta": beta, "gamma": gamma}
                expected = plain.symmetric(a, b.mT, **options)
                assert torch.equal(expected, expected.mT)
                for left in (a, a.mT.contiguous().mT):
                    for right in (b.mT, b.mT.contiguous()):
                        for _ in range(3):  # the order in which programs run is not the same
                            out = torch.full_like(expected, torch.nan)
                            found = specialized.symmetric(left, right, out=out, **options)
                            assert torch.equal(found, expected)
                        settled = TritonKernels(tune=False)
                        found = settled.symmetric(left, right, **options)
                        assert torch.equal(found, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("batch", "n"), [(1, 128), (2, 384), (40, 640), (5, 2048), (60, 768)])
    def test_so_they_are_where_a_tensor_is_both_factors(self, batch, n, dtype):
        generator = torch.Generator("cuda").manual_seed(n)
        specialized, plain = (
            TritonKernels(config=SPECIALIZED),
            TritonKernels(config=SYMMETRIC_TMA[0]),
        )
        x = torch.randn(batch, n, n, generator=generator, device="cuda").to(dtype)
        a = torch.tril(x) + torch.tril(x, -1).mT
        for left, c in itertools.product((a, a.mT), (None, x)):
            options = {"alpha": 1 / n, "c": c, "beta": 0.3, "gamma": -2.0}
            expected = plain.symmetric(a, a.clone(), **options)
            for _ in range(3):
                out = torch.full_like(expected, torch.nan)
                assert torch.equal(specialized.symmetric(left, left, out=out, **options), expected)
            assert torch.equal(plain.symmetric(left, left, **options), expected)
        for tall in (x, x.mT):
            expected = plain.symmetric(tall, tall.mT.clone())
            for _ in range(3):
                assert torch.equal(specialized.gram(tall), expected)
                found = specialized.symmetric(tall, tall.mT)
                assert torch.equal(found, expected)
            other = tall.clone()
            assert torch.equal(specialized.symmetric(tall, other.mT), expected)
            other.neg_()
            assert torch.equal(specialized.symmetric(tall, other.mT), -expected)

    def test_a_nan_stays_in_its_matrix(self):
        kernels = TritonKernels(config=SPECIALIZED)
        x = torch.randn(5, 256, 256, device="cuda").half()
        clean = kernels.gram(x)
        x[2, 130, 7] = torch.nan
        found = kernels.gram(x)
        assert found[2].isnan().any()
        others = [0, 1, 3, 4]
        assert torch.equal(found[others], clean[others])

    def test_only_the_lower_triangle_of_the_addend_counts(self):
        kernels = TritonKernels(config=SPECIALIZED)
        x = torch.randn(3, 384, 384, device="cuda").half() / 20
        c = kernels.gram(x)
        expected = kernels.symmetric(c, c, c=c, beta=0.5)
        upper = torch.triu(torch.full_like(c, torch.nan), 1)
        assert torch.equal(kernels.symmetric(c, c, c=torch.tril(c) + upper, beta=0.5), expected)

    def test_what_does_not_fit_is_refused_if_forced_and_otherwise_goes_elsewhere(self):
        x = torch.randn(2, 200, 256, device="cuda").half()
        with pytest.raises(ValueError, match="does not take"):
            TritonKernels(config=SPECIALIZED).gram(x)
        assert TritonKernels().gram(x).shape == (2, 200, 200)

    def test_it_runs_in_a_cuda_graph_and_launches_are_repeated(self):
        kernels = TritonKernels(config=SPECIALIZED)
        x = torch.randn(4, 512, 512, device="cuda").half() / 20
        expected = kernels.symmetric(x, x.mT, c=x, beta=0.5)
        for launch in kernels._launches._known.values():
            assert launch is not None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = kernels.symmetric(x, x.mT, c=x, beta=0.5)
        for _ in range(3):
            result.fill_(torch.nan)
            graph.replay()
            assert torch.equal(result, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("batch", "n", "m", "k"),
        [(1, 128, 256, 128), (2, 256, 256, 256), (3, 384, 1024, 320), (40, 640, 512, 640),
         (5, 2048, 2048, 2048), (70, 768, 768, 256), (30, 768, 1024, 64)],
    )  # fmt: skip
    def test_the_bits_of_its_products_are_those_of_the_other_kernels(self, batch, n, m, k, dtype):
        generator = torch.Generator("cuda").manual_seed(n)

        def random(*shape):
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        specialized, plain = TritonKernels(config=SPECIALIZED), TritonKernels(config=PRODUCT_TMA[0])
        a, x, c = random(batch, n, k) / k**0.5, random(batch, k, m), random(batch, n, m)
        scalars = [torch.rand(batch, generator=generator, device="cuda") for _ in range(2)]
        shifts = (0.0, 1.5) if k == m else (0.0,)
        choices = itertools.product((None, c), ((0.7, 0.3), scalars), shifts, (False, True))
        for addend, (alpha, beta), shift, transpose in choices:
            options = {"alpha": alpha, "c": addend, "beta": beta, "shift": shift}
            options |= {"transpose": transpose, "dtype": torch.bfloat16}
            expected = plain.product(a, x, **options)
            lefts = (a,) if shift else (a, a.mT.contiguous().mT)
            for left, right in itertools.product(lefts, (x, x.mT.contiguous().mT)):
                for _ in range(3):
                    out = torch.full_like(expected, torch.nan)
                    found = specialized.product(left, right, out=out, **options)
                    assert torch.equal(found, expected)
            found = TritonKernels(tune=False).product(a, x, **options)
            assert torch.equal(found, expected)
