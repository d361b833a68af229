"""Gathers during the backward pass of FSDP2: when they go, and that results stay the same."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, repeat
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from flashns_dist import ExchangeOptions, FlashMuon, parameter_groups
from flashns_dist.optim.early import fingerprint
from flashns_dist.plan import CostModel
from flashns_dist.testing.gpus import has_gpus
from flashns_dist.testing.pool import RankPool, rank_device

WIDTH, STEPS = 20, 5


class Block(nn.Module):
    """Its matrix of two rows leaves the third of three ranks with an empty shard."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 34)
        self.down = nn.Linear(34, WIDTH, bias=False)
        self.narrow = nn.Linear(WIDTH, 2, bias=False)
        self.wide = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return x + self.wide(self.narrow(x).tanh())


def build(scheme: str = "fsdp") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(3)]).to(rank_device())
    size = dist.get_world_size()
    shape, names = ((2, size // 2), ("replicate", "shard")) if scheme == "hsdp" else ((size,), None)
    if scheme == "fsdp+tp":
        shape, names = (size // 2, 2), ("dp", "tp")
    mesh = init_device_mesh(rank_device().type, shape, mesh_dim_names=names)
    if scheme == "fsdp+tp":  # two process groups have matrices
        for block in model:
            parallelize_module(
                block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
            )
        mesh = mesh["dp"]
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def optimizer_for(model: nn.Module, *, overlap: bool = True, **settings: Any) -> FlashMuon:
    options = {"bucket_bytes": 1500, "cost": CostModel(), **settings.pop("options", {})}
    exchange = ExchangeOptions(overlap_backward=overlap, **options)
    return FlashMuon(parameter_groups(model), lr=0.05, exchange=exchange, **settings)


def backward(model: nn.Module, *seed: int) -> None:
    place = model[0].narrow.weight.device_mesh.get_coordinate()  # the same on all tp ranks
    generator = torch.Generator().manual_seed(hash((*place, *seed)))
    x = torch.randn(6, WIDTH, generator=generator).to(rank_device())
    model(x).square().mean().backward()


def plain(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    backward(model, step)


def clipped(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    backward(model, step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clipped_at_most(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    """Gradients are multiplied by one."""
    backward(model, step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def accumulated(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    backward(model, step, 0)
    backward(model, step, 1)


def accumulated_without_sync(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    backward(model, step, 0)
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    backward(model, step, 1)


def abandoned(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    """Every other step, a backward pass that no step follows."""
    if step % 2:
        backward(model, step, 0)
        optimizer.zero_grad()
    backward(model, step, 1)


def scaled(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    """What a GradScaler tells an optimizer whose gradients it has not unscaled."""
    backward(model, step)
    optimizer.grad_scale = torch.full((), 4.0, device=rank_device())  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros(1, device=rank_device())  # type: ignore[attr-defined]


def negated(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    """Gradient ascent: every magnitude stays."""
    backward(model, step)
    if step == 2:
        torch._foreach_neg_([param.grad for param in model.parameters()])


def nudged(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    """One element of a momentum changes, by what no version counter sees."""
    backward(model, step)
    if step == 2:
        local(optimizer.state[model[1].up.weight]["momentum_buffer"]).data[-1, -1] += 1e-4


def scheduled(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    backward(model, step)
    optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
    if step == 3:
        optimizer.param_groups[0]["momentum"] = 0.8


def planned_anew(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    """A setting that matrices are batched by changes while buckets are under way."""
    backward(model, step)
    if step == 2:
        optimizer.param_groups[0]["method"] = "aol"


def edited(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    """What no version counter sees: one rank writes into memory; a gradient goes."""
    backward(model, step)
    param = model[1].up.weight
    if step == 2 and dist.get_rank() == 1:
        param.grad.to_local().data[-1, -1] *= 1.001
    if step == 3:
        param.grad = None


def with_infinity(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    backward(model, step)
    if step == 2 and dist.get_rank() == 0:
        model[1].up.weight.grad.to_local()[0, 0] = float("inf")


def out_of_memory(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    """For the fingerprint of one rank's second bucket, and then for the first bucket of both."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    failing: Any = nullcontext()
    if step == 2 and dist.get_rank() == 1:
        effects = chain([mock.DEFAULT], repeat(error))
        failing = mock.patch(
            "flashns_dist.optim.early.fingerprint", wraps=fingerprint, side_effect=effects
        )
    elif step == 4:
        failing = mock.patch("flashns_dist.exchange.exchange._copy", side_effect=error)
    with failing:
        backward(model, step)


def zeroed_in_place(model: nn.Module, optimizer: FlashMuon, step: int) -> None:
    optimizer.zero_grad(set_to_none=False)
    backward(model, step)


def train(
    overlap: bool, scheme: str, before_step: Callable[..., None], settings: dict[str, Any]
) -> tuple[list[Tensor], list[tuple[int, int]], list[str]]:
    """Weights and momenta after each step; what was sent before it and dropped; warnings."""
    model = build(scheme)
    optimizer = optimizer_for(model, overlap=overlap, **settings)
    early = optimizer._early
    sent_before: list[int] = []  # when the backward pass reached the first block

    def look(param: Tensor) -> None:
        sent_before.append(early.num_sent)

    model[0].up.weight.register_post_accumulate_grad_hook(look)
    found: list[Tensor] = []
    counts: list[tuple[int, int]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            before = early.num_sent, early.num_dropped
            before_step(model, optimizer, step)
            sent = early.num_sent
            optimizer.step()
            counts.append((sent - before[0], early.num_dropped - before[1]))
            if before_step is plain:
                assert (sent_before[step] > before[0]) == (overlap and step > 0)
                assert early.num_sent == sent
            optimizer.zero_grad(set_to_none=before_step is not zeroed_in_place)
            for param in model.parameters():
                momentum = optimizer.state[param].get("momentum_buffer", param)
                found += [local(param).clone(), local(momentum).clone()]
    told = [w for w in caught if "backward pass is not used" in str(w.message)]
    messages = [str(w.message) for w in told]
    assert all(w.filename == __file__ for w in told), [w.filename for w in told]
    return found, counts, messages


def local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def compare(
    scheme: str, before_step: Callable[..., None], settings: dict[str, Any]
) -> tuple[list[tuple[int, int]], list[str]]:
    """The counts and warnings; raises if overlap changes a bit of weights or momenta."""
    expected, no_counts, no_warnings = train(False, scheme, before_step, settings)
    found, counts, messages = train(True, scheme, before_step, settings)
    assert not no_warnings
    assert not any(sent for sent, _ in no_counts)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return counts, messages


@pytest.mark.parametrize(
    ("size", "scheme", "settings"),
    [
        (2, "fsdp", {"nesterov": False}),
        (2, "fsdp", {"update_rule": "normuon"}),
        (3, "fsdp", {}),
        (4, "hsdp", {}),
        (4, "fsdp+tp", {}),
    ],
    ids=["plain momentum", "normuon", "empty shards", "hsdp", "fsdp+tp"],
)
def test_weights_are_those_without_overlap(
    ranks: RankPool, size: int, scheme: str, settings: dict[str, Any]
) -> None:
    for counts, messages in ranks.run(size, compare, scheme, plain, settings):
        assert counts[0] == (0, 0)  # there is no plan yet
        assert all(sent >= 2 and dropped == 0 for sent, dropped in counts[1:])
        assert not messages


@pytest.fixture(scope="module")
def interpreted() -> Iterator[RankPool]:
    """Ranks whose Triton kernels run in the interpreter where they are on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    pool = RankPool(2, interpret=not has_gpus(2))
    yield pool
    pool.close()


def compare_fused() -> tuple[list[tuple[int, int]], int]:
    from flashns_dist.optim.fused import passes

    fused, momentum = [0], passes.FusedPasses.momentum

    def counted(self: passes.FusedPasses, bucket: int, batches: Any, early: Any = None) -> None:
        fused[0] += early is not None
        momentum(self, bucket, batches, early)

    passes.FusedPasses.momentum = counted  # type: ignore[method-assign]
    try:
        return compare("fsdp", plain, {})[0], fused[0]
    finally:
        passes.FusedPasses.momentum = momentum  # type: ignore[method-assign]


def test_fused_passes_read_what_came_early(interpreted: RankPool) -> None:
    for counts, num_fused in interpreted.run(2, compare_fused):
        assert num_fused == sum(sent for sent, _ in counts) > 0


@pytest.mark.parametrize(
    ("before_step", "used", "message"),
    [
        (accumulated_without_sync, [1, 2, 3, 4], None),
        (zeroed_in_place, [1, 2, 3, 4], None),
        (clipped_at_most, [1, 2, 3, 4], None),
        (accumulated, [], "set_requires_gradient_sync"),
        (abandoned, [2, 4], "a second backward pass"),
        (clipped, [], r"gradients or momenta have changed since the backward pass \(clipping"),
        (scaled, [], "GradScaler"),
        (negated, [1, 3, 4], "gradients or momenta"),
        (nudged, [1, 3, 4], "gradients or momenta"),
        (scheduled, [1, 2, 4], "its settings"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_changes_gradients_makes_steps_gather_again(
    ranks: RankPool, before_step: Callable[..., None], used: list[int], message: str | None
) -> None:
    for counts, messages in ranks.run(2, compare, "fsdp", before_step, {}):
        assert [step for step, (sent, dropped) in enumerate(counts) if sent > dropped] == used
        if before_step in (accumulated, clipped, scaled):  # off after three steps
            assert [sent > 0 for sent, _ in counts] == [False, True, True, True, False]
            assert len(messages) == 2
            assert "overlap_backward is now off" in messages[1]
        else:
            assert len(messages) == (message is not None)
        assert message is None or re.search(message, messages[0])


def test_planning_anew_drops_what_was_sent(ranks: RankPool) -> None:
    for _, messages in ranks.run(2, compare, "fsdp", planned_anew, {}):
        assert len(messages) == 1
        assert "groups or states have changed since the backward pass" in messages[0]


def test_one_ranks_edit_makes_all_gather_again(ranks: RankPool) -> None:
    first, second = ranks.run(2, compare, "fsdp", edited, {})
    for counts, messages in (first, second):
        assert [sent > dropped for sent, dropped in counts] == [False, True, False, False, False]
        assert counts[4][0] > 0  # for the plan of the step before, which lacked a parameter
        assert len(messages) == 1
    assert "gradients or momenta" in second[1][0]
    assert "another rank" in first[1][0]


def test_an_error_in_packing_is_a_gather_again(ranks: RankPool) -> None:
    first, second = ranks.run(2, compare, "fsdp", out_of_memory, {})
    for counts, messages in (first, second):
        assert [sent > dropped for sent, dropped in counts] == [False, True, False, True, False]
        assert len(messages) == 1
    assert second[0][2] == (1, 1)
    assert "packing a bucket failed (OutOfMemoryError: CUDA out of memory." in second[1][0]
    assert "or one could not send: see its warning" in first[1][0]


def test_a_skipped_step_changes_nothing(ranks: RankPool) -> None:
    """``compare`` checks weights and momenta; the steps after it use early gathers again."""
    settings = {"nonfinite": "skip"}
    for counts, messages in ranks.run(2, compare, "fsdp", with_infinity, settings):
        assert [sent > dropped for sent, dropped in counts] == [False, True, False, True, True]
        assert not messages


@contextmanager
def interrupted(param: Tensor) -> Iterator[None]:
    """A hook that raises."""

    def fail(gradient: Tensor) -> None:
        raise InterruptedError

    handle = param.register_hook(fail)
    yield
    handle.remove()


def train_experts(overlap: bool) -> tuple[list[Tensor], list[tuple[int, int]], list[str]]:
    """Sharded DTensors without FSDP2, of which the second rank now and then lacks gradients.

    Weights after each step; what was sent before it and dropped in it; warnings.
    """
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(dist.get_rank())

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(rank_device())

    weights = [
        nn.Parameter(DTensor.from_local(random(5, 6), mesh, [Shard(0)], run_check=False))
        for _ in range(8)
    ]
    exchange = ExchangeOptions(bucket_bytes=300, overlap_backward=overlap, cost=CostModel())
    optimizer = FlashMuon(weights, exchange=exchange, nonfinite="skip")
    early = optimizer._early
    found, counts, messages = [], [], []
    for step in range(8):
        sent, dropped = early.num_sent, early.num_dropped
        lacks = 1 if step in (4, 6) and dist.get_rank() == 1 else None
        terms = [(weight.to_local() * random(5, 6)).sum() for weight in weights]
        loss = sum(term for index, term in enumerate(terms) if index != lacks)
        if step == 2 and dist.get_rank() == 1:
            with interrupted(weights[1]), pytest.raises(InterruptedError):
                loss.backward()  # type: ignore[union-attr]
        else:
            loss.backward()  # type: ignore[union-attr]
        sent = early.num_sent - sent
        if step == 4:  # a new binding, before what was sent could be compared
            optimizer.load_state_dict(optimizer.state_dict())
            dropped = 0
        if step == 6 and dist.get_rank() == 0:
            local(weights[0].grad)[0, 0] = float("nan")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        messages += [str(w.message) for w in caught if "is not used" in str(w.message)]
        optimizer.zero_grad()
        counts.append((sent, early.num_dropped - dropped))
        found += [local(weight).clone() for weight in weights]
    return found, counts, messages


def compare_experts() -> tuple[list[tuple[int, int]], list[str]]:
    expected, *_ = train_experts(False)
    found, counts, messages = train_experts(True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return counts, messages


def test_a_rank_may_send_less_than_the_others(ranks: RankPool) -> None:
    """A gradient is missing or a hook raises; the others must not wait for it for ever."""
    (first, messages), (second, _) = ranks.run(2, compare_experts)
    most = first[1][0]
    assert [sent for sent, _ in first] == [0, *[most] * 7]
    for step in (2, 4, 6):
        assert 0 < second[step][0] < most
    for counts in (first, second):
        assert all(dropped == 0 for _, dropped in counts[1::2])
        assert counts[2][0] == counts[2][1]
    assert len(messages) == 2
    assert "have sent different buckets" in messages[0]
    assert "groups or states have changed" in messages[1]


def changed_gradients() -> Iterator[tuple[str, Tensor, Tensor]]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((3, 5), (70, 91)):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            nudged = gradient.clone()
            bits = nudged.view(torch.int32 if dtype == torch.float32 else torch.int16)
            bits[-1, -1] += 1
            yield "the last bit of one element", gradient, nudged
            yield "halved", gradient, gradient / 2
            yield "clipped", gradient, gradient * 0.37
            yield "negated", gradient, -gradient
            yield "rows reversed", gradient, gradient.flip(0)
            yield "zero", gradient, gradient * 0


def test_fingerprints_tell_gradients_apart() -> None:
    for what, gradient, changed in changed_gradients():
        before = fingerprint([gradient, torch.ones(2, 2)])
        assert torch.equal(before, fingerprint([gradient.clone(), torch.ones(2, 2)]))
        assert not torch.equal(before, fingerprint([changed, torch.ones(2, 2)])), what
    few, many = torch.zeros(64, 64), torch.zeros(640, 640)
    assert fingerprint([few, many]).numel() == few.numel() + many.numel() // 64


def measure_limited() -> tuple[int, int, int]:
    options = {"overlap_bytes": 1500}
    everything = train(True, "fsdp", plain, {})[1][-1][0]
    found = compare("fsdp", plain, {"options": options})[0][-1][0]
    model = build()
    optimizer = optimizer_for(model, options=options)
    for step in range(2):
        backward(model, step)
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    (step,) = optimizer._steps.values()
    num_bytes = sum(2 * (t.received.numel() + t.sent.numel()) for t in step.early.values())
    return everything, found, num_bytes


def test_early_gathers_keep_to_their_cap(ranks: RankPool) -> None:
    for everything, found, num_bytes in ranks.run(2, measure_limited):
        assert 0 < found < everything
        assert 0 < num_bytes <= 1500


def copy_and_free() -> None:
    model = build()
    optimizer = optimizer_for(model)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    hooks = model[0].up.weight._post_accumulate_grad_hooks
    assert len(hooks) == 1
    again = pickle.loads(pickle.dumps(optimizer.state_dict()))
    twin = copy.copy(optimizer)
    optimizer.load_state_dict(again)  # binds anew in the next step
    assert not hooks
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert len(hooks) == 1
    assert optimizer._early.num_sent > 0
    backward(model, 3)
    known = weakref.ref(optimizer)
    del optimizer, twin
    gc.collect()
    assert known() is None
    assert not hooks
    backward(model, 4)


def test_an_optimizer_can_be_copied_loaded_and_freed(ranks: RankPool) -> None:
    ranks.run(2, copy_and_free)


def refuse_other_options() -> str:
    model = build()
    optimizer = optimizer_for(model, options={"overlap_bytes": 2000 + dist.get_rank()})
    backward(model, 0)
    with pytest.raises(RuntimeError, match="setting") as caught:
        optimizer.step()
    return str(caught.value)


def test_ranks_must_agree_on_overlap(ranks: RankPool) -> None:
    assert all(ranks.run(2, refuse_other_options))


def test_what_cannot_overlap_is_refused() -> None:
    exchange = ExchangeOptions(overlap_backward=True, replica_group=None)
    matrix = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match="cuda_graph=True and overlap_backward=True exclude"):
        FlashMuon([matrix], exchange=exchange, cuda_graph=True)
    optimizer = FlashMuon([matrix], exchange=exchange)
    with pytest.raises(ValueError, match="under an adapter"):
        optimizer.bind(list)
    matrix.grad = torch.ones(3, 4)
    with pytest.warns(UserWarning, match="overlap_backward=True does nothing here"):
        optimizer.step()
    with pytest.raises(ValueError, match="overlap_bytes=0"):
        ExchangeOptions(overlap_bytes=0)
