"""Measured choices: the disk cache, and which backend a product gets."""

import json
import pwd
from pathlib import Path

import pytest
import torch

from flashns_dist.orthogonalize.kernels import select, tuning
from flashns_dist.orthogonalize.kernels.select import CublasKernels, SelectedKernels, choose
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels
from flashns_dist.orthogonalize.kernels.tuning import (
    TuningCache,
    batch_bucket,
    cache_folder,
    fastest,
)


def test_batches_share_buckets_of_powers_of_two():
    assert [batch_bucket(b) for b in (1, 2, 3, 4, 5, 300)] == [1, 2, 4, 4, 8, 512]


def test_choices_outlive_the_process_that_made_them(tmp_path):
    TuningCache(tmp_path).store("symmetric 8x8", "128x128", {"128x128": 1e-3})
    assert TuningCache(tmp_path).lookup("symmetric 8x8") == "128x128"
    assert TuningCache(tmp_path).lookup("symmetric 8x9") is None
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


def test_problems_whose_file_names_collide_are_told_apart(tmp_path):
    TuningCache(tmp_path).store("a b", 1, {})
    assert TuningCache(tmp_path).lookup("a/b") is None


def test_damaged_files_count_as_absent(tmp_path):
    TuningCache(tmp_path).store("a", 1, {})
    (path,) = tmp_path.iterdir()
    facts = json.loads(path.read_text())
    for content in ("", "{", "[1]", '{"choice": 1}', json.dumps(facts | {"choice": [1]})):
        path.write_text(content)
        assert TuningCache(tmp_path).lookup("a") is None
    path.write_text(json.dumps(facts))
    assert TuningCache(tmp_path).lookup("a") == 1


