"""Steps replayed before the host knows whether they may be, against eager ones: every bit.

Where there is no GPU, a replay is the same call again and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.optim import flash_muon, graph
from flashns_dist.optim.speculation import Speculation
from flashns_dist.optim.step import MatrixStep
from flashns_dist.testing.gpus import has_gpus
from flashns_dist.testing.pool import RankPool, rank_device

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = ((48, 80), (80, 48), (33, 17), (24, 24), (20,))
PLACEMENTS = (Shard(0), Shard(1), Replicate(), Shard(0), Shard(0))

ALL = (0, 1, 2, 3)
Step = dict[str, tuple[int, ...]]  # what happens to the gradients, and on which ranks
START: tuple[Step, ...] = ({}, {}, {})
LONE, PAIRS = "one rank has a group of its own", "two groups of two ranks"  # no speculation there
EVENTS: dict[str, tuple[Step, ...]] = {
    "nothing": (*START, {}, {}),
    "not finite": (*START, {"nan": (0,)}, {}, {"nan": (1,)}, {}),
    "none anywhere": (*START, {"none": ALL}, {"none": ALL}, {"none": ALL}, {}, {}),
    "none on one rank": (*START, {"none": (1,)}, {"none": (1,)}, {}, {}),
    "another memory": (*START, {"turned": (0,)}, {}, {"turned": (1,)}, {}),
    "another memory, in vain": (*START, {"turned": (0,), "nan": (1,)}, {}, {"turned": ALL}, {}),
    "misplaced": (*START, {"misplaced": (1,)}, {}),
    "overflow": (*START, {"scaled": ALL}, {"scaled": ALL, "overflow": (1,)}, {}),
    "overflow on one rank": (*START, {"scaled": (0,), "overflow": (0,)}, {}),
    LONE: (*START, {"nan": (0,)}, {}),
    PAIRS: (*START, {}, {}),
}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[RankPool]:
    pool = RankPool(4, interpret=not torch.cuda.is_available())
    yield pool
    pool.close()


def called_again(run: partial[None]) -> Callable[[], None]:
    step: MatrixStep = run.func.__self__  # type: ignore[attr-defined]

    def replay() -> None:
        step.is_prepared = True  # a graph runs none of the host's code
        run()

    return replay


def observed(patch: pytest.MonkeyPatch, counts: Counter[str]) -> None:
    """Count speculations, and stand in for CUDA graphs on the CPU."""
    if rank_device().type == "cpu":
        patch.setattr(graph, "captured", called_again)
        patch.setattr(flash_muon, "capture_problem", lambda step, device: None)
    observe, run_empty = Speculation.observe, MatrixStep.run_empty

    def counted(self: Speculation, agreed: Tensor) -> Tensor:
        result = observe(self, agreed)
        counts["observed"] += 1
        counts["has run"] += self.has_run
        return result

    def emptied(self: MatrixStep) -> None:
        counts["empty"] += 1
        run_empty(self)

    patch.setattr(Speculation, "observe", counted)
    patch.setattr(MatrixStep, "run_empty", emptied)


def train(event: str, nonfinite: str, **options: Any) -> list[list[Tensor]]:
    """This rank's weights and states after every step."""
    device = rank_device().type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    if event == PAIRS:
        mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("a", "b"))["b"]
    generator = torch.Generator().manual_seed(0)

    def random(index: int) -> DTensor:
        value = torch.randn(SHAPES[index], generator=generator).to(rank_device())
        return distribute_tensor(value, mesh, [PLACEMENTS[index]], src_data_rank=None)

    params = [nn.Parameter(random(index)) for index in range(len(SHAPES))]
    matrices, alone = params[:4], DeviceMesh(device, [1]) if event == LONE else None
    if alone is not None and dist.get_rank() == 1:
        ones = torch.ones(12, 8, device=rank_device())
        matrices.append(nn.Parameter(DTensor.from_local(ones, alone, [Shard(0)])))
        matrices[-1].grad = DTensor.from_local(ones, alone, [Shard(0)])
    groups = [{"params": matrices}, {"params": params[4:], "update_rule": "adamw"}]
    optimizer = FlashMuon(groups, lr=0.02, nonfinite=nonfinite, **options)  # type: ignore[arg-type]
    history: list[list[Tensor]] = []
    for step in EVENTS[event]:
        here = {name for name, ranks in step.items() if dist.get_rank() in ranks}
        for index, param in enumerate(params):
            param.grad = random(index)
        change_gradients(params, here)
        if "scaled" in here:
            overflow = float("overflow" in here)
            optimizer.found_inf = torch.tensor([overflow], device=rank_device())
            optimizer.grad_scale = torch.tensor(4.0, device=rank_device())
        error = None
        try:
            optimizer.step()
        except (FloatingPointError, ValueError, RuntimeError) as found:
            error = found
        optimizer.found_inf = optimizer.grad_scale = None
        assert (error is not None) == ("misplaced" in step or "nan" in step), error
        states = [optimizer.state[param] for param in params]
        kept = [*params, *(value for state in states for value in state.values())]
        history.append([getattr(value, "_local_tensor", value).detach().clone() for value in kept])
        if error is not None:
            assert all(map(torch.equal, history[-1], history[-2]))
    optimizer.release_graphs()
    return history


