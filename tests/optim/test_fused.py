"""The fused passes against the separate operations: every bit of weights and momenta.

In Triton's interpreter on the CPU, in ranks of their own; compiled where GPUs are present.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.optim import calibration, flash_muon
from flashns_dist.optim.fused import passes
from flashns_dist.optim.fused.rows import Rows, matched, rows_of
from flashns_dist.optim.fused.tables import matched_pieces
from flashns_dist.plan import CostModel
from flashns_dist.testing.gpus import has_gpus
from flashns_dist.testing.pool import RankPool, rank_device
from tests.optim.test_invariance import (
    SCENARIOS,
    Scenario,
    compare_flat_shards,
    compare_scenarios,
    compare_with_one_process,
    full,
)

pytest.importorskip("triton", reason="Triton is not installed")

ROWS = ["rows", "empty shards", "many buckets", "gradients missing", "bf16 parameters"]
OTHERS = ["columns", "experts", "replicated", "fp32 wire", "cautious, plain momentum"]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[RankPool]:
    """Ranks whose Triton kernels run in the interpreter where there is no GPU."""
    pool = RankPool(4, interpret=not torch.cuda.is_available())
    yield pool
    pool.close()


def count_and_fuse_only_sharded() -> Counter[str]:
    """Optimizers of one process (the references) run unfused; launches are counted."""
    launched: Counter[str] = Counter()
    possible, launch = passes.fusing_possible, passes.FusedPasses._launch
    step = FlashMuon.step
    if getattr(step, "is_patched", False):
        passes.launched.clear()  # type: ignore[attr-defined]
        return passes.launched  # type: ignore[attr-defined,no-any-return]
    is_reference = [False]

    def patched_step(self: FlashMuon, closure: object = None) -> object:
        is_reference[0] = self.exchange_options.replica_group is None
        return step(self, closure)  # type: ignore[arg-type]

    def counted(
        self: passes.FusedPasses, name: str, tables: object, table: object, constants: object
    ) -> None:
        launched[name] += table is not None
        launch(self, name, tables, table, constants)  # type: ignore[arg-type]

    patched_step.is_patched = True  # type: ignore[attr-defined]
    FlashMuon.step = patched_step  # type: ignore[method-assign,assignment]
    passes.FusedPasses._launch = counted  # type: ignore[method-assign,assignment]
    passes.fusing_possible = lambda device: not is_reference[0] and possible(device)
    passes.launched = launched  # type: ignore[attr-defined]
    return launched


def compare(names: list[str], settings: dict[str, object]) -> dict[str, int]:
    launched = count_and_fuse_only_sharded()
    compare_scenarios(settings, names)
    return dict(launched)


def compare_one(scenario: Scenario) -> None:
    count_and_fuse_only_sharded()
    compare_with_one_process(scenario)


def step_with_other_groups() -> None:
    """DeepSpeed's adapter gives its optimizers new group objects in every step."""
    launched = count_and_fuse_only_sharded()
    starts = [full((20, 36), 0), full((33, 17), 1)]
    found = []
    for replica_group in ("world", None):  # fused, and not
        params = [torch.nn.Parameter(start.clone()) for start in starts]
        exchange = ExchangeOptions(replica_group=replica_group)
        optimizer = FlashMuon(params, lr=0.05, exchange=exchange)
        for step in range(5):
            changes = {"lr": 0.05 / (step + 1), "momentum": 0.9}
            changes["adjust_lr_fn"] = "spectral" if step == 3 else "original"
            optimizer.param_groups = [{**optimizer.param_groups[0], **changes}]
            for index, param in enumerate(params):
                gradient = full(tuple(param.shape), 2, step, index)
                param.grad = gradient.T.contiguous().T if step == 1 else gradient
            optimizer.step()
        found.append(params)
    assert launched["update_kernel"] == 4  # not with gradients that are not contiguous
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_settings_are_those_of_the_present_groups(interpreted: RankPool) -> None:
    interpreted.run(1, step_with_other_groups)


def step_under_another_default_device() -> None:
    launched = count_and_fuse_only_sharded()
    found = []
    for device in ("cpu", "meta"):
        param, gradients = (
            torch.nn.Parameter(full((20, 36), 0)),
            [full((20, 36), i) for i in (1, 2)],
        )
        with torch.device(device):
            optimizer = FlashMuon([param], lr=0.05)
            for gradient in gradients:
                param.grad = gradient
                optimizer.step()
        found.append(param)
    assert launched["update_kernel"] == 4
    assert torch.equal(*found)


def test_the_default_device_does_not_matter(interpreted: RankPool) -> None:
    interpreted.run(1, step_under_another_default_device)