def test_choices_among_other_kernels_count_as_absent(monkeypatch, tmp_path):
    TuningCache(tmp_path).store("a", 1, {})
    monkeypatch.setattr(tuning, "KERNELS_VERSION", tuning.KERNELS_VERSION + 1)
    assert TuningCache(tmp_path).lookup("a") is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = TuningCache(tmp_path / "file" / "below")
    cache.store("a", 1, {})
    assert cache.lookup("a") == 1


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    for name in ("FLASHNS_DIST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()
    assert not cache_folder().is_file()
    cache = TuningCache()
    assert cache.lookup("a") is None
    cache.store("a", 1, {})
    assert cache.lookup("a") == 1


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHNS_DIST_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FLASHNS_DIST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/flashns_dist"


def test_candidates_that_fail_are_left_out(monkeypatch):
    def broken():
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(tuning, "warm_up", lambda call: call())
    monkeypatch.setattr(tuning, "measure", lambda call, _: call())
    best, seconds = fastest([("slow", lambda: 2.0), ("broken", broken), ("fast", lambda: 1.0)])
    assert best == 2
    assert seconds == {"slow": 2.0, "fast": 1.0}
    with pytest.raises(RuntimeError, match="out of shared memory"):
        fastest([("broken", broken)])


def test_a_clock_that_changes_while_candidates_are_measured_does_not_choose(monkeypatch):
    compiled, clock = [], [1.0]

    def measure(call, _):
        assert len(compiled) == 3  # nothing is compiled between measurements
        clock[0] *= 0.97
        return call() * clock[0]

    monkeypatch.setattr(tuning, "warm_up", lambda call: compiled.append(call()))
    monkeypatch.setattr(tuning, "measure", measure)
    times = (1.0, 1.1, 1.2)
    best, _ = fastest([(str(time), lambda time=time: time) for time in times])
    assert best == 0


def test_turns_go_forwards_and_backwards(monkeypatch):
    turns = []
    monkeypatch.setattr(tuning, "warm_up", lambda call: None)
    monkeypatch.setattr(tuning, "measure", lambda call, _: turns.append(call()) or 1.0)
    fastest([(name, lambda name=name: name) for name in "abc"], rounds=2)
    assert "".join(turns) == "abccbaabc"


def test_another_candidate_has_to_gain_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(tuning, "warm_up", lambda call: None)
    monkeypatch.setattr(tuning, "measure", lambda call, _: call())
    candidates = [("first", lambda: 1.0), ("second", lambda: 0.97)]
    assert fastest(candidates)[0] == 1
    assert fastest(candidates, advantage=0.05)[0] == 0
    assert fastest([("first", lambda: 1.0), ("second", lambda: 0.9)], advantage=0.05)[0] == 1


class Named(TorchKernels):
    """torch's products, noting that they were asked for."""

    def __init__(self, name, log):
        self.name = name
        self.log = log

    def symmetric(self, *args, **options):
        self.log.append(self.name)
        return super().symmetric(*args, **options)

    def product(self, *args, **options):
        self.log.append(self.name)
        return super().product(*args, **options)


@pytest.fixture
def members():
    log = []
    return {name: Named(name, log) for name in ("triton", "torch", "quack")}, log


def test_without_measurements_the_first_member_does_everything(members, tmp_path):
    backends, log = members
    kernels = SelectedKernels(backends, tune=False, cache=TuningCache(tmp_path))
    x = torch.randn(2, 4, 8).half()
    kernels.product(kernels.gram(x), x)
    assert log == ["triton", "triton"]
    assert list(tmp_path.iterdir()) == []


def test_the_fastest_member_is_kept(members, tmp_path, monkeypatch):
    backends, log = members
    order = []

    def measured(candidates, **_):
        names = [name for name, _ in candidates]
        order.append(names)
        return len(names) - 1, dict.fromkeys(names, 1.0)

    monkeypatch.setattr(select, "fastest", measured)
    x = torch.randn(2, 4, 8).half()
    kernels = SelectedKernels(backends, tune=True, cache=TuningCache(tmp_path))
    kernels.gram(x)
    kernels.gram(x[:, :, :8])
    kernels.product(kernels.gram(x), x, transpose=True)
    # torch has no symmetric product of half the work, so it is not among those measured.
    assert order[:2] == [["triton"], ["triton", "quack"]]
    assert order[2:] == [["triton", "torch"], ["triton", "torch", "quack"]]
    assert set(log) == {"quack"}
    log.clear()
    again = SelectedKernels(backends, tune=False, cache=TuningCache(tmp_path))
    again.gram(x)
    again.gram(x.float())  # never measured: the first member's
    again.gram(x, alpha=torch.ones(2))
    assert log == ["quack", "triton", "triton"]


def test_what_is_not_recorded_has_no_place_in_short_products(members, tmp_path, monkeypatch):
    def measured(candidates, **_):
        return len(candidates) - 1, {name: 2e-5 for name, _ in candidates}

    monkeypatch.setattr(select, "fastest", measured)
    backends, log = members
    x = torch.randn(2, 4, 8).half()
    kernels = SelectedKernels(backends, tune=True, cache=TuningCache(tmp_path))
    kernels.product(kernels.gram(x), x)
    assert log == ["triton", "torch"]


def test_a_candidate_goes_on_for_as_long_as_asked(monkeypatch):
    counts = []
    monkeypatch.setattr(tuning, "_in_a_row", lambda call, count: counts.append(count) or 0.25)
    assert tuning.measure(lambda: None, 0.0) == tuning.measure(lambda: None, 10.0) == 0.25
    assert counts == [4, 4, 40]


def test_a_product_with_an_identity_is_a_problem_of_its_own(members, tmp_path, monkeypatch):
    # quack hands such products on: what is measured for them says nothing about the others.
    backends, log = members
    choices = iter((0, 1, 0, 0))  # quack, then triton, each after triton alone

    def measured(candidates, **_):
        return next(choices), {name: 1.0 for name, _ in candidates}

    monkeypatch.setattr(select, "fastest", measured)
    kernels = SelectedKernels(backends, tune=True, cache=TuningCache(tmp_path))
    x = torch.randn(2, 4, 4).half()
    for gamma in (0.5, 0.0, 0.5):
        kernels.symmetric(x, x, c=x, gamma=gamma)
    kernels.symmetric(x, x, c=x, gamma=torch.ones(2))
    assert log == ["quack", "triton", "quack", "triton"]


def test_extras_are_those_of_the_first_member(members):
    backends, _ = members
    kernels = SelectedKernels(backends)
    assert not hasattr(kernels, "gram_space")
    backends["triton"].gram_space = lambda x, rows: "done"
    assert kernels.gram_space(None, ()) == "done"


def test_the_cpu_gets_torch():
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert choose(torch.device("cpu"), (1, 4, 4), dtype) == "torch"


def test_defaults_are_what_the_h200_measured():
    configs = pytest.importorskip("flashns_dist.orthogonalize.kernels.triton_configs")

    def symmetric(batch, n, k=None):
        found = configs.default_symmetric(configs.SYMMETRIC_TMA, batch, n, k or n, 132)
        assert found in configs.SYMMETRIC_TMA
        return found.label()

    def product(batch, n, m):
        return configs.default_product(configs.PRODUCT_TMA, batch, n, m, 132).label()

    assert {symmetric(*s) for s in ((16, 2048), (256, 256), (8, 1024, 4096))} == {"128x128x64w4s3"}
    assert symmetric(2, 8192) == symmetric(16, 2048, 8192) == "128x256x64w8s3"
    assert symmetric(1, 256) == "64x64x64w4s4"
    assert product(24, 1024, 1024) == product(2, 1024, 4096) == "128x128x64w4s3"
    assert product(16, 2048, 2048) == product(4, 4096, 14336) == "128x256x64w8s3"
    assert product(1, 256, 256) == product(1, 4096, 64) == "64x128x64w4s4"
    assert product(8, 4096, 64) == "128x128x64w4s3"  # no wider than the result
    shapes = ((64, 4096, 4096), (4096, 64, 4096), (4096, 4096, 64), (65, 65, 65))
    few = [configs.product_configs(torch.float16, True, *shape) for shape in shapes]
    small = [configs.PRODUCT_FLAT, configs.PRODUCT_NARROW, configs.PRODUCT_SHALLOW]
    assert few == [*small, configs.PRODUCT_TMA]
    labels = [configs.default_product(each, 16, 64, 64, 132).label() for each in few[:3]]
    assert labels == ["64x128x64w4s4", "64x64x64w4s6", "64x128x64w4s1"]
    # No pointer configuration of depth 32, which came out wrong.
    for config in (*configs.SYMMETRIC_POINTER, *configs.PRODUCT_POINTER):
        assert config.depth == 64
        assert config in (configs.default_symmetric(configs.SYMMETRIC_POINTER, b, 512, 512, 132)
                          for b in (1, 64))  # fmt: skip


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"transpose": True}])
def test_cublas_products_are_those_of_torch(given, options):
    a, x = torch.randn(2, 5, 5), torch.randn(2, 5, 7)
    options = options | ({"c": x} if "beta" in options else {})
    shape = (2, 7, 5) if "transpose" in options else (2, 5, 7)
    out = torch.full(shape, torch.nan) if given else None
    for alpha in (0.3, torch.tensor([2.0, 3.0])):
        result = CublasKernels().product(a, x, alpha=alpha, out=out, **options)
        expected = TorchKernels().product(a, x, alpha=alpha, **options)
        assert torch.allclose(result, expected, atol=1e-6)
        assert out is None or result is out


def test_a_choice_that_cannot_be_kept_leaves_no_file_behind(tmp_path):
    (tmp_path / "problem.json").mkdir()
    TuningCache(tmp_path).store("problem", 1, {})
    assert [path.name for path in tmp_path.iterdir()] == ["problem.json"]