def change_gradients(params: list[nn.Parameter], what: set[str]) -> None:
    mesh = params[0].device_mesh  # type: ignore[attr-defined]
    if "nan" in what:
        params[0].grad.to_local()[:1] = float("nan")  # type: ignore[union-attr]
    if "none" in what:
        params[0].grad = None
    if "turned" in what:
        local = params[2].grad.to_local().T.contiguous().T  # type: ignore[union-attr]
        params[2].grad = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
    if "misplaced" in what:
        local = torch.ones(SHAPES[0], device=rank_device())
        params[0].grad = DTensor.from_local(local, mesh, [Replicate()], run_check=False)


def compare(event: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    exchange = ExchangeOptions(bucket_bytes=8192)
    eager = train(event, "raise", exchange=exchange)
    with pytest.MonkeyPatch.context() as patch:
        observed(patch, counts)
        graphed = train(event, "raise", exchange=exchange, cuda_graph=True)
    for step, (one, other) in enumerate(zip(eager, graphed, strict=True)):
        assert all(map(torch.equal, one, other)), (event, step)
    return dict(counts)


# Speculations, those that were right, and empty runs, on ranks 0 and 1.
COUNTS = {
    "nothing": [(4, 4, 0)] * 2,
    "not finite": [(6, 4, 0)] * 2,
    "none anywhere": [(7, 5, 0)] * 2,
    "none on one rank": [(4, 3, 0)] * 2,
    "another memory": [(6, 5, 0)] * 2,
    "another memory, in vain": [(6, 4, 1), (6, 4, 0)],
    "misplaced": [(4, 3, 0), (4, 3, 1)],
    "overflow": [(5, 3, 1)] * 2,
    "overflow on one rank": [(4, 3, 1), (4, 3, 0)],
    LONE: [(0, 0, 0)] * 2,
    PAIRS: [(0, 0, 0)] * 2,
}
SIZES = {"nothing": (1, 2, 3, 4), PAIRS: (4,)}


@pytest.mark.gpu
@pytest.mark.parametrize("event", EVENTS)
def test_steps_are_those_of_eager_optimizers(interpreted: RankPool, event: str) -> None:
    for size in SIZES.get(event, (2,)):
        if torch.cuda.is_available() and not has_gpus(size):
            continue
        found = interpreted.run(size, compare, event)
        names = ("observed", "has run", "empty")
        counts = [tuple(each.get(name, 0) for name in names) for each in found]
        assert counts[:2] == COUNTS[event][:size]


def train_through_failure(cuda_graph: bool) -> list[Tensor]:
    """Weights and states after steps of which the first to be captured fails."""
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(24, 40, generator=generator).to(rank_device())

    param = nn.Parameter(random())
    optimizer = FlashMuon([param], lr=0.02, cuda_graph=cuda_graph)
    history, gradients = [], []
    for step in range(5):
        param.grad = random()
        gradients.append(param.grad)  # what a later step would find if it looked there
        if step == FAILS and not cuda_graph:
            continue
        optimizer.found_inf = optimizer.grad_scale = None
        if step == FAILS + 1:  # not before the verdict
            optimizer.found_inf = torch.zeros(1, device=rank_device())
            optimizer.grad_scale = torch.ones((), device=rank_device())
        if step != FAILS:
            optimizer.step()
        else:
            param.grad[0] = float("nan")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(graph, "captured", out_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    optimizer.step()
        history += [param.detach().clone(), optimizer.state[param]["momentum_buffer"].clone()]
    return history[-6:]


FAILS = 1


def out_of_memory(run: Callable[[], None]) -> Callable[[], None]:
    raise torch.OutOfMemoryError


def compare_through_failure() -> None:
    eager = train_through_failure(False)
    with pytest.MonkeyPatch.context() as patch:
        observed(patch, Counter())
        graphed = train_through_failure(True)
    assert all(map(torch.equal, eager, graphed))


@pytest.mark.gpu
def test_steps_after_a_capture_that_failed_see_their_own_gradients(interpreted: RankPool) -> None:
    interpreted.run(1, compare_through_failure)


def count_captures(rule: str) -> list[int]:
    """How often a step has been captured, after each of a few with states in other memory."""
    count = 0

    def captured(run: Callable[[], None]) -> Callable[[], None]:
        nonlocal count
        count += 1
        return capture(run)

    with pytest.MonkeyPatch.context() as patch:
        observed(patch, Counter())
        capture = graph.captured
        patch.setattr(graph, "captured", captured)
        param = nn.Parameter(torch.ones(24, 40, device=rank_device()))
        optimizer = FlashMuon([param], lr=0.02, cuda_graph=True, update_rule=rule)
        counts, kept = [], []
        for step in range(6):
            param.grad = torch.ones_like(param)
            state = optimizer.state[param]
            if step in (3, 4):
                kept += state.values()
                state.update({name: value.clone() for name, value in state.items()})
            optimizer.step()
            counts.append(count)
    return counts


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rule", "counts"), [("muon", [0, 1, 1, 1, 1, 1]), ("normuon", [0, 1, 1, 2, 3, 3])]
)
def test_states_by_block_in_other_memory_are_captured_anew(
    interpreted: RankPool, rule: str, counts: list[int]
) -> None:
    assert interpreted.run(1, count_captures, rule) == [counts]
