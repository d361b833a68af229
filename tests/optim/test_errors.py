"""Bad input: a clear error on every rank, no hang, and nothing changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.layout import Equal
from flashns_dist.optim import binding, setup
from flashns_dist.optim.options import check_exchange
from flashns_dist.testing.pool import RankPool, rank_device

KELLER = (3.4445, -4.775, 2.0315)


def matrix(rows: int = 6, cols: int = 8, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    values = torch.randn(rows, cols, generator=generator).to(dtype)
    return nn.Parameter(values, requires_grad=dtype.is_floating_point)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "svd"}, "method='svd'"),
        ({"ns_coefficients": "nobody"}, "'nobody'"),
        ({"ns_coefficients": ((1.0,),)}, "row 0 has 1"),
        ({"adjust_lr_fn": "larger"}, "adjust_lr_fn='larger'"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0)"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore'"),
        ({"backend": "numpy"}, "backend='numpy'"),
        ({"ns_dtype": torch.int8}, "torch.int8"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"eps": 10**400}, "must be a finite number"),
        ({"lr": "0.1"}, "lr='0.1' must be a finite number"),
        ({"lr": None}, "lr=None"),
        ({"lr": [1]}, "lr=[1]"),
        ({"lr": torch.ones(2)}, "lr=tensor"),
        ({"momentum": "0.9"}, "momentum='0.9'"),
        ({"betas": 0.9}, "betas=0.9 must be two numbers"),
        ({"betas": None}, "betas=None must be two numbers"),
        ({"betas": ("0.9", "0.95")}, "betas=('0.9', '0.95') must be two numbers"),
        ({"ns_steps": None}, "ns_steps=None"),
        ({"ns_steps": float("nan")}, "ns_steps=nan"),
        ({"ns_steps": 2.7}, "ns_steps=2.7 must be a whole number"),
        ({"ns_steps": 0}, "ns_steps=0 must be a whole number, at least 1"),
        ({"ns_steps": 7}, "ns_steps=7 is how often a single row of coefficients is used"),
        ({"ns_steps": 7, "ns_coefficients": "you"}, "ns_coefficients='you' is no such row"),
        ({"nesterov": "false"}, "nesterov='false' must be True or False"),
        ({"cautious": "no"}, "cautious='no'"),
        ({"cautious": 2}, "cautious=2"),
        ({"adjust_lr_fn": []}, "adjust_lr_fn=[]"),
        ({"method": []}, "method=[]"),
        ({"backend": []}, "backend=[]"),
        ({"update_rule": []}, "update_rule=[]"),
        ({"renormalize": []}, "renormalize=[]"),
        ({"equilibrate": "no"}, "equilibrate='no'"),
        ({"update_rule": "normuon", "beta2": None}, "beta2=None"),
        ({"update_rule": "adamuon", "eps": 0}, "eps=0 must be positive"),
        ({"update_rule": "dion2", "fraction": None}, "fraction=None"),
        ({"update_rule": "dion2", "fraction": "x"}, "fraction='x'"),
        ({"update_rule": "dion", "rank_fraction": "x"}, "rank_fraction='x'"),
        ({"update_rule": "dion", "compressed_gradients": "no"}, "compressed_gradients='no'"),
    ],
)
def test_an_unsuitable_argument_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FlashMuon([matrix()], **settings)


def test_a_number_of_steps_needs_a_single_row() -> None:
    row = (3.4445, -4.7750, 2.0315)
    auxiliary = {"params": [nn.Parameter(torch.ones(3))], "update_rule": "adamw"}
    FlashMuon([{"params": [matrix()], "ns_coefficients": row}, auxiliary], ns_steps=7)
    theirs = torch.optim.Muon([matrix()], ns_steps=7)
    ours = FlashMuon([matrix()])
    ours.load_state_dict(theirs.state_dict())
    ours.param_groups[0]["params"][0].grad = torch.ones(6, 8)
    ours.step()
    assert ours.param_groups[0]["ns_steps"] == 5


@pytest.mark.parametrize("kind", [torch.tensor, lambda x: torch.tensor([x]), np.float32, np.array])
def test_numbers_may_be_tensors_or_of_numpy(kind: Callable[[float], Any]) -> None:
    """Powers of two, which every kind holds exactly."""
    settings = {"lr": 0.125, "weight_decay": 0.5, "momentum": 0.75, "eps": 0.25, "beta2": 0.5}
    given = {key: kind(value) for key, value in settings.items()}
    given |= {"betas": (kind(0.5), kind(0.75)), "nesterov": np.bool_(True)}
    given |= {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": kind(3.0), "cautious": 1}
    settings |= {"betas": (0.5, 0.75), "nesterov": True, "cautious": True}
    settings |= {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3}
    weights = []
    for arguments in (given, settings):
        param, other = matrix(), nn.Parameter(torch.ones(3))
        param.grad, other.grad = torch.ones_like(param), torch.ones(3)
        groups = [{"params": [param]}, {"params": [other], "update_rule": "adamw"}]
        FlashMuon(groups, update_rule="normuon", **arguments).step()
        weights.append((param, other))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wire_dtype": torch.int8}, "wire_dtype=torch.int8"),
        ({"wire_dtype": torch.float16}, "outside of the range of fp16"),
        ({"wire_dtype": torch.float8_e4m3fn}, "wire_dtype=torch.float8_e4m3fn"),
        ({"wire_dtype": "bfloat16"}, "wire_dtype='bfloat16'"),
        ({"bucket_bytes": 0}, "bucket_bytes=0"),
        ({"bucket_bytes": "1GiB"}, "bucket_bytes='1GiB'"),
        ({"memory_bytes": -1}, "memory_bytes=-1"),
        ({"memory_bytes": "1GiB"}, "memory_bytes='1GiB'"),
        ({"memory_bytes": float("nan")}, "memory_bytes=nan"),
        ({"memory_bytes": float("inf")}, "memory_bytes=inf"),
        ({"memory_bytes": 1e9 + 0.5}, "memory_bytes=1000000000.5 must be a positive whole"),
        ({"overlap_bytes": None}, "overlap_bytes=None"),
        ({"overlap_backward": "false"}, "overlap_backward='false'"),
        ({"replicas": "many"}, "replicas='many'"),
        ({"replica_group": "node"}, "replica_group='node'"),
        ({"replica_group": 5}, "replica_group=5"),
        ({"cost": "h200"}, "cost='h200'"),
    ],
)
def test_an_unsuitable_exchange_option_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ExchangeOptions(**settings)


def test_bytes_may_be_whole_floats() -> None:
    options = ExchangeOptions(memory_bytes=1e9, bucket_bytes=torch.tensor(1024))
    assert (options.memory_bytes, options.bucket_bytes) == (10**9, 1024)
    assert type(options.memory_bytes) is type(options.bucket_bytes) is int


@pytest.mark.parametrize("exchange", [{"memory_bytes": 2**30}, {}, torch.bfloat16, "auto"])
def test_what_are_no_exchange_options_is_named(exchange: object) -> None:
    check_exchange(None)
    check_exchange(ExchangeOptions())
    with pytest.raises(ValueError, match=re.escape(f"exchange={exchange!r}")):
        check_exchange(exchange)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (nn.Parameter(torch.zeros(5)), r"layers\.w: shape \(5,\)"),
        (nn.Parameter(torch.zeros(2, 3, 4, 5)), r"layers\.w: shape \(2, 3, 4, 5\)"),
        (matrix(dtype=torch.int64), r"layers\.w: dtype torch.int64"),
        (matrix(dtype=torch.complex64), r"layers\.w: dtype torch.complex64"),
    ],
)
def test_an_unsuitable_parameter_is_named_and_not_added(param: nn.Parameter, message: str) -> None:
    optimizer = FlashMuon([("first", matrix())])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("layers.w", param)]})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 1


@pytest.mark.parametrize(
    ("group", "kind", "message"),
    [
        ({"update_rule": "adamw", "aux_lr": 0.1}, ValueError, "call it 'lr' in a group"),
        ({"matrix_views": {"*": None}}, ValueError, "'matrix_views': call it 'matrix_view'"),
        ({"nonfinite": "skip"}, ValueError, "nonfinite='skip' is FlashMuon's, not a group's"),
        ({"matrix_view": "qkv"}, ValueError, "matrix_view='qkv' must be a view"),
        ({"matrix_view": {"*": "qkv"}}, ValueError, "matrix_view={'[*]': 'qkv'} must be a view"),
    ],
)
def test_an_unsuitable_group_is_not_added(
    group: dict[str, object], kind: type[Exception], message: str
) -> None:
    optimizer = FlashMuon([matrix()])
    with pytest.raises(kind, match=message):
        optimizer.add_param_group({"params": [matrix(4, 4)], **group})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


def snapshot(optimizer: FlashMuon) -> list[Tensor]:
    values = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    values += [value for state in optimizer.state.values() for value in state.values()]
    return [(v.to_local() if isinstance(v, DTensor) else v).clone() for v in values]


def expect_error(optimizer: FlashMuon, kinds: tuple[type[Exception], ...], *words: str) -> None:
    """The step fails on this rank with these words, and changes nothing."""
    before = snapshot(optimizer)
    try:
        optimizer.step()
    except kinds as error:
        text = str(error)
    else:
        raise AssertionError("step() did not fail")
    assert all(word in text for word in words), text
    after = snapshot(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "triton"}, ["backend='triton'", "TRITON_INTERPRET=1"]),
        ({"backend": "triton", "ns_dtype": torch.float64}, ["backend='triton'", "float64"]),
        ({"backend": "quack"}, ["backend='quack'", "backend='auto'"]),
        ({"backend": "quack", "update_rule": "normuon"}, ["backend='quack'", "backend='auto'"]),
    ],
)
def test_a_backend_that_cannot_run_is_found_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: list[str]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from flashns_dist.orthogonalize.kernels import triton_interpreter

    monkeypatch.setattr(triton_interpreter, "interpreting", lambda: False)
    param = matrix()
    param.grad = torch.ones_like(param)
    optimizer = FlashMuon([param], **settings)
    for _ in range(2):
        expect_error(optimizer, (ValueError, ImportError), *words)
    optimizer.param_groups[0]["backend"] = "auto"
    optimizer.step()
    optimizer.param_groups[0].update(settings)
    expect_error(optimizer, (ValueError, ImportError), *words)


def test_the_backend_of_a_rule_that_does_not_orthogonalize_does_not_matter() -> None:
    param = matrix()
    param.grad = torch.ones_like(param)
    FlashMuon([param], update_rule="dion", backend="quack", ns_dtype=torch.float64).step()


def one_rank_lacks_a_backend() -> None:
    named = with_gradients(sharded([torch.ones(6, 8)]))
    optimizer = FlashMuon(named)
    if dist.get_rank() == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup, "check_backend", missing)
            expect_error(optimizer, (ImportError,), "not installed")
    else:
        expect_error(optimizer, (RuntimeError,), "rank 1", "not installed")


def missing(*_: object) -> None:
    raise ImportError("quack is not installed")


def test_a_backend_that_one_rank_lacks_stops_every_rank(ranks: RankPool) -> None:
    ranks.run(2, one_rank_lacks_a_backend)


def sharded(values: list[Tensor]) -> list[tuple[str, nn.Parameter]]:
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    return [
        (f"layer.{i}", nn.Parameter(distribute_tensor(v.to(rank_device()), mesh, [Shard(0)])))
        for i, v in enumerate(values)
    ]


def with_gradients(named: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    for _, param in named:
        param.grad = torch.ones_like(param)
    return named


def nonfinite_gradient_on_one_rank(value: float, rule: str) -> None:
    named = with_gradients(sharded([torch.ones(6, 8), torch.ones(4, 4)]))
    optimizer = FlashMuon([{"params": named, "update_rule": rule}])
    if dist.get_rank() == 1:
        named[1][1].grad.to_local()[0, 0] = value
    expect_error(optimizer, (FloatingPointError,), "layer.1", "NaN or an infinity")
    skipping = FlashMuon([{"params": named, "update_rule": rule}], nonfinite="skip")
    before = snapshot(skipping)
    skipping.step()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(skipping), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_a_nonfinite_gradient_stops_every_rank(ranks: RankPool, value: float, rule: str) -> None:
    ranks.run(2, nonfinite_gradient_on_one_rank, value, rule)


def test_a_large_finite_gradient_is_not_an_overflow() -> None:
    param = matrix()
    param.grad = torch.full((6, 8), 1e30)
    FlashMuon([param]).step()
    assert param.isfinite().all()


def copy_with_a_process_group() -> None:
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = FlashMuon([param], exchange=ExchangeOptions(replica_group=dist.group.WORLD))
    found = copy.deepcopy(optimizer)
    assert found.exchange_options == optimizer.exchange_options
    (theirs,) = found.param_groups[0]["params"]
    theirs.grad = torch.eye(3, 4)
    found.step()
    assert not torch.equal(theirs, param)


def test_an_optimizer_with_a_process_group_is_copied(ranks: RankPool) -> None:
    ranks.run(1, copy_with_a_process_group)


def different_order() -> None:
    named = with_gradients(sharded([torch.ones(6, 8), torch.ones(6, 8), torch.ones(4, 4)]))
    if dist.get_rank() == 1:
        named[0], named[1] = named[1], named[0]
    optimizer = FlashMuon(named)
    expect_error(optimizer, (RuntimeError,), "ranks [1]", "'layer.0' on rank 0", "'layer.1'")


def different_number() -> None:
    named = with_gradients(sharded([torch.ones(6, 8), torch.ones(6, 8), torch.ones(4, 4)]))
    optimizer = FlashMuon(named if dist.get_rank() else named[:2])
    expect_error(optimizer, (RuntimeError,), "ranks [1, 2]", "parameter 2", "layer.2")


def different_rule() -> None:
    named = with_gradients(sharded([torch.ones(6, 8), torch.ones(4, 4)]))
    rule = "adamw" if dist.get_rank() == 1 else "muon"
    optimizer = FlashMuon([{"params": named[:1]}, {"params": named[1:], "update_rule": rule}])
    expect_error(optimizer, (RuntimeError,), "ranks [1]", "'layer.1'")


def different_method() -> None:
    named = with_gradients(sharded([torch.ones(6, 8)]))
    optimizer = FlashMuon(named, method="gram" if dist.get_rank() else "standard")
    expect_error(optimizer, (RuntimeError,), "ranks [1]", "'layer.0'", "setting")


def different_auxiliary_order() -> None:
    values = torch.ones(4, 4, device=rank_device())
    named = [(f"layer.{i}", nn.Parameter(values.clone())) for i in range(2)]
    if dist.get_rank() == 1:
        named.reverse()
    optimizer = FlashMuon([{"params": with_gradients(named), "update_rule": "adamw"}])
    expect_error(optimizer, (RuntimeError,), "ranks [1]", "'layer.0' on rank 0", "'layer.1'")


def different_scalars() -> None:
    scales = [lambda rows, cols, by=by: by * rows for by in (1.0, 2.0)]
    for settings in (
        {"lr": [0.1, 0.2]},
        {"momentum": [0.9, 0.8]},
        {"weight_decay": [0.1, 0.0]},
        {"nesterov": [True, False]},
        {"nonfinite": ["raise", "skip"]},
        {"cautious": [True, False]},
        {"adjust_lr_fn": ["original", "none"]},
        {"adjust_lr_fn": scales},
    ):
        named = with_gradients(sharded([torch.ones(6, 8)]))
        mine = {key: values[dist.get_rank()] for key, values in settings.items()}
        optimizer = FlashMuon(named, **mine)
        expect_error(optimizer, (RuntimeError,), "ranks [1]", "'layer.0'", "setting")


def equal_functions() -> None:
    """Of ranks whose other matrices differ: each has one of its own."""
    rank = dist.get_rank()
    functions = [lambda rows, cols: float(rows), lambda n, m: n]
    shared, own = torch.ones(6, 8), torch.ones(4 + rank, 3, device=rank_device())
    mesh = [init_device_mesh(rank_device().type, (2, 1), mesh_dim_names=("a", "b"))["b"]]
    alone = nn.Parameter(distribute_tensor(own, mesh[0], [Replicate()], src_data_rank=None))
    named = with_gradients([*sharded([shared]), ("own", alone)])
    FlashMuon(named, adjust_lr_fn=functions[rank]).step()


def test_functions_are_compared_by_their_values(ranks: RankPool) -> None:
    ranks.run(2, equal_functions)


@pytest.mark.parametrize(
    ("body", "world_size"),
    [
        (different_order, 2),
        (different_number, 3),
        (different_rule, 2),
        (different_method, 2),
        (different_auxiliary_order, 2),
        (different_scalars, 2),
    ],
)
def test_disagreeing_ranks_all_say_so(ranks: RankPool, body: object, world_size: int) -> None:
    ranks.run(world_size, body)


def wrong_gradient_placement() -> None:
    named = with_gradients(sharded([torch.ones(6, 8), torch.ones(4, 4)]))
    optimizer = FlashMuon(named)
    param = named[1][1]
    if dist.get_rank() == 0:
        local = torch.ones(4, 4, device=rank_device())
        param.grad = DTensor.from_local(local, param.device_mesh, [Partial()])
        expect_error(optimizer, (ValueError,), "layer.1", "placements", "Partial")
    else:
        expect_error(optimizer, (RuntimeError,), "rank 0 cannot step", "layer.1")


def test_one_ranks_unsuitable_gradient_stops_all(ranks: RankPool) -> None:
    ranks.run(2, wrong_gradient_placement)


def unreduced_replicas() -> None:
    param = nn.Parameter(torch.ones(6, 8, device=rank_device()))
    optimizer = FlashMuon([("weight", param)])
    param.grad = torch.full_like(param, 1.0 + dist.get_rank())
    expect_error(optimizer, (RuntimeError,), "weight", "differs between ranks", "DDP")
    alone = FlashMuon([("weight", param)], exchange=ExchangeOptions(replica_group=None))
    alone.step()


def test_replicas_with_different_gradients_are_refused(ranks: RankPool) -> None:
    ranks.run(2, unreduced_replicas)


def replica_without_gradient() -> None:
    mesh = init_device_mesh(rank_device().type, (2, 2))
    value = torch.ones(6, 8, device=rank_device())
    param = nn.Parameter(distribute_tensor(value, mesh, [Replicate(), Shard(0)]))
    optimizer = FlashMuon([("weight", param)])
    param.grad = None if dist.get_rank() == 2 else torch.ones_like(param)
    expect_error(optimizer, (RuntimeError,), "weight", "ranks [2] have no gradient", "ranks [0]")


def test_a_replica_without_its_gradient_is_refused(ranks: RankPool) -> None:
    ranks.run(4, replica_without_gradient)


def partial_parameter() -> None:
    mesh = init_device_mesh(rank_device().type, (2,))
    local = torch.ones(6, 8, device=rank_device())
    param = nn.Parameter(DTensor.from_local(local, mesh, [Partial()]))
    optimizer = FlashMuon([("weight", param)])
    expect_error(optimizer, (NotImplementedError,), "weight", "Partial", "Redistribute")


def test_a_partial_parameter_is_refused(ranks: RankPool) -> None:
    ranks.run(2, partial_parameter)


def differing_meshes() -> None:
    """Parameters on different meshes of one world are exchanged on their own groups."""
    size = dist.get_world_size()
    device = rank_device().type
    world = init_device_mesh(device, (size,))
    rows = init_device_mesh(device, (2, 2), mesh_dim_names=("replicate", "shard"))
    shapes = ((9, 12), (8, 6), (5, 7))
    meshes = (world, rows, rows["shard"])
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator).to(rank_device()) for s in shapes]
    alone = [nn.Parameter(v.clone()) for v in values]
    placed = [
        nn.Parameter(distribute_tensor(v, m, [Shard(0)] * m.ndim, src_data_rank=None))
        for v, m in zip(values, meshes, strict=True)
    ]
    reference = FlashMuon(alone, lr=0.1, exchange=ExchangeOptions(replica_group=None))
    optimizer = FlashMuon(placed, lr=0.1)
    for p, q in zip(alone, placed, strict=True):
        p.grad = torch.sin(torch.arange(p.numel(), device=p.device).float()).view(p.shape)
        q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements, src_data_rank=None)
    reference.step()
    optimizer.step()
    for p, q in zip(alone, placed, strict=True):
        assert torch.equal(p.detach(), q.full_tensor().detach())


def test_meshes_of_one_world_may_differ(ranks: RankPool) -> None:
    ranks.run(4, differing_meshes)


def nonfinite_in_a_smaller_group(row_axis_too: bool) -> None:
    """What one group finds reaches ranks that share no group with it."""
    device = rank_device().type
    mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("a", "b"))
    placed = []
    for axis in ("a", "b") if row_axis_too else ("b",):
        value = torch.ones(6, 8, device=rank_device())
        param = nn.Parameter(distribute_tensor(value, mesh[axis], [Shard(0)], src_data_rank=None))
        placed.append((f"weight.{axis}", param))
    if not row_axis_too:
        value = torch.ones(6, 8, device=rank_device())
        everywhere = distribute_tensor(value, mesh, [Shard(0), Shard(1)], src_data_rank=None)
        placed.append(("weight.ab", nn.Parameter(everywhere)))
    optimizer = FlashMuon(with_gradients(placed))
    if dist.get_rank() == 3:
        dict(placed)["weight.b"].grad.to_local().fill_(float("nan"))
    expect_error(optimizer, (FloatingPointError,), "NaN or an infinity")


@pytest.mark.parametrize("row_axis_too", [True, False])
def test_a_nonfinite_gradient_stops_other_groups_too(ranks: RankPool, row_axis_too: bool) -> None:
    ranks.run(4, nonfinite_in_a_smaller_group, row_axis_too)


def wrong_at_the_end_of_a_chain(kind: str) -> None:
    """Ranks 1 and 2 share no group, and neither do their groups: 0 and 3 do."""
    device, rank = rank_device().type, dist.get_rank()
    pairs = init_device_mesh(device, (2, 2), mesh_dim_names=("a", "b"))["b"]
    middle = DeviceMesh(device, [0, 3])
    placed = []
    for name, mesh in (("pairs", pairs), ("middle", middle)):
        if name == "pairs" or rank in (0, 3):
            value = torch.ones(6, 8, device=rank_device())
            param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None))
            placed.append((name, param))
    optimizer = FlashMuon(with_gradients(placed))
    param = dict(placed)["pairs"]
    if kind == "nonfinite":
        if rank == 2:
            param.grad.to_local().fill_(float("nan"))
        expect_error(optimizer, (FloatingPointError,), "NaN or an infinity")
        return
    if rank == 2:
        local = torch.ones(6, 8, device=rank_device())
        param.grad = DTensor.from_local(local, pairs, [Partial()])
    word = "placements" if rank == 2 else "no rank does"
    expect_error(optimizer, (ValueError, RuntimeError), word)


@pytest.mark.parametrize("kind", ["nonfinite", "placement"])
def test_one_gradient_stops_a_chain_of_groups(ranks: RankPool, kind: str) -> None:
    ranks.run(4, wrong_at_the_end_of_a_chain, kind)


def wrong_in_a_valley(source: int) -> None:
    """A chain of groups whose order goes down and up again: one round does not reach its ends."""
    device, rank = rank_device().type, dist.get_rank()
    placed = []
    for number, pair in enumerate(([0, 1], [0, 3], [1, 2])):
        group = dist.new_group(pair)
        if rank in pair:
            # A name of its own, or torch takes the mesh of the same ranks that it knows already.
            name = f"chain{source}{number}"
            mesh = DeviceMesh.from_group(group, device, mesh_dim_names=(name,))
            value = torch.ones(6, 8, device=rank_device())
            param = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None))
            placed.append((f"w{number}", param))
    optimizer = FlashMuon(with_gradients(placed))
    optimizer.step()
    if rank == source:
        placed[-1][1].grad.to_local().fill_(float("nan"))
    expect_error(optimizer, (FloatingPointError,), "NaN or an infinity")


@pytest.mark.parametrize("source", [2, 3])
def test_errors_reach_all_along_any_chain(ranks: RankPool, source: int) -> None:
    ranks.run(4, wrong_in_a_valley, source)


def mesh_of_some_ranks() -> None:
    """Ranks 0 and 1 make the group of their mesh without rank 2, whose mesh has one dim."""
    world, device = dist.group.WORLD, rank_device()
    rank = dist.get_rank()
    bound = world.bound_device_id
    world.bound_device_id = torch.device(device.type, device.index or 0)  # as device_id= does
    try:
        ranks = [[0], [1]] if rank < 2 else [2]
        mesh = DeviceMesh(device.type, ranks, _init_backend=False)
        value = torch.sin(torch.arange(48, device=device).float()).view(6, 8)
        rows = 3 if rank < 2 else 6
        local = value[rank % 2 * 3 :][:rows].clone()
        placements = [Shard(0)] * mesh.ndim
        if rank == 2:
            param = nn.Parameter(local)
            param.grad = local.cos()
        else:
            param = nn.Parameter(DTensor.from_local(local, mesh, placements, run_check=False))
            param.grad = DTensor.from_local(local.cos(), mesh, placements, run_check=False)
        FlashMuon([("weight", param)], exchange=ExchangeOptions(replica_group=None)).step()
        assert world.bound_device_id is not None
    finally:
        world.bound_device_id = bound
    result = getattr(param, "_local_tensor", param).detach()
    every = [torch.empty(6, 8, device=device) for _ in range(3)]
    dist.all_gather(every, torch.cat([result, result])[:6].contiguous())
    assert torch.equal(torch.cat([every[0][:3], every[1][:3]]), every[2])


def test_a_mesh_of_some_ranks_needs_no_others(ranks: RankPool) -> None:
    ranks.run(3, mesh_of_some_ranks)


def groups_of_meshes() -> tuple[int, int]:
    """How many groups are kept after a step on a mesh of two axes, and how many of other worlds."""
    ranks = [[0], [1]] if dist.get_rank() < 2 else [[2]]
    mesh = DeviceMesh(rank_device().type, ranks, _init_backend=False)
    local = torch.ones(3, 8, device=rank_device())
    if dist.get_rank() < 2:
        param = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)] * 2, run_check=False))
        param.grad = DTensor.from_local(local, mesh, [Shard(0)] * 2, run_check=False)
        FlashMuon([param], exchange=ExchangeOptions(replica_group=None)).step()
    return len(binding._GROUPS), sum(k[0] is not dist.group.WORLD for k in binding._GROUPS)


def test_groups_of_worlds_that_are_gone_are_not_kept(ranks: RankPool) -> None:
    """They would hold threads and communicators."""
    for _ in range(2):
        assert ranks.run(3, groups_of_meshes)[:2] == [(1, 0)] * 2


def too_little_memory() -> None:
    """On every rank, also on those that store none of the matrices that do not fit."""
    rank, size = dist.get_rank(), dist.get_world_size()
    pair = (rank // 2 * 2, rank // 2 * 2 + 1)
    groups = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    mesh = DeviceMesh.from_group(groups[rank // 2], rank_device().type)
    large = torch.ones(64, 64) if rank < 2 else torch.ones(4, 4)
    local = distribute_tensor(large.to(rank_device()), mesh, [Shard(0)], src_data_rank=None)
    named = [(f"of {pair}", nn.Parameter(local)), *sharded([torch.ones(4, 4)])]
    optimizer = FlashMuon(with_gradients(named), exchange=ExchangeOptions(memory_bytes=8192))
    words = ("memory_bytes=8192 is too little", "of (0, 1), 64 x 64, takes most", "at least ")
    for _ in range(2):
        expect_error(optimizer, (ValueError,) if rank < 2 else (RuntimeError,), *words)


def test_too_little_memory_is_an_error_on_every_rank(ranks: RankPool) -> None:
    ranks.run(4, too_little_memory)


def other_memory_on_one_rank() -> None:
    for ours, theirs in ((1, 2**30), (2**29, 2**30), (None, 2**30)):
        options = ExchangeOptions(memory_bytes=theirs if dist.get_rank() == 1 else ours)
        optimizer = FlashMuon(with_gradients(sharded([torch.ones(6, 8)])), exchange=options)
        expect_error(optimizer, (RuntimeError,), "ranks [1] disagree", "layer.0")


def test_another_cap_on_memory_on_one_rank_is_an_error(ranks: RankPool) -> None:
    ranks.run(2, other_memory_on_one_rank)


def fewer_matrices_than_were_planned() -> None:
    """A cap that all matrices keep to does not stop a step of some of them."""
    values = [torch.ones(4 + 4 * (i % 3), 16) for i in range(9)]
    named = with_gradients(sharded(values))
    with pytest.raises(ValueError, match="too little") as error:
        FlashMuon(named, exchange=ExchangeOptions(memory_bytes=1)).step()
    least = int(str(error.value).split("memory_bytes to at least ")[1].split(",")[0])
    optimizer = FlashMuon(named, exchange=ExchangeOptions(memory_bytes=least))
    optimizer.step()
    for _, param in named[:4]:
        param.grad = None
    optimizer.step()


def test_steps_of_some_matrices_keep_to_the_cap_too(ranks: RankPool) -> None:
    ranks.run(2, fewer_matrices_than_were_planned)


def disagreement_after_the_first_step(change: str) -> str:
    """The error of a step before which one rank alone has changed something."""
    named = sharded([torch.ones(6, 8)])
    scale = 1.0
    function = (lambda rows, cols: scale) if change == "closure" else "original"
    optimizer = FlashMuon(with_gradients(named), lr=0.1, adjust_lr_fn=function)
    optimizer.step()
    before = [p.detach().clone() for _, p in named]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for _, p in named]
    saved = copy.deepcopy(optimizer.state_dict())
    if dist.get_rank() == 1:
        (group,) = optimizer.param_groups
        if change == "lr":
            group["lr"] = 0.2
        elif change == "negative":
            group["lr"] = -1.0
        elif change == "betas":
            group["betas"] = (0.8, 0.95)
        elif change == "coefficients":
            group["ns_coefficients"] = KELLER
        elif change == "rule":
            group["update_rule"] = "normuon"
        elif change == "list":
            group["update_rule"] = ["muon"]
        elif change == "view":
            group["matrix_view"] = Equal(4)
        elif change == "function":
            group["adjust_lr_fn"] = lambda shape: 1.0
        elif change == "closure":
            scale = 2.0
        elif change == "group":
            optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3, 3)))]})
        else:
            optimizer.load_state_dict(saved)
    message = ""
    try:
        optimizer.step()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        message = str(error)
        for (_, p), old, momentum in zip(named, before, momenta, strict=True):
            assert torch.equal(p.detach().to_local(), old.to_local())
            assert torch.equal(
                optimizer.state[p]["momentum_buffer"].to_local(), momentum.to_local()
            )
        with pytest.raises((RuntimeError, ValueError)):  # again, and nobody waits
            optimizer.step()
    return message


@pytest.mark.parametrize(
    ("change", "on_one", "on_other"),
    [
        ("lr", "ranks [1] disagree", "ranks [1] disagree"),
        ("betas", "ranks [1] disagree", "ranks [1] disagree"),
        ("coefficients", "ranks [1] disagree", "ranks [1] disagree"),
        ("negative", "lr=-1.0", "ranks [1] disagree"),
        ("rule", "its update_rule was 'muon'", "rank 1 cannot step"),
        ("list", "its update_rule was 'muon' and is now ['muon']", "rank 1 cannot step"),
        ("view", "6 rows cannot be cut into 4 equal blocks", "ranks [1] disagree"),
        ("function", "adjust_lr_fn(6, 8) failed", "ranks [1] disagree"),
        ("closure", "ranks [1] disagree", "ranks [1] disagree"),
        ("group", "ranks [1] disagree", "ranks [1] disagree"),
        ("loaded", "", ""),
    ],
)
def test_what_one_rank_changes_later_is_an_error_on_all(
    ranks: RankPool, change: str, on_one: str, on_other: str
) -> None:
    others, one = ranks.run(2, disagreement_after_the_first_step, change)
    assert on_one in one
    assert on_other in others
    assert bool(one) == bool(on_one)


UNSUITABLE_RULES: dict[str, Any] = {"list": ["muon"], "dict": {}, "none": None}


def errors_in_one_group(kind: str) -> str:
    """Four ranks, two pairs with a matrix each, and one tensor that all have."""
    rank = dist.get_rank()
    first = rank // 2 * 2
    mesh = init_device_mesh(rank_device().type, (2, 2), mesh_dim_names=("other", "pair"))["pair"]
    local = distribute_tensor(
        torch.ones(6, 8).to(rank_device()), mesh, [Shard(0)], src_data_rank=None
    )
    pair = nn.Parameter(local)
    plain = nn.Parameter(torch.ones(4, 4, device=rank_device()))
    matrices: dict[str, Any] = {"params": [(f"of {first}", pair)]}
    if rank == 1 and kind == "setting":
        matrices["nesterov"] = False
    optimizer = FlashMuon([matrices, {"params": [("plain", plain)]}])
    if rank == 1 and kind == "value":
        optimizer.param_groups[0]["lr"] = -1.0
    if rank == 1 and kind in ("muoon", "normuon", "dion", "dion2"):
        optimizer.param_groups[0]["update_rule"] = kind
    if rank == 1 and kind in UNSUITABLE_RULES:
        optimizer.param_groups[0]["update_rule"] = UNSUITABLE_RULES[kind]
    if rank == 1 and kind == "view":
        optimizer.param_groups[0]["matrix_view"] = Equal(4)
    if rank == 1 and kind == "shard":
        pair._local_tensor = pair._local_tensor[:1]
    pair.grad, plain.grad = torch.ones_like(pair), torch.ones_like(plain)
    try:
        optimizer.step()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        with pytest.raises(type(error)):  # again, and nobody waits
            optimizer.step()
        if kind == "view":
            optimizer.param_groups[0]["matrix_view"] = None
            optimizer.step()
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("setting", "ranks [1] disagree"),
        ("value", "lr=-1.0"),
        ("muoon", "update_rule='muoon'"),
        ("list", "update_rule=['muon']: use one of"),
        ("dict", "update_rule={}: use one of"),
        ("none", "update_rule=None: use one of"),
        ("normuon", "the group lacks 'beta2'"),
        ("dion", "the group lacks 'rank_fraction'"),
        ("dion2", "the group lacks 'fraction'"),
        ("shard", "its placements"),
        ("view", "6 rows cannot be cut into 4 equal blocks"),
    ],
)
def test_setups_that_are_wrong_are_errors_on_all_ranks(
    ranks: RankPool, kind: str, expected: str
) -> None:
    messages = ranks.run(4, errors_in_one_group, kind)
    assert expected in messages[1]
    assert all(messages)


@pytest.mark.parametrize(
    "function",
    [lambda shape: 1.0, lambda n, m: None, lambda n, m: float("nan"), lambda n, m: -1.0],
)
def test_a_learning_rate_scale_that_fails_changes_nothing(function: Any) -> None:
    param = nn.Parameter(torch.ones(3, 4))
    param.grad = torch.ones(3, 4)
    optimizer = FlashMuon([param], adjust_lr_fn=function)
    with pytest.raises(ValueError, match=r"adjust_lr_fn\(3, 4\)"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, 4))
    assert float(optimizer.state[param]["step"]) == 0
    assert not optimizer.state[param]["momentum_buffer"].any()


def test_parameters_may_be_replaced_or_moved_before_the_first_step() -> None:
    """As accelerate does for FSDP2."""
    start = torch.arange(12.0).view(3, 4).sin()
    expected = nn.Parameter(start.clone())
    expected.grad = torch.ones(3, 4)
    FlashMuon([expected]).step()

    old, new = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(start.clone())
    optimizer = FlashMuon([old])
    optimizer.param_groups[0]["params"] = [new]
    new.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(new, expected)
    assert set(optimizer.state) == {new}

    layer = nn.Linear(4, 3, bias=False, device="meta")
    optimizer = FlashMuon(layer.named_parameters())
    layer.to_empty(device="cpu")  # makes new parameters
    layer.weight.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = [layer.weight]
    with torch.no_grad():
        layer.weight.copy_(start)
    optimizer.step()
    assert torch.equal(layer.weight, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_may_move_before_the_first_step() -> None:
    layer = nn.Linear(4, 3, bias=False)
    optimizer = FlashMuon(layer.parameters())
    layer.cuda()
    layer.weight.grad = torch.ones(3, 4, device="cuda")
    optimizer.step()
    assert optimizer.state[layer.weight]["momentum_buffer"].is_cuda


@pytest.mark.parametrize("rule", ["muon", "normuon", "dion", "dion2", "adamw", "lion"])
def test_a_state_on_another_device_is_found_before_anything_changes(rule: str) -> None:
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = FlashMuon([(f"layer.{i}", p) for i, p in enumerate(params)], update_rule=rule)
    for param in params:
        param.grad = torch.eye(3, 4)
    optimizer.step()
    state = optimizer.state[params[1]]
    name = next(key for key in reversed(state) if key != "step")
    kept, state[name] = state[name], state[name].to("meta")
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=f"layer.1: its state '{name}' is on meta"):
        optimizer.step()
    state[name] = kept
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
        assert float(optimizer.state[param]["step"]) == 1
    optimizer.step()


def test_a_state_that_is_gone_is_found_before_anything_changes() -> None:
    weight, bias = nn.Parameter(torch.eye(3, 4)), nn.Parameter(torch.ones(4))
    groups = [{"params": [("weight", weight)]}]
    optimizer = FlashMuon([*groups, {"params": [("bias", bias)], "update_rule": "adamw"}])
    for param in (weight, bias):
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = weight.detach().clone()
    del optimizer.state[bias]
    with pytest.raises(ValueError, match=r"bias: its state.* is gone"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert float(optimizer.state[weight]["step"]) == 1


def test_the_list_of_parameters_is_followed() -> None:
    one, two = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = FlashMuon([one, two])
    for param in (one, two):
        param.grad = torch.ones(3, 4)
    optimizer.step()
    kept = two.detach().clone()
    optimizer.param_groups[0]["params"] = [one]
    before = one.detach().clone()
    optimizer.step()
    assert torch.equal(two, kept)
    assert not torch.equal(one, before)
    optimizer.param_groups[0]["params"].append(two)
    optimizer.step()
    assert not torch.equal(two, kept)


def test_a_list_of_parameters_with_other_names_is_refused() -> None:
    one, two = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = FlashMuon([("one", one)])
    optimizer.param_groups[0]["params"].append(two)
    one.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="2 parameters and 1 param_names"):
        optimizer.step()
    optimizer.param_groups[0]["param_names"].append("two")
    optimizer.step()