class Broken:
    """A table that is not written to."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def __getattr__(self, name: str) -> object:
        return getattr(self._target, name)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        raise RuntimeError("interrupted")


def step_again_after_a_failed_upload() -> None:
    upload = passes.FusedPasses._upload
    failing = [False]

    def fail_once(self: passes.FusedPasses, target: torch.Tensor, values: list[int]) -> None:
        broken, failing[0] = failing[0], False
        upload(self, Broken(target) if broken else target, values)  # type: ignore[arg-type]

    passes.FusedPasses._upload = fail_once  # type: ignore[method-assign,assignment]
    launched = count_and_fuse_only_sharded()
    start = full((20, 36), 0)
    found = []
    for replica_group in ("world", None):  # fused, and not
        param = torch.nn.Parameter(start.clone())
        exchange = ExchangeOptions(replica_group=replica_group)
        optimizer = FlashMuon([param], lr=0.05, exchange=exchange)
        for step in range(4):
            param.grad = full((20, 36), 1, step).clone()
            kept = param.grad  # so that the next one lies elsewhere
            if step == 2 and replica_group:
                failing[0] = True
                with pytest.raises(RuntimeError, match="interrupted"):
                    optimizer.step()
            optimizer.step()
            del kept
        found.append(param)
    assert launched["update_kernel"] == 4
    assert torch.equal(*found)


def test_addresses_that_did_not_arrive_are_sent_again(interpreted: RankPool) -> None:
    interpreted.run(1, step_again_after_a_failed_upload)


def measured_passes() -> None:
    launched = count_and_fuse_only_sharded()
    passes.fusing_possible = lambda device: True
    assert calibration._memory_rate(rank_device(), CostModel(), 0.0) > 0
    # Three steps, then each pass three times ten times.
    assert (launched["momentum_kernel"], launched["update_kernel"]) == (33, 33)


def test_calibration_measures_the_fused_passes_themselves() -> None:
    pool = RankPool(1, interpret=not torch.cuda.is_available())  # its own: it changes what fuses
    pool.run(1, measured_passes)
    pool.close()


def step_with_other_memory(kind: str) -> None:
    """What the kernels would read wrongly, or at the address 0, after a first step."""
    launched = count_and_fuse_only_sharded()
    start = full((20, 36), 0)
    found = []
    for replica_group in ("world", None):  # fused, and not
        param = torch.nn.Parameter(start.clone())
        exchange = ExchangeOptions(replica_group=replica_group)
        optimizer = FlashMuon([param], lr=0.05, exchange=exchange)
        for step in range(3):
            param.grad = full((20, 36), 1, step).to(param.dtype)
            optimizer.step()
            state = optimizer.state[param]
            if kind == "momentum":
                state["momentum_buffer"] = state["momentum_buffer"].T.contiguous().T
            elif kind == "momentum's dtype":
                state["momentum_buffer"] = state["momentum_buffer"].bfloat16()
            else:
                param.data = param.data.bfloat16()
        found.append(param)
    assert launched["update_kernel"] == 1
    assert torch.equal(*found)


def step_with_pending_gradients() -> None:
    """``redistribute(async_op=True)`` leaves a tensor without memory of its own."""
    launched = count_and_fuse_only_sharded()
    mesh = init_device_mesh(rank_device().type, (2,))
    start, gradient = full((20, 36), 0), full((20, 36), 1)
    alone = torch.nn.Parameter(start.clone())
    alone.grad = gradient
    FlashMuon([alone], lr=0.05, exchange=ExchangeOptions(replica_group=None)).step()
    param = torch.nn.Parameter(distribute_tensor(start, mesh, [Replicate()]))
    half = DTensor.from_local(gradient / 2, mesh, [Partial()])
    param.grad = half.redistribute(mesh, [Replicate()], async_op=True)
    FlashMuon([param], lr=0.05).step()
    assert launched["update_kernel"] == 1
    assert torch.equal(param.to_local(), alone)


@pytest.mark.parametrize("kind", ["momentum", "momentum's dtype", "weight"])
def test_other_strides_and_dtypes_go_the_other_way(interpreted: RankPool, kind: str) -> None:
    interpreted.run(1, step_with_other_memory, kind)


def step_with_a_momentum_elsewhere() -> None:
    launched = count_and_fuse_only_sharded()
    param = torch.nn.Parameter(full((20, 36), 0))
    optimizer = FlashMuon([param], lr=0.05)
    param.grad = full((20, 36), 1)
    optimizer.step()
    kept = param.detach().clone()
    state = optimizer.state[param]
    state["momentum_buffer"] = state["momentum_buffer"].to("meta")
    with pytest.raises(ValueError, match="its state 'momentum_buffer' is on meta"):
        optimizer.step()
    assert launched["momentum_kernel"] == 1
    assert torch.equal(param, kept)


def test_a_momentum_on_another_device_is_an_error_before_the_step(interpreted: RankPool) -> None:
    interpreted.run(1, step_with_a_momentum_elsewhere)


def test_gradients_are_waited_for(interpreted: RankPool) -> None:
    needs(2)
    interpreted.run(2, step_with_pending_gradients)


def compare_flat(seed: int) -> dict[str, int]:
    launched = count_and_fuse_only_sharded()
    compare_flat_shards(seed, {})
    return dict(launched)


def needs(size: int) -> None:
    if torch.cuda.is_available() and not has_gpus(size):
        pytest.skip(f"needs {size} GPUs")


@pytest.mark.parametrize("names", [ROWS, OTHERS], ids=["rows", "others"])
@pytest.mark.parametrize("size", [2, 4])
def test_fused_passes_round_as_separate_operations(
    interpreted: RankPool, names: list[str], size: int
) -> None:
    needs(size)
    chosen = [name for name in names if size in SCENARIOS[name][1]]
    for launched in interpreted.run(size, compare, chosen, {}):
        for kernel in ("momentum_kernel", "copy_kernel", "update_kernel"):
            assert launched[kernel] >= len(chosen)


def test_a_rank_that_holds_nothing_takes_part_in_the_rules_collectives(
    interpreted: RankPool,
) -> None:
    needs(4)
    rows = (Shard(0),)
    matrices = tuple((shape, rows) for shape in ((2, 30), (1, 24), (3, 18), (2, 40), (1, 20)))
    settings = {"update_rule": "adamuon"}
    scenario = Scenario((4,), matrices, options={"bucket_bytes": 64}, settings=settings)
    interpreted.run(4, compare_one, scenario)


def test_fused_passes_on_pieces_of_flat_buffers(interpreted: RankPool) -> None:
    needs(3)
    assert any(launched.get("update_kernel") for launched in interpreted.run(3, compare_flat, 0))


def test_a_step_runs_under_the_device_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[object] = []
    steps: list[list[object]] = []

    @contextmanager
    def entered(device: object) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    run_step, on_device_of = FlashMuon._run_step, flash_muon.on_device_of

    def noted(self: FlashMuon) -> bool:
        steps.append(list(inside))
        return run_step(self)

    def as_on_a_gpu(bound: object) -> object:
        assert bound is optimizer._bound[0]
        storage = SimpleNamespace(device=torch.device("cuda", 1))
        return on_device_of(SimpleNamespace(storage=storage, local=lambda t: t))  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(FlashMuon, "_run_step", noted)
    param = nn.Parameter(torch.ones(8, 12))
    param.grad = torch.ones_like(param)
    optimizer = FlashMuon([param], exchange=ExchangeOptions(replica_group=None))
    optimizer.step()
    monkeypatch.setattr(flash_muon, "on_device_of", as_on_a_gpu)
    optimizer.step()
    assert steps == [[], [torch.device("cuda", 1)]]
    assert not inside


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_parameters_need_not_be_on_the_current_device(cuda_graph: bool) -> None:
    found = []
    for index in (0, 1):  # and 0 is current
        param = nn.Parameter(full((48, 80), 0).to(f"cuda:{index}"))
        exchange = ExchangeOptions(replica_group=None)
        optimizer = FlashMuon([param], lr=0.05, exchange=exchange, cuda_graph=cuda_graph)
        for step in range(4):
            param.grad = full((48, 80), 1, step).to(param.device)
            optimizer.step()
        found.append(param.detach().cpu())
    assert torch.equal(*found)
    assert torch.cuda.current_device() == 0


def test_rows_of_views() -> None:
    base = torch.empty(6, 10, 8)
    assert rows_of(base) == Rows(0, 1, 480, 480)
    assert rows_of(base[2, 3:5]) == Rows(184, 1, 16, 16)
    assert rows_of(base[2, 3:5, 1:4]) == Rows(185, 2, 3, 8)
    assert rows_of(base[1:3, 2:4]) == Rows(96, 2, 16, 80)
    assert rows_of(base[1:3, 2:4, 1:3]) is None
    assert rows_of(base[0].T) is None
    assert rows_of(base[:, :1, :1]) is None
    assert rows_of(base[0, 0, 3:4]) == Rows(3, 1, 1, 1)
    for view in (base, base[2, 3:5], base[2, 3:5, 1:4], base[1:3, 2:4]):
        rows = rows_of(view)
        assert rows is not None
        flat = torch.arange(base.numel()).as_strided(
            (rows.rows, rows.cols), (rows.stride, 1), rows.offset
        )
        whole = torch.arange(base.numel()).view(base.shape)
        expected = whole.as_strided(view.shape, view.stride(), int(view.storage_offset()))
        assert torch.equal(flat.flatten(), expected.flatten())


def test_matched_rows() -> None:
    run, rows = Rows(5, 1, 12, 12), Rows(7, 3, 4, 9)
    assert matched(run, rows) == (Rows(5, 3, 4, 4), rows)
    assert matched(rows, run) == (rows, Rows(5, 3, 4, 4))
    assert matched(rows, rows) == (rows, rows)
    assert matched(rows, Rows(0, 2, 6, 8)) is None


def test_pieces_that_int32_cannot_count_are_not_taken() -> None:
    large, longer = Rows(0, 2**15, 2**16 - 2, 2**16), Rows(0, 2**15, 2**16, 2**16)
    run = Rows(7, 1, large.numel, large.numel)
    assert matched_pieces([(0, large, 1, run, 3)]) == [(0, large, 1, matched(run, large)[0], 3)]  # type: ignore[index]
    assert matched_pieces([(0, large, 1, large, 0), (0, longer, 1, longer, 0)]) is None
