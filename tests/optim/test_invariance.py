"""The weights do not depend on the sharding or on the number of ranks, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.layout import even_flat_layout, flat_layout, leading_blocks
from flashns_dist.optim import BoundParameter
from flashns_dist.optim.settings import init_state
from flashns_dist.plan import CostModel, Plan, planner
from flashns_dist.testing.pool import RankPool, rank_device

R, S0, S1 = Replicate(), Shard(0), Shard(1)


@dataclass(frozen=True)
class Scenario:
    """Matrices with their placements on a mesh (None: a plain tensor, as under DDP)."""

    mesh: tuple[int, ...]
    matrices: tuple[tuple[tuple[int, ...], tuple[object, ...] | None], ...]
    missing: tuple[tuple[int, int, tuple[int, ...]], ...] = ()  # (step, matrix, ranks)
    options: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    num_steps: int = 3


def full(shape: tuple[int, ...], *seed: int) -> Tensor:
    number = hash(seed) % (2**31)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(rank_device())


def place(value: Tensor, mesh: object, placements: tuple[object, ...] | None) -> Tensor:
    if placements is None:
        return value.clone()
    return distribute_tensor(value.clone(), mesh, placements, src_data_rank=None)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def optimizer_of(params: list[nn.Parameter], scenario: Scenario, **options: object) -> FlashMuon:
    exchange = ExchangeOptions(**{**scenario.options, **options})
    settings = {key: value for key, value in scenario.settings.items() if key != "dtype"}
    return FlashMuon(params, lr=0.05, exchange=exchange, **settings)


def compare_with_one_process(scenario: Scenario, mesh: object = None) -> None:
    """Train sharded and alone, on the same gradients; the weights must be equal in every bit."""
    mesh = mesh or init_device_mesh(rank_device().type, scenario.mesh)
    shapes = [shape for shape, _ in scenario.matrices]
    dtype = scenario.settings.get("dtype", torch.float32)
    starts = [full(shape, 0, i).to(dtype) for i, shape in enumerate(shapes)]
    alone = [nn.Parameter(value.clone()) for value in starts]
    sharded = [
        nn.Parameter(place(value, mesh, placements))
        for value, (_, placements) in zip(starts, scenario.matrices, strict=True)
    ]
    reference = optimizer_of(alone, scenario, replica_group=None)
    optimizer = optimizer_of(sharded, scenario)
    missing = {(step, index): ranks for step, index, ranks in scenario.missing}
    for step in range(scenario.num_steps):
        for index, (shape, placements) in enumerate(scenario.matrices):
            gradient = full(shape, 1 + step, index).to(dtype)
            absent = missing.get((step, index), ())
            kept = place(gradient, mesh, placements)
            if absent and placements is not None:  # the shards of these ranks count as zero
                mask = place(torch.ones_like(gradient), mesh, placements)
                if dist.get_rank() in absent:
                    mask.to_local().zero_()
                gradient = gradient * mask.full_tensor()
            everyone = len(absent) == dist.get_world_size()
            alone[index].grad = None if everyone else gradient
            sharded[index].grad = None if dist.get_rank() in absent else kept
        reference.step()
        optimizer.step()
        for param in sharded:
            param.grad = None
    for index, (ours, theirs) in enumerate(zip(sharded, alone, strict=True)):
        assert is_equal(whole(ours.detach()), theirs.detach(), scenario), f"matrix {index} differs"
        for name, value in reference.state[alone[index]].items():
            found = whole(optimizer.state[ours][name])
            assert is_equal(found, value, scenario), f"{name} of {index} differs"
    assert not any(torch.equal(p, s) for p, s in zip(alone, starts, strict=True) if p.numel())


def is_equal(ours: Tensor, theirs: Tensor, scenario: Scenario) -> bool:
    """In every bit; for Dion, whose partial products are summed over ranks, up to rounding."""
    if scenario.settings.get("update_rule") != "dion":
        return torch.equal(ours, theirs)
    return torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)


SHAPES = ((20, 36), (36, 20), (33, 17), (24, 24), (7, 50))

SCENARIOS = {
    "replicated": (Scenario((0,), tuple((s, None) for s in SHAPES)), (2, 3, 4)),
    "replicated as DTensor": (Scenario((0,), tuple((s, (R,)) for s in SHAPES)), (2, 3)),
    "rows": (Scenario((0,), tuple((s, (S0,)) for s in SHAPES)), (2, 3, 4)),
    "columns": (Scenario((0,), tuple((s, (S1,)) for s in SHAPES)), (2, 3, 4)),
    "empty shards": (Scenario((0,), (((2, 30), (S0,)), ((30, 3), (S1,)), ((5, 9), (S0,)))), (4,)),
    "one matrix": (Scenario((0,), (((16, 40), (S0,)),)), (2, 4)),
    "more matrices than ranks": (
        Scenario((0,), tuple(((12 + i % 5, 20 + i % 3), (S0,)) for i in range(20))),
        (3, 4),
    ),
    "many buckets": (
        Scenario(
            (0,),
            tuple(((12 + i % 5, 20 + i % 3), (S0,)) for i in range(20)),
            options={"bucket_bytes": 1024},
        ),
        (2, 4),
    ),
    "experts": (
        Scenario((0,), (((6, 10, 16), (S0,)), ((5, 10, 16), (S1,)), ((3, 16, 8), (Shard(2),)))),
        (2, 4),
    ),
    "hybrid": (Scenario((2, 2), tuple((s, (R, S0)) for s in SHAPES)), (4,)),
    "hybrid, repeated": (
        Scenario((2, 2), tuple((s, (R, S0)) for s in SHAPES), options={"replicas": "repeat"}),
        (4,),
    ),
    "hybrid, shared": (
        Scenario((2, 2), tuple((s, (R, S0)) for s in SHAPES), options={"replicas": "share"}),
        (4,),
    ),
    "replicated, repeated": (
        Scenario((0,), tuple((s, None) for s in SHAPES), options={"replicas": "repeat"}),
        (3,),
    ),
    "two axes, both dims": (Scenario((2, 2), tuple((s, (S0, S1)) for s in SHAPES)), (4,)),
    "two axes, one dim": (Scenario((2, 2), tuple((s, (S0, S0)) for s in SHAPES)), (4,)),
    "mixed": (
        Scenario(
            (2, 2),
            (
                ((20, 36), (S0, R)),
                ((36, 20), (R, S1)),
                ((33, 17), None),
                ((24, 24), (S1, S0)),
                ((7, 50), (R, R)),
                ((4, 9, 12), (S0, R)),
            ),
        ),
        (4,),
    ),
    "gradients missing": (
        Scenario(
            (0,),
            tuple((s, (S0,)) for s in SHAPES),
            missing=((0, 1, (0,)), (1, 0, (0, 1)), (1, 3, (1,)), (2, 4, (0, 1))),
        ),
        (2,),
    ),
    "no gradient at all": (
        Scenario(
            (0,),
            tuple((s, (S0,)) for s in SHAPES[:2]),
            missing=((1, 0, (0, 1)), (1, 1, (0, 1))),
        ),
        (2,),
    ),
    "fp32 wire": (
        Scenario((0,), tuple((s, (S0,)) for s in SHAPES), options={"wire_dtype": torch.float32}),
        (3,),
    ),
    "bf16 parameters": (
        Scenario((0,), tuple((s, (S0,)) for s in SHAPES), settings={"dtype": torch.bfloat16}),
        (3,),
    ),
    "stochastic rounding": (
        Scenario(
            (2, 2),
            tuple((s, (S1, S0)) for s in SHAPES),
            settings={"dtype": torch.bfloat16, "rounding": "stochastic"},
        ),
        (4,),
    ),
    "cautious, plain momentum": (
        Scenario(
            (0,),
            tuple((s, (S0,)) for s in SHAPES),
            settings={"cautious": True, "nesterov": False, "adjust_lr_fn": "spectral"},
        ),
        (2,),
    ),
}
CASES = [(name, size) for name, (_, sizes) in SCENARIOS.items() for size in sizes]


RULES: dict[str, dict[str, object]] = {
    "muon": {"equilibrate": True, "renormalize": "columns_rows", "independent_decay": True},
    "normuon": {"update_rule": "normuon"},
    "adamuon": {"update_rule": "adamuon"},
    "dion": {"update_rule": "dion", "dtype": torch.float64},
    "dion2": {"update_rule": "dion2"},
    "dion2 with normuon": {"update_rule": "dion2", "fraction": 0.4, "normuon": True},
}


NO_OTHER_LAYOUT = (
    "one matrix",
    "more matrices than ranks",
    "no gradient at all",
    "fp32 wire",
    "cautious, plain momentum",
)


def compare_scenarios(settings: dict[str, object], names: list[str]) -> None:
    """Several scenarios in one process group, each mesh made once (torch caches by its shape)."""
    shapes = {SCENARIOS[name][0].mesh for name in names}
    device, size = rank_device().type, dist.get_world_size()
    meshes = {
        shape: init_device_mesh(device, shape if len(shape) > 1 else (size,))
        for shape in sorted(shapes, reverse=True)
    }
    for name in names:
        values = vars(SCENARIOS[name][0])
        if "dtype" in settings and "dtype" in values["settings"]:
            continue
        merged = {**values["settings"], **settings}
        try:
            compare_with_one_process(
                Scenario(**{**values, "settings": merged}), meshes[values["mesh"]]
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("rule", RULES)
def test_every_rules_weights_equal_those_of_one_process(
    ranks: RankPool, rule: str, world_size: int
) -> None:
    names = [
        name
        for name, (_, sizes) in SCENARIOS.items()
        if world_size in sizes and name not in NO_OTHER_LAYOUT
    ]
    ranks.run(world_size, compare_scenarios, RULES[rule], names, timeout=280.0)


@pytest.mark.parametrize(("name", "world_size"), CASES, ids=[f"{n}-{w}" for n, w in CASES])
def test_weights_equal_those_of_one_process(ranks: RankPool, name: str, world_size: int) -> None:
    scenario = SCENARIOS[name][0]
    mesh = scenario.mesh if len(scenario.mesh) > 1 else (world_size,)
    values = {**vars(scenario), "mesh": mesh}
    ranks.run(world_size, compare_with_one_process, Scenario(**values))


def compare_flat_shards(seed: int, settings: dict[str, object]) -> None:
    """Matrices in one flat buffer, cut at arbitrary places, as ZeRO and Megatron store them."""
    size, rank = dist.get_world_size(), dist.get_rank()
    device = rank_device()
    generator = torch.Generator().manual_seed(seed)
    total = sum(a * b for a, b in SHAPES)
    cuts = sorted(
        int(torch.randint(0, total + 1, (), generator=generator)) for _ in range(size - 1)
    )
    cuts = [0, *cuts, total]
    values = torch.randn(total, generator=generator).to(device)
    flat = nn.Parameter(values[cuts[rank] : cuts[rank + 1]].clone())
    optimizer = FlashMuon([{"params": [nn.Parameter(torch.zeros(2, 2))]}], lr=0.05, **settings)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.state.clear()
    blocks = tuple(block for shape in SHAPES for block in leading_blocks(shape))
    optimizer.state[flat] = init_state(flat, optimizer.param_groups[0], blocks)

    def bind() -> list[BoundParameter]:
        bound, begin = [], 0
        for number, shape in enumerate(SHAPES):
            end = begin + shape[0] * shape[1]
            spans = []
            for r in range(size):
                low, high = max(cuts[r], begin), min(cuts[r + 1], end)
                offset = low - cuts[r]
                spans.append(((low - begin, high - begin, offset),) if low < high else ())
            layout = flat_layout(shape, tuple(spans))
            group = dist.group.WORLD
            blocks = leading_blocks(shape)
            bound.append(
                BoundParameter(
                    f"matrix {number}", flat, 0, layout, group, rank, torch.Tensor.detach, blocks
                )
            )
            begin = end
        return bound

    optimizer.bind(bind)
    alone, begin = [], 0
    for shape in SHAPES:
        numel = shape[0] * shape[1]
        alone.append(nn.Parameter(values[begin : begin + numel].view(shape).clone()))
        begin += numel
    reference = FlashMuon(alone, lr=0.05, exchange=ExchangeOptions(replica_group=None), **settings)
    for _ in range(3):
        gradient = torch.randn(total, generator=generator).to(device)
        flat.grad = gradient[cuts[rank] : cuts[rank + 1]].clone()
        begin = 0
        for param in alone:
            param.grad = gradient[begin : begin + param.numel()].view(param.shape).clone()
            begin += param.numel()
        optimizer.step()
        reference.step()
    expected = torch.cat([p.detach().flatten() for p in alone])
    found, mine = flat.detach(), expected[cuts[rank] : cuts[rank + 1]]
    if settings.get("update_rule") == "dion":  # in fp32, a matrix of rank 7 and Q of rank 2 to 8
        assert torch.allclose(found, mine, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, mine)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_flat_shards_give_the_weights_of_one_process(ranks: RankPool, world_size: int) -> None:
    for seed in range(3):
        ranks.run(world_size, compare_flat_shards, seed, {})


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "muon"])
def test_flat_shards_follow_every_rule(ranks: RankPool, rule: str) -> None:
    for world_size in (3, 4):
        settings = {key: value for key, value in RULES[rule].items() if key != "dtype"}
        ranks.run(world_size, compare_flat_shards, world_size, settings)


def test_even_flat_layout_covers_everything() -> None:
    layout = even_flat_layout((7, 11), 4)
    assert sum(layout.local_numel(r) for r in range(4)) == 77


def compare_at_depth(depth: int, settings: dict[str, object], names: list[str]) -> None:
    """Scenarios of all kinds with so many buckets under way, where there are as many."""
    taken = set()

    def of_depth(plans: list[Plan]) -> Plan:
        chosen = [plan for plan in plans if plan.depth == depth] or plans
        plan = max(chosen, key=lambda plan: len(plan.buckets))
        taken.add((plan.depth, len(plan.buckets) > depth))
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "_fastest", of_depth)
        patch.setattr(planner, "DEFAULT_MEMORY_BYTES", 2**40)
        patch.setattr(planner, "SMALLEST_BUCKET_BYTES", 512)
        compare_scenarios(settings, names)
    assert (depth, True) in taken


@pytest.mark.parametrize("rule", ["plain muon", "dion2"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_any_number_of_buckets_under_way_gives_the_weights_of_one_process(
    ranks: RankPool, depth: int, rule: str
) -> None:
    names = [name for name, (_, sizes) in SCENARIOS.items() if 4 in sizes]
    ranks.run(4, compare_at_depth, depth, RULES.get(rule, {}), names)


SLOW_WIRE = CostModel(
    batch_seconds=0.0,
    bucket_seconds=0.0,
    step_seconds=0.0,
    exchange_seconds=1e-9,
    link_bytes_per_second=1e8,
)


def compare_caps(scenario: Scenario) -> set[int]:
    """How many buckets are under way under caps from the least that does to none."""
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    caps: list[dict[str, int]] = [{}, {"bucket_bytes": 1024}]
    with pytest.raises(ValueError, match="memory_bytes=1 is too little") as error:
        train_capped(scenario, mesh, {"memory_bytes": 1})
    least = int(str(error.value).split("memory_bytes to at least ")[1].split(",")[0])
    caps += [{"memory_bytes": least + least * n // 4} for n in range(9)]
    caps += [{"memory_bytes": 2 * least, "bucket_bytes": 512}]
    depths, expected = set(), None
    for cap in caps:
        weights, depth = train_capped(scenario, mesh, cap)
        expected = expected or weights
        depths.add(depth)
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True)), cap
    return depths


def train_capped(
    scenario: Scenario, mesh: object, options: dict[str, int]
) -> tuple[list[Tensor], int]:
    params = [
        nn.Parameter(place(full(shape, 0, i), mesh, placements))
        for i, (shape, placements) in enumerate(scenario.matrices)
    ]
    optimizer = optimizer_of(params, scenario, cost=SLOW_WIRE, **options)
    for step in range(2):
        for i, (param, (shape, placements)) in enumerate(
            zip(params, scenario.matrices, strict=True)
        ):
            param.grad = place(full(shape, 1 + step, i), mesh, placements)
        optimizer.step()
    (made,) = optimizer._steps.values()
    return [whole(param.detach()) for param in params], made.exchange.plan.depth


@pytest.mark.parametrize("rule", ["muon", "normuon", "adamuon"])
def test_the_cap_on_memory_changes_no_weight(ranks: RankPool, rule: str) -> None:
    matrices = tuple(((12 + i % 5, 20 + i % 3), (S0,)) for i in range(20))
    scenario = Scenario((0,), matrices, settings={"update_rule": rule})
    found = ranks.run(2, compare_caps, scenario)
    assert found[0] == found[1]
    assert found[0] == {1, 2, 3}
