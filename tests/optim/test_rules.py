"""Every update rule against an unsharded reference of a few lines, in float64, over many steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from math import ceil, sqrt

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.layout import Equal
from flashns_dist.optim.binding import AUXILIARY
from flashns_dist.optim.rules import AUXILIARY_RULES
from flashns_dist.optim.rules.dion import orthonormal
from flashns_dist.testing.pool import RankPool, rank_device

KELLER = (3.4445, -4.775, 2.0315)
SHAPES = ((20, 33), (40, 11), (32, 32), (6, 7))
NUM_STEPS = 12
LR, DECAY, MU = 0.02, 0.1, 0.9
PRECISE = {
    "method": "standard",
    "ns_coefficients": KELLER,
    "ns_dtype": torch.float64,
    "exchange": ExchangeOptions(wire_dtype=torch.float64),
}


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]


def gradient(index: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Rows of very different size, that change slowly: as in training."""
    fixed = torch.Generator().manual_seed(index)
    generator = torch.Generator().manual_seed(100 * step + index)
    rows = torch.rand(shape[0], 1, generator=fixed, dtype=torch.float64) ** 4
    mean = torch.randn(shape, generator=fixed, dtype=torch.float64)
    return rows * (mean + torch.randn(shape, generator=generator, dtype=torch.float64))


def run(params: list[nn.Parameter], **settings: object) -> FlashMuon:
    optimizer = FlashMuon(params, lr=LR, weight_decay=DECAY, momentum=MU, **PRECISE, **settings)
    for step in range(NUM_STEPS):
        for index, param in enumerate(params):
            param.grad = gradient(index, step, tuple(param.shape))
        optimizer.step()
    return optimizer


def polar(x: Tensor) -> Tensor:
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = KELLER[0] * x + (KELLER[1] * gram + KELLER[2] * gram @ gram) @ x
    return x


Update = Callable[[Tensor, dict[str, Tensor], int], Tensor]


def reference(update: Update, decay: float = LR * DECAY) -> list[Tensor]:
    """Weights after ``w <- (1 - decay) w - lr scale(shape) update(g, state, step)``."""
    weights = [p.detach().clone() for p in parameters()]
    for index, weight in enumerate(weights):
        state: dict[str, Tensor] = {}
        for step in range(NUM_STEPS):
            change = update(gradient(index, step, tuple(weight.shape)), state, step)
            weight.mul_(1 - decay)
            weight.sub_(LR * sqrt(max(1, weight.shape[0] / weight.shape[1])) * change)
    return weights


def nesterov(g: Tensor, state: dict[str, Tensor]) -> Tensor:
    m = state["m"] = MU * state.get("m", torch.zeros_like(g)) + (1 - MU) * g
    return MU * m + (1 - MU) * g


def check(params: list[nn.Parameter], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for param, weight, start in zip(params, expected, parameters(), strict=True):
        moved = (weight - start.detach()).norm()
        assert moved > 0.05
        assert (param.detach() - weight).norm() < tolerance * moved


def unit(x: Tensor, dim: int) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True)


NORMALIZED = {
    "frobenius": lambda o: o,
    "rows": lambda o: unit(o, 1),
    "columns": lambda o: unit(o, 0),
    "columns_rows": lambda o: unit(unit(o, 0), 1),
    "rows_columns": lambda o: unit(unit(o, 1), 0),
}


