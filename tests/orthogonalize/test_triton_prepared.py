"""Repeated launches pass what Triton's own driver would pass; with a launcher that only notes."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
driver = pytest.importorskip("triton.backends.nvidia.driver")

from flashns_dist.orthogonalize.kernels import gluon_launch  # noqa: E402
from flashns_dist.orthogonalize.kernels import triton_prepared as prepared  # noqa: E402
from flashns_dist.orthogonalize.kernels.triton_configs import SPECIALIZED, TileConfig  # noqa: E402
from flashns_dist.orthogonalize.kernels.triton_launch import (  # noqa: E402
    product_launch,
    symmetric_launch,
)

gluon_symmetric = pytest.importorskip(
    "flashns_dist.orthogonalize.kernels.gluon_symmetric",
    reason="a Triton whose Gluon is not known",
    exc_type=ImportError,
)

pytestmark = pytest.mark.skipif(
    prepared.unfamiliar() is not None, reason=f"ordinary launches only: {prepared.unfamiliar()}"
)
CONFIG = TileConfig(128, 128, 64, 4, 3)
STREAM, FUNCTION = 77, 1234


@pytest.fixture(autouse=True)
def active(monkeypatch):
    """A driver whose encoded descriptors say what they were encoded from."""
    fake = SimpleNamespace(
        utils=SimpleNamespace(fill_tma_descriptor=lambda *facts: ("map", *map(_hashable, facts))),
        get_current_stream=lambda device: STREAM + device,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(gluon_launch, "gluon_kernels", lambda: (gluon_symmetric.symmetric_kernel,))


def _hashable(fact):
    return tuple(fact) if isinstance(fact, list) else fact


def compiled(launch, calls, scratch=0):
    """What Triton makes of a launch, with a launch function that notes its arguments."""
    arguments = launch.arguments()
    meta, signature = [], {}
    for name, value in zip(launch.kernel.arg_names, arguments, strict=True):
        signature[name] = "i32"
        if prepared._is_descriptor(value):
            signature[name] = "tensordesc<fp16[1,128,64]>"
            meta.append(
                {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": value.block_shape,
                 "fp4_padded": False}
            )  # fmt: skip
    launcher = object.__new__(driver.CudaLauncher)
    launcher.launch = driver.wrap_handle_tensordesc(
        lambda *packed: calls.append(packed), signature, meta
    )
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, False
    launcher.global_scratch_size = launcher.profile_scratch_size = scratch
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    return SimpleNamespace(
        run=launcher, function=FUNCTION, packed_metadata=(4, 1, 1000),
        metadata=SimpleNamespace(tensordesc_meta=meta), src=SimpleNamespace(signature=signature),
    )  # fmt: skip


def operands(count=4, n=256, m=256):
    return [torch.zeros(2, n, m, dtype=torch.float16) for _ in range(count)]


def symmetric(tensors, scalars=(0.5, 2.0, 0.0, 1.0, 1.0, 1.0), tma=True):
    a, b, c, out = tensors
    return symmetric_launch(
        a, b, c, out, scalars, config=CONFIG, tma=tma, input_precision="ieee", num_sms=4
    )


def product(tensors, scalars=(0.5, 2.0, 1.0, 1.0, 0.0), tma=True):
    a, x, c, _, out = tensors
    return product_launch(
        a, x, c, out, scalars, False, config=CONFIG, tma=tma, input_precision="ieee"
    )


def gluon(tensors, scalars, tma):
    a, b, c, out = tensors
    assert tma
    return gluon_launch.symmetric_launch(a, b.mT, c, out, scalars, config=SPECIALIZED, num_sms=4)


@pytest.mark.parametrize(
    ("make", "tma"),
    [(symmetric, False), (symmetric, True), (product, False), (product, True), (gluon, True)],
)
@pytest.mark.parametrize("each", [False, True])
def test_a_repeated_launch_passes_what_triton_would(make, tma, each):
    calls = []
    num_scalars, count = (2, 5) if make is product else (3, 4)

    def scalars_of(start):
        scalars = [torch.ones(2) if each else start + i for i in range(num_scalars)]
        scalars += [start + 10 + i for i in range(num_scalars)]  # what they are multiplied with
        return [*scalars, start + 20] if make is product else scalars  # and the shift

    scalars = scalars_of(0.5)
    first = make(operands(count), tuple(scalars), tma)
    kernel = compiled(first, calls)
    again = prepared.prepare(first, kernel, 1)
    assert calls == []  # preparing launches nothing
    tensors = operands(count)
    scalars = scalars_of(7.5)
    if make is product:  # with a shift the fourth operand is `a` again
        tensors[3] = tensors[0]
    other = make(tensors, tuple(scalars), tma)
    _, values = prepared.key_and_values(tensors, scalars)
    again(values)
    grid = (*other.grid, 1, 1)
    kernel.run(
        *grid, STREAM + 1, FUNCTION, kernel.packed_metadata, None, None, None, *other.arguments()
    )
    fast, ordinary = calls
    expected = [p.data_ptr() if isinstance(p, torch.Tensor) else p for p in ordinary]
    assert list(fast) == expected
    assert len(ordinary) > len(other.arguments()) + len(prepared.BASE_FORMAT) - 1


def test_without_c_the_output_stands_in_for_it():
    a, b, out = operands(3)
    calls = []
    first = symmetric((a, b, None, out))
    again = prepared.prepare(first, compiled(first, calls), 0)
    again(prepared.key_and_values((a, b, out, out), (0.5, 0.0, 0.0, 1.0, 1.0, 1.0))[1])
    assert sum(str(out.data_ptr()) in str(p) for p in calls[0] if isinstance(p, tuple)) == 2


def test_a_prepared_launch_keeps_no_tensor_alive():
    for tma in (False, True):
        tensors = operands()
        scalars = (torch.ones(2), 1.0, 0.0, 1.0, 1.0, 1.0)
        launch = symmetric(tensors, scalars, tma)
        again = prepared.prepare(launch, compiled(launch, []), 0)
        again(prepared.key_and_values(tensors, scalars)[1])
        alive = [weakref.ref(t) for t in (*tensors, scalars[0])]
        del tensors, scalars, launch
        gc.collect()
        assert all(ref() is None for ref in alive)


def test_descriptors_are_encoded_once_per_address_and_bounded():
    encoded = []
    maps = prepared.EncodedDescriptors(lambda a: encoded.append(a) or f"map {a}", limit=3)
    assert [maps[a] for a in (16, 32, 16, 32)] == ["map 16", "map 32"] * 2
    assert encoded == [16, 32]
    for address in range(48, 480, 16):
        assert maps[address] == f"map {address}"
    assert len(maps) == 3


def test_what_is_not_known_is_not_prepared(monkeypatch):
    launch = symmetric(operands())
    kernel = compiled(launch, [])
    assert prepared.prepare(launch, object(), 0) is None
    assert prepared.prepare(launch, compiled(launch, [], scratch=1), 0) is None
    with monkeypatch.context() as patch:
        patch.setattr(driver, "make_tensordesc_arg", lambda arg, metadata: [None, *arg.shape])
        assert prepared.prepare(launch, kernel, 0) is None  # another layout
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_BASE_ARGS_FORMAT", "iiiKKppOOOOO")
        prepared.unfamiliar.cache_clear()
        assert "other arguments" in prepared.unfamiliar()
        assert prepared.prepare(launch, kernel, 0) is None
    prepared.unfamiliar.cache_clear()
    assert prepared.prepare(launch, kernel, 0) is not None


class Counted:
    """Stands for a launch; counts ordinary ones."""

    def __init__(self, settled=True):
        self.runs = 0
        self.settled = settled

    def run(self):
        self.runs += 1


def test_a_table_prepares_each_key_once_and_forgets_the_oldest(monkeypatch):
    noted, counted = [], Counted()
    monkeypatch.setattr(prepared, "prepare", lambda launch, compiled, device: noted.append)
    table = prepared.LaunchTable(limit=2)
    for values in (1, 2, 3):
        table.launch("a", 0, [values], lambda: counted)
    assert (counted.runs, noted) == (1, [[2], [3]])
    for key in "bc":
        table.launch(key, 0, [0], lambda: counted)
    assert len(table) == 2
    table.launch("a", 0, [4], lambda: counted)  # was forgotten
    assert (counted.runs, len(noted)) == (4, 2)
    table.launch("c", -1, [5], lambda: counted)  # the CPU
    assert (counted.runs, len(noted)) == (5, 2)


def test_what_could_not_be_prepared_is_launched_ordinarily_and_not_tried_again(monkeypatch):
    tried, counted = [], Counted()
    monkeypatch.setattr(prepared, "prepare", lambda *arguments: tried.append(arguments))
    table = prepared.LaunchTable()
    for _ in range(3):
        table.launch("a", 0, [0], lambda: counted)
    assert (counted.runs, len(tried)) == (3, 1)


def test_a_launch_that_is_not_settled_is_made_again(monkeypatch):
    noted, counted = [], Counted(settled=False)
    monkeypatch.setattr(prepared, "prepare", lambda *arguments: noted.append)
    table = prepared.LaunchTable()
    for _ in range(3):
        table.launch("a", 0, [0], lambda: counted)
    assert (counted.runs, noted) == (3, [])


def test_profilers_see_every_launch(monkeypatch):
    noted, counted = [], Counted()
    monkeypatch.setattr(prepared, "prepare", lambda *arguments: noted.append)
    table = prepared.LaunchTable()
    table.launch("a", 0, [0], lambda: counted)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        table.launch("a", 0, [0], lambda: counted)
    finally:
        hook.remove(print)
    assert (counted.runs, noted) == (2, [])


def test_keys_tell_alignment_strides_and_dtypes_apart():
    base = torch.zeros(1000, dtype=torch.float16)
    start = (-base.data_ptr() % 16) // 2

    def key(offset, strides=(64, 8, 1), dtype=torch.float16, scalar=1.0):
        t = base[start + offset :].view(dtype).as_strided((2, 8, 8), strides)
        return prepared.key_and_values([t], [scalar])[0]

    assert key(0) == key(8) == key(0, scalar=3.0)
    vector = torch.ones(5)
    aligned = vector[(-vector.data_ptr() % 16) // 4 :]
    different = {
        key(0), key(1), key(0, (64, 1, 8)), key(0, dtype=torch.bfloat16), key(0, scalar=aligned),
        key(0, scalar=aligned[1:]),
    }  # fmt: skip
    assert len(different) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnDevice:
    @pytest.fixture(autouse=True)
    def active(self):
        """The real driver."""

    @pytest.mark.parametrize("shape", [(3, 256, 320), (1, 129, 131), (16, 16, 48)])
    def test_repeated_launches_give_the_bits_of_the_first(self, shape):
        from flashns_dist.orthogonalize.kernels.triton_backend import TritonKernels

        kernels = TritonKernels()
        scale = torch.rand(shape[0], device="cuda")
        for alpha in (0.5, scale):
            for seed in range(3):
                x = torch.randn(
                    shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"
                ).half()
                results = []
                for backend in (kernels, kernels, TritonKernels()):
                    y, _ = backend.normalize(x, dtype=torch.float16, transpose=False, scale=9.0)
                    gram = backend.gram(y, alpha=alpha)
                    square = backend.symmetric(gram, gram, alpha=alpha, c=gram, beta=alpha)
                    results.append(backend.product(square, y, c=y, beta=2.0, transpose=True))
                assert torch.equal(results[0], results[1])
                assert torch.equal(results[0], results[2])
        if torch.cuda.get_device_capability()[0] >= 9 and triton.__version__.startswith("3.6"):
            assert all(launch is not None for launch in kernels._launches._known.values())

    def test_repeated_launches_follow_the_current_stream_and_graphs(self):
        from flashns_dist.orthogonalize.kernels.triton_backend import TritonKernels

        kernels = TritonKernels()
        x = torch.randn(2, 128, 256, device="cuda").half() / 16
        expected = kernels.gram(x)
        out = torch.empty_like(expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels.gram(x, out=out)
        x.mul_(2)
        out.fill_(torch.nan)
        graph.replay()
        assert not torch.equal(out, expected)
        expected = kernels.gram(x)
        assert torch.equal(out, expected)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            result = kernels.gram(x)
            torch.cuda.current_stream().synchronize()
        assert torch.equal(result, expected)