@pytest.mark.parametrize("mode", NORMALIZED)
def test_muon_renormalizes_to_the_exact_norm(mode: str) -> None:
    params = parameters()
    run(params, renormalize=mode)

    def update(g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        o = NORMALIZED[mode](polar(nesterov(g, state)))
        return o / o.norm() * sqrt(min(o.shape))

    check(params, reference(update))


def test_muon_equilibrates_rows_before_the_iteration() -> None:
    params = parameters()
    run(params, equilibrate=True)
    check(params, reference(lambda g, state, step: polar(unit(nesterov(g, state), 1))))


def test_zero_rows_and_tiny_rows_equilibrate() -> None:
    param = nn.Parameter(torch.zeros(4, 6))
    optimizer = FlashMuon([param], lr=1.0, equilibrate=True, renormalize="rows", momentum=0.0)
    param.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    param.grad[1] = 0
    param.grad[2] *= 1e-30
    optimizer.step()
    norms = param.detach().norm(dim=1)
    assert norms[1] == 0
    assert torch.allclose(norms[[0, 2, 3]], norms[0].expand(3), rtol=0.02)


def test_weights_decay_whatever_the_learning_rate() -> None:
    params = parameters()
    run(params, independent_decay=True)
    update = lambda g, state, step: polar(nesterov(g, state))  # noqa: E731
    check(params, reference(update, decay=DECAY))
    frozen = [nn.Parameter(torch.ones(4, 5))]
    optimizer = FlashMuon(frozen, lr=0.0, weight_decay=0.25, independent_decay=True)
    frozen[0].grad = torch.randn(4, 5)
    optimizer.step()
    assert torch.equal(frozen[0].detach(), torch.full((4, 5), 0.75))


def test_normuon_follows_its_formula() -> None:
    params = parameters()
    optimizer = run(params, update_rule="normuon", beta2=0.8)

    def update(g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        o = polar(nesterov(g, state))
        v = state["v"] = 0.8 * state.get("v", torch.zeros(len(o))) + 0.2 * (o * o).mean(1)
        scaled = o / (v.sqrt() + 1e-8)[:, None]
        return scaled * o.norm() / scaled.norm()

    check(params, reference(update))
    moments = [optimizer.state[p]["row_moment"] for p in params]
    assert [m.shape for m in moments] == [(p.shape[0],) for p in params]
    assert all((m > 0).all() for m in moments)


def test_adamuon_follows_its_formula() -> None:
    params = parameters()
    run(params, update_rule="adamuon", beta2=0.8)

    def update(g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        o = polar(nesterov(g, state).sign())
        v = state["v"] = 0.8 * state.get("v", torch.zeros_like(o)) + 0.2 * o * o
        scaled = o / (v.sqrt() + 1e-8)
        return scaled / scaled.norm() * sqrt(min(o.shape))

    check(params, reference(update), tolerance=1e-7)  # squares have 30 bits


def dion2_update(fraction: float, dim: int | None, beta2: float | None) -> Update:
    def update(g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        along = int(g.shape[0] > g.shape[1]) if dim is None else dim
        m = state["m"] = state.get("m", torch.zeros_like(g)) + g
        sums = m.abs().sum(1 - along)
        kept = sums.argsort(descending=True)[: ceil(fraction * len(sums))].sort().values
        o = polar(m.index_select(along, kept))
        m[(kept,) if along == 0 else (slice(None), kept)] *= MU
        if beta2 is not None:
            v = state.setdefault("v", torch.zeros(len(g), dtype=g.dtype))
            v[kept] = beta2 * v[kept] + (1 - beta2) * (o * o).mean(1)
            scaled = o / (v[kept].sqrt() + 1e-8)[:, None]
            o = scaled * o.norm() / scaled.norm()
        return torch.zeros_like(g).index_copy_(along, kept, o)

    return update


@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
@pytest.mark.parametrize(("select", "dim"), [("shorter", None), ("rows", 0), ("columns", 1)])
def test_dion2_follows_its_formula(fraction: float, select: str, dim: int | None) -> None:
    params = parameters()
    run(params, update_rule="dion2", fraction=fraction, select=select)
    check(params, reference(dion2_update(fraction, dim, None)))


def test_dion2_with_normuon_follows_its_formula() -> None:
    params = parameters()
    run(params, update_rule="dion2", normuon=True, beta2=0.8)
    check(params, reference(dion2_update(0.25, 0, 0.8)))


def test_equal_rows_are_selected_by_their_index() -> None:
    param = nn.Parameter(torch.zeros(8, 16))
    optimizer = FlashMuon([param], update_rule="dion2", lr=1.0, weight_decay=0.0)
    param.grad = torch.ones(8, 16).tril(12).roll(3, 1)
    param.grad[3] = 100.0
    param.grad[[0, 2, 4, 5, 6, 7]] = 5.0
    optimizer.step()
    assert param.detach().any(dim=1).nonzero().flatten().tolist() == [0, 3]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_dion2_selects_the_same_at_any_scale(scale: float) -> None:
    chosen = []
    for factor in (1.0, scale):
        param = nn.Parameter(torch.zeros(16, 32))
        optimizer = FlashMuon([param], update_rule="dion2", lr=1.0, weight_decay=0.0)
        param.grad = gradient(0, 0, (16, 32)).float() * factor
        optimizer.step()
        chosen.append(param.detach().any(dim=1).nonzero().flatten().tolist())
    assert len(chosen[0]) == 4
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_dion_follows_its_formula(fraction: float) -> None:
    params = parameters()
    start = FlashMuon(parameters(), update_rule="dion", rank_fraction=fraction)
    factors = iter([state["right_factor"].clone() for state in start.state.values()])
    optimizer = run(params, update_rule="dion", rank_fraction=fraction)

    def update(g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        if step == 0:
            state["m"], state["q"] = torch.zeros_like(g), next(factors).view(g.shape[1], -1)
        m = state["m"].add_(g)
        p = torch.linalg.qr(m @ state["q"]).Q
        r = m.T @ p
        m.sub_((1 - MU) * p @ r.T)
        state["q"] = unit(r, 0)
        return p @ state["q"].T

    check(params, reference(update), tolerance=1e-6)
    for param in params:
        rank = max(1, round(fraction * min(param.shape)))
        assert optimizer.state[param]["right_factor"].numel() == param.shape[1] * rank


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_dion_moves_the_same_at_any_scale(scale: float) -> None:
    """In fp32, where the squares of such numbers are 0 or infinite."""
    found = []
    for factor in (1.0, scale):
        param = nn.Parameter(torch.zeros(20, 33))
        optimizer = FlashMuon([param], update_rule="dion", lr=LR)
        for step in range(3):
            param.grad = gradient(0, step, (20, 33)).float() * factor
            optimizer.step()
        found.append(param.detach())
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)


def test_dion_takes_gradients_of_low_rank() -> None:
    """Directions without a gradient move no weight, and can come back."""
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = FlashMuon([param], update_rule="dion", rank_fraction=0.5, lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    column, row = torch.randn(12, 1, generator=generator), torch.randn(1, 20, generator=generator)
    for _ in range(3):
        param.grad = column * row
        before = param.detach().clone()
        optimizer.step()
        singular = torch.linalg.svdvals((before - param.detach()).double())
        assert abs(float(singular[0]) - 1) < 1e-3
        assert singular[1] < 1e-3
    for _ in range(8):
        param.grad = torch.randn(12, 20, generator=generator)
        before = param.detach().clone()
        optimizer.step()
    assert torch.linalg.matrix_rank((before - param.detach()).double(), rtol=0.05) == 6


def test_dion_takes_parameters_of_several_dtypes() -> None:
    shapes = ((6, 8), (8, 6), (6, 8), (5, 7))
    dtypes = (torch.float32, torch.float64, torch.float64, torch.bfloat16)
    start = [gradient(i, 0, shape).to(dtypes[i]) for i, shape in enumerate(shapes)]

    def stepped(*chosen: int) -> list[nn.Parameter]:
        params = [nn.Parameter(start[i].clone()) for i in chosen]
        optimizer = FlashMuon(params, update_rule="dion")
        for step in range(3):
            for i, param in zip(chosen, params, strict=True):
                param.grad = gradient(i, step, shapes[i]).to(dtypes[i])
            optimizer.step()
        return params

    alone = [stepped(i)[0] for i in range(len(shapes))]
    for mine, theirs in zip(stepped(*range(len(shapes))), alone, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5)


def dion_with_compressed_gradients() -> None:
    """Replicas with gradients of their own train as one process on their mean."""
    rank, size = dist.get_rank(), dist.get_world_size()
    device = rank_device()
    alone, replicas = ([nn.Parameter(p.to(device)) for p in parameters()] for _ in range(2))
    settings = {"update_rule": "dion", "lr": LR, "momentum": MU}
    reference = FlashMuon(alone, exchange=ExchangeOptions(replica_group=None), **settings)
    optimizer = FlashMuon(replicas, compressed_gradients=True, **settings)
    for step in range(6):
        for index, (a, b) in enumerate(zip(alone, replicas, strict=True)):
            shape = tuple(a.shape)
            gradients = [gradient(index, size * step + r, shape).to(device) for r in range(size)]
            a.grad, b.grad = sum(gradients) / size, gradients[rank]
        reference.step()
        optimizer.step()
        if step == 3:
            before = [optimizer.state[p]["momentum_buffer"].clone() for p in replicas]
            optimizer.average_momenta()
            for a, b, old in zip(alone, replicas, before, strict=True):
                averaged = optimizer.state[b]["momentum_buffer"]
                torch.testing.assert_close(averaged, reference.state[a]["momentum_buffer"])
                assert not torch.allclose(averaged, old)
    for a, b in zip(alone, replicas, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    with pytest.raises(RuntimeError, match="differs between ranks"):
        FlashMuon(replicas, **settings).step()


def test_dion_averages_its_products_instead_of_gradients(ranks: RankPool) -> None:
    ranks.run(3, dion_with_compressed_gradients)


def cut_with_compressed_gradients() -> None:
    mesh = init_device_mesh(rank_device().type, (2,))
    value = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
    optimizer = FlashMuon(
        [("w", nn.Parameter(value))], update_rule="dion", compressed_gradients=True
    )
    with pytest.raises(NotImplementedError, match="w: compressed_gradients=True averages"):
        optimizer.step()


def test_compressed_gradients_are_for_replicas(ranks: RankPool) -> None:
    ranks.run(2, cut_with_compressed_gradients)


@pytest.mark.parametrize("columns", [1, 7, 40])
def test_columns_are_made_orthonormal(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, columns, generator=generator) * torch.logspace(0, -12, columns)
    q = orthonormal(x)
    assert (q.T @ q - torch.eye(columns)).norm() < 1e-10
    triangular = q.T @ x.double()
    assert (triangular.tril(-1).abs() <= 1e-9 * x.double().norm(dim=0)).all()
    repeated = orthonormal(torch.cat([x, x[:, :1]], dim=1))
    assert (repeated[:, -1] == 0).all()


@pytest.mark.parametrize("rule", ["muon", "normuon", "adamuon", "dion2", "dion"])
def test_a_zero_gradient_changes_nothing(rule: str) -> None:
    scaled = {"equilibrate": True, "renormalize": "columns_rows"}
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = FlashMuon(
        [param], update_rule=rule, weight_decay=0.0, **({} if rule == "dion" else scaled)
    )
    param.grad = torch.zeros(4, 6)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(4, 6))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("rule", ["muon", "normuon", "adamuon", "dion2", "dion", "adamw", "lion"])
def test_the_default_device_does_not_matter(rule: str, rounding: str) -> None:
    def stepped(device: str) -> list[Tensor]:
        params = [nn.Parameter(p.detach().bfloat16()) for p in parameters()]
        with torch.device(device):
            optimizer = FlashMuon(params, update_rule=rule, rounding=rounding)
            for step in range(3):
                for index, param in enumerate(params):
                    with torch.device("cpu"):
                        param.grad = gradient(index, step, tuple(param.shape)).bfloat16()
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
        return [param.detach() for param in params]

    assert all(map(torch.equal, stepped("meta"), stepped("cpu")))


def test_lion_follows_its_formula() -> None:
    start = [p.detach() for p in parameters(((7,), (5, 9), ()))]
    params = [nn.Parameter(p.clone()) for p in start]
    group = {"params": params, "update_rule": "lion", "betas": (0.9, 0.99), "lr": 0.01}
    optimizer = FlashMuon([{**group, "weight_decay": 0.1}])
    momenta = [torch.zeros_like(p) for p in start]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for param, weight, m in zip(params, start, momenta, strict=True):
            g = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = g
            weight.sub_(0.01 * ((0.9 * m + 0.1 * g).sign() + 0.1 * weight))
            m.copy_(0.99 * m + 0.01 * g)
        optimizer.step()
    for param, weight in zip(params, start, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=1e-12, atol=1e-12)


def test_low_precision_lion_keeps_an_fp32_momentum() -> None:
    param = nn.Parameter(torch.ones(8).bfloat16())
    optimizer = FlashMuon([{"params": [param], "update_rule": "lion", "lr": 0.25}])
    param.grad = torch.full((8,), 3.0).bfloat16()
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32
    assert torch.equal(param.detach(), torch.full((8,), 0.75).bfloat16())


def step_together_and_apart(
    step: int,
    together: Sequence[nn.Parameter],
    apart: Sequence[nn.Parameter],
    optimizers: Sequence[FlashMuon],
) -> None:
    """A step of all optimizers, with the same gradients for both copies of the parameters."""
    for index, (a, b) in enumerate(zip(together, apart, strict=True)):
        a.grad, b.grad = (gradient(index, step, tuple(a.shape)) for _ in range(2))
    for optimizer in optimizers:
        optimizer.step()


def test_groups_with_different_rules_are_one_optimizer() -> None:
    together, apart = parameters(), parameters()
    rules = ("muon", "normuon", "normuon", "muon")
    groups = [
        {"params": [param], "update_rule": rule}
        for param, rule in zip(together, rules, strict=True)
    ]
    optimizers = [FlashMuon(groups, **PRECISE)]
    optimizers += [
        FlashMuon([param], update_rule=rule, **PRECISE)
        for param, rule in zip(apart, rules, strict=True)
    ]
    for step in range(3):
        step_together_and_apart(step, together, apart, optimizers)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("muon", {"method": "aol", "ns_coefficients": None}),
        ("muon", {"ns_coefficients": "polar_express"}),
        ("muon", {"equilibrate": True}),
        ("muon", {"matrix_view": Equal(2)}),
        ("normuon", {"beta2": 0.5}),
        ("dion2", {"fraction": 1.0}),
    ],
)
def test_a_groups_settings_may_change_between_steps(rule: str, change: dict[str, object]) -> None:
    """Also where its matrices were batched with another group's."""
    shapes = ((20, 33), (20, 33))
    together, apart = parameters(shapes), parameters(shapes)
    optimizers = [FlashMuon([{"params": [p]} for p in together], update_rule=rule, **PRECISE)]
    optimizers += [FlashMuon([param], update_rule=rule, **PRECISE) for param in apart]
    for step in range(3):
        if step == 1:
            optimizers[0].param_groups[1].update(change)
            state = optimizers[2].state_dict()
            settings = {**PRECISE, "update_rule": rule, **change}
            view = {"matrix_view": settings.pop("matrix_view", None)}
            optimizers[2] = FlashMuon([{"params": [apart[1]], **view}], **settings)
            state["param_groups"][0].update(change)
            optimizers[2].load_state_dict(state)
        step_together_and_apart(step, together, apart, optimizers)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "svd"}, "method='svd'"),
        ({"backend": "numpy"}, "backend='numpy'"),
        ({"renormalize": "twice"}, "renormalize='twice'"),
        ({"update_rule": "normuon"}, "group 1: its update_rule was 'muon' and is now 'normuon'"),
        ({"update_rule": "adamw"}, "group 1: its update_rule was 'muon' and is now 'adamw'"),
    ],
)
def test_an_unsuitable_change_stops_the_step(change: dict[str, str], message: str) -> None:
    params = parameters(((6, 7), (6, 7)))
    optimizer = FlashMuon([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    kept = optimizer.param_groups[1]
    optimizer.param_groups[1] = {**kept, **change}
    before = copy.deepcopy((params, dict(optimizer.state)))
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.step()
    torch.testing.assert_close(list(params), list(before[0]))
    for param, old in zip(params, before[1].values(), strict=True):
        torch.testing.assert_close(optimizer.state[param], old)
    optimizer.param_groups[1] = kept
    optimizer.step()
    assert not torch.equal(params[1], before[0][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_rule": "shampoo"}, "update_rule='shampoo'"),
        ({"renormalize": "twice"}, "renormalize='twice'"),
        ({"update_rule": "normuon", "beta2": 1.0}, "beta2=1.0"),
        ({"independent_decay": True, "weight_decay": 1.0}, "weight_decay=1.0"),
        ({"update_rule": "adamuon", "eps": 0.0}, "eps=0.0"),
        ({"update_rule": "dion2", "fraction": 0.0}, "fraction=0.0"),
        ({"update_rule": "dion2", "select": "diagonals"}, "select='diagonals'"),
        ({"update_rule": "dion2", "select": "columns", "normuon": True}, 'select="columns"'),
        ({"update_rule": "dion", "rank_fraction": 1.5}, "rank_fraction=1.5"),
        ({"betta2": 0.9}, "betta2 is neither an argument of FlashMuon"),
    ],
)
def test_an_unsuitable_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FlashMuon([nn.Parameter(torch.ones(3, 4))], **settings)


def test_a_setting_of_another_rule_is_refused() -> None:
    group = {"params": [nn.Parameter(torch.ones(3, 4))], "update_rule": "muon", "beta2": 0.9}
    with pytest.raises(ValueError, match=r"beta2=0.9 is a setting of the update rules \['normuon'"):
        FlashMuon([group])


def test_another_rules_checkpoint_is_refused() -> None:
    param = nn.Parameter(torch.ones(3, 4))
    saved = FlashMuon([param]).state_dict()
    with pytest.raises(ValueError, match="'muon', the optimizer's has 'normuon'"):
        FlashMuon([param], update_rule="normuon").load_state_dict(saved)


def test_the_names_of_auxiliary_rules_agree() -> None:
    assert set(AUXILIARY) == set(AUXILIARY_RULES)
