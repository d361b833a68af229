"""FlashMuon against torch's own optimizers, and its options against their formulas."""

from __future__ import annotations

import copy
from math import sqrt

import pytest
import torch
from torch import nn

from flashns_dist import ExchangeOptions, FlashMuon, orthogonalize

KELLER = (3.4445, -4.775, 2.0315)
SHAPES = ((20, 33), (40, 11), (32, 32), (1, 7))
FP32 = ExchangeOptions(wire_dtype=torch.float32)


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(params: list[nn.Parameter], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator) for p in params]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], num_steps: int) -> None:
    for step in range(num_steps):
        for param, gradient in zip(params, gradients(params, step), strict=True):
            param.grad = gradient.to(param.dtype)
        optimizer.step()


def distance(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_torch_muon_gives_the_same_weights(nesterov: bool, adjust_lr_fn: str | None) -> None:
    ours, theirs, exact = parameters(), parameters(), parameters()
    shared = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    run(
        FlashMuon(
            ours,
            **shared,
            adjust_lr_fn=adjust_lr_fn,
            method="standard",
            ns_coefficients=KELLER,
            ns_dtype=torch.bfloat16,
        ),
        ours,
        30,
    )
    run(torch.optim.Muon(theirs, **shared, adjust_lr_fn=adjust_lr_fn), theirs, 30)
    # The bar is the rounding of torch's own bf16 iteration: what fp32 products change in it.
    run(
        FlashMuon(
            exact,
            **shared,
            adjust_lr_fn=adjust_lr_fn,
            method="standard",
            ns_coefficients=KELLER,
            ns_dtype=torch.float32,
            exchange=FP32,
        ),
        exact,
        30,
    )
    rounding = distance(theirs, exact)
    moved = distance(theirs, parameters())
    assert moved > 0.05
    assert distance(ours, theirs) <= 2 * rounding < 0.05 * moved


def plain_muon(params: list[nn.Parameter], num_steps: int, mu: float, nesterov: bool) -> None:
    """Muon as torch.optim.Muon writes it, in float64: its bf16 iteration hides small mistakes."""
    weights = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(w) for w in weights]
    for step in range(num_steps):
        for weight, buffer, gradient in zip(weights, buffers, gradients(params, step), strict=True):
            buffer.lerp_(gradient.double(), 1 - mu)
            x = gradient.double().lerp(buffer, mu) if nesterov else buffer
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = KELLER[0] * x + (KELLER[1] * gram + KELLER[2] * gram @ gram) @ x
            weight.mul_(1 - 0.02 * 0.1)
            weight.sub_(0.02 * sqrt(max(1, weight.shape[0] / weight.shape[1])) * x)
    for param, weight in zip(params, weights, strict=True):
        param.detach().copy_(weight)


@pytest.mark.parametrize("nesterov", [True, False])
def test_every_step_is_that_of_the_formula(nesterov: bool) -> None:
    ours, theirs = parameters(), parameters()
    settings = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1, "nesterov": nesterov}
    precise = {"method": "standard", "ns_coefficients": KELLER, "ns_dtype": torch.float32}
    run(FlashMuon(ours, **settings, **precise, exchange=FP32), ours, 10)
    plain_muon(theirs, 10, mu=0.8, nesterov=nesterov)
    assert distance(theirs, parameters()) > 0.02
    assert distance(ours, theirs) < 1e-5  # ten steps of fp32 rounding


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_auxiliary_parameters_follow_torch_adamw(weight_decay: float) -> None:
    shapes = ((7,), (5, 9), (2, 3, 4), ())
    ours, theirs = parameters(shapes), parameters(shapes)
    settings = {"lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": weight_decay}
    run(FlashMuon([{"params": ours, "update_rule": "adamw", **settings}]), ours, 25)
    run(torch.optim.AdamW(theirs, **settings), theirs, 25)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strided", ["weight", "gradient"])
def test_auxiliary_parameters_may_have_any_strides(strided: str) -> None:
    memory = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    around = memory[:, 8:].clone()
    ours = [nn.Parameter(memory[:, :8] if strided == "weight" else memory[:, :8].contiguous())]
    theirs = [nn.Parameter(memory[:, :8].clone())]
    optimizer = FlashMuon([{"params": ours, "update_rule": "adamw", "lr": 0.01}])
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for seed in range(3):
        gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
        ours[0].grad = gradient.T.contiguous().T if strided == "gradient" else gradient.clone()
        theirs[0].grad = gradient
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(memory[:, 8:], around)


def test_low_precision_auxiliary_parameters_keep_fp32_moments() -> None:
    ours = [nn.Parameter(p.detach().bfloat16()) for p in parameters(((9, 4),))]
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    run(FlashMuon([{"params": ours, "update_rule": "adamw", "lr": 1e-2}]), ours, 1)
    theirs[0].grad = ours[0].grad.float()
    torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0).step()
    assert torch.equal(ours[0].detach(), theirs[0].detach().bfloat16())


@pytest.mark.parametrize(
    ("adjust_lr_fn", "factor"),
    [
        ("original", lambda n, m: sqrt(max(1, n / m))),
        (None, lambda n, m: sqrt(max(1, n / m))),
        ("match_rms_adamw", lambda n, m: 0.2 * sqrt(max(n, m))),
        ("spectral", lambda n, m: sqrt(n / m)),
        ("none", lambda n, m: 1.0),
        (lambda rows, cols: 3.0 / cols, lambda n, m: 3.0 / m),
    ],
)
def test_one_step_moves_along_the_scaled_polar_factor(adjust_lr_fn: object, factor: object) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = FlashMuon(
        params, lr=0.1, weight_decay=0.0, adjust_lr_fn=adjust_lr_fn, exchange=FP32
    )
    run(optimizer, params, 1)
    for param, start, gradient in zip(params, before, gradients(params, 0), strict=True):
        moved = (start - param.detach()) / (0.1 * factor(*param.shape))
        torch.testing.assert_close(moved, orthogonalize(gradient), rtol=1e-4, atol=2e-5)


def test_cautious_decay_spares_weights_that_the_update_grows() -> None:
    plain, decayed = parameters(), parameters()
    run(FlashMuon(plain, lr=0.1, weight_decay=0.0), plain, 1)
    run(FlashMuon(decayed, lr=0.1, weight_decay=0.5, cautious=True), decayed, 1)
    for start, a, b in zip(parameters(), plain, decayed, strict=True):
        update = start - a
        expected = a - 0.05 * start * (update * start > 0)
        torch.testing.assert_close(b, expected, rtol=1e-5, atol=1e-6)
        assert 0 < int((update * start > 0).sum()) < max(start.numel(), 2)


def test_a_stack_of_matrices_is_updated_as_its_matrices() -> None:
    stack = parameters(((4, 6, 10),))
    apart = [nn.Parameter(matrix.clone()) for matrix in stack[0].detach()]
    together, single = FlashMuon(stack, lr=0.1), FlashMuon(apart, lr=0.1)
    for step in range(3):
        gradient = gradients(stack, step)[0]
        stack[0].grad = gradient
        for index, param in enumerate(apart):
            param.grad = gradient[index]
        together.step()
        single.step()
    assert torch.equal(stack[0].detach(), torch.stack([p.detach() for p in apart]))


def test_stochastic_rounding_keeps_small_updates_on_average() -> None:
    nearest, stochastic = (nn.Parameter(torch.ones(64, 64).bfloat16()) for _ in range(2))
    for param, rounding in ((nearest, "nearest"), (stochastic, "stochastic")):
        optimizer = FlashMuon([param], lr=2e-3, weight_decay=0.0, rounding=rounding, momentum=0.0)
        for _ in range(20):
            param.grad = torch.eye(64)[torch.arange(64).roll(7)].bfloat16()
            optimizer.step()
    where = torch.eye(64)[torch.arange(64).roll(7)].bool()
    assert (nearest.detach()[where] == 1).all(), "each step is below half a unit in the last place"
    moved = 1 - stochastic.detach().float()[where].mean()
    assert 0.5 * 0.04 < moved < 1.5 * 0.04
    assert (stochastic.detach()[where] < 1).all(), "the bits differ from step to step"
    assert (stochastic.detach()[~where] - 1).abs().mean() < 1e-3


def test_state_exists_from_construction() -> None:
    matrix, vector = nn.Parameter(torch.randn(4, 6).bfloat16()), nn.Parameter(torch.randn(5))
    optimizer = FlashMuon([{"params": [matrix]}, {"params": [vector], "update_rule": "adamw"}])
    assert optimizer.state[matrix]["momentum_buffer"].dtype == torch.float32
    assert set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}


def test_closure_is_evaluated_with_gradients() -> None:
    params = parameters(((6, 6),))
    optimizer = FlashMuon(params, lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_schedulers_and_added_groups_work() -> None:
    params = parameters()
    optimizer = FlashMuon(params[:1], lr=0.1, weight_decay=0.0)
    optimizer.add_param_group({"params": params[1:2], "lr": 0.3})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moved = []
    for step in range(3):
        before = [p.detach().clone() for p in params[:2]]
        for param, gradient in zip(params, gradients(params, step), strict=True):
            param.grad = gradient
        optimizer.step()
        scheduler.step()
        moved.append([float((p.detach() - b).norm()) for p, b in zip(params, before, strict=False)])
    for position, lr in ((0, 0.1), (1, 0.3 * sqrt(40 / 11))):
        rank = min(params[position].shape)
        for step in range(3):
            expected = lr * 0.5**step * sqrt(rank)  # the Frobenius norm of a polar factor
            assert moved[step][position] == pytest.approx(expected, rel=0.15)


def test_a_skipped_parameter_keeps_its_weight_and_momentum() -> None:
    params = parameters()
    optimizer = FlashMuon(params, lr=0.1)
    run(optimizer, params, 1)
    before = copy.deepcopy([(p.detach(), optimizer.state[p]["momentum_buffer"]) for p in params])
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0].detach(), before[0][0])
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], before[0][1])
    assert not torch.equal(params[1].detach(), before[1][0])


def test_one_step_per_accumulated_gradient() -> None:
    once, split = parameters(), parameters()
    a, b = FlashMuon(once, lr=0.1), FlashMuon(split, lr=0.1)
    for step in range(3):
        for p, q, gradient in zip(once, split, gradients(once, step), strict=True):
            p.grad = gradient
            (q * (gradient / 2)).sum().backward()
            (q * (gradient / 2)).sum().backward()
        a.step()
        b.step()
        b.zero_grad()
    assert distance(once, split) < 1e-6


@pytest.mark.parametrize("inject", [None, float("inf"), float("nan")])
def test_grad_scaler_unscales_or_skips(inject: float | None) -> None:
    scaled, plain = parameters(), parameters()
    a, b = FlashMuon(scaled, lr=0.1), FlashMuon(plain, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for p, q, gradient in zip(scaled, plain, gradients(scaled, 0), strict=True):
        scaler.scale((p * gradient).sum()).backward()
        q.grad = gradient
    if inject is not None:
        scaled[1].grad[0, 0] = inject
    before = copy.deepcopy(a.state_dict()["state"])
    scaler.step(a)
    scaler.update()
    b.step()
    if inject is None:
        assert distance(scaled, plain) < 1e-6
        assert scaler.get_scale() == 1024.0
    else:
        assert all(torch.equal(p, q) for p, q in zip(scaled, parameters(), strict=True))
        after = a.state_dict()["state"]
        assert all(torch.equal(after[i][k], before[i][k]) for i in before for k in before[i])
        assert scaler.get_scale() == 512.0


def test_a_copied_optimizer_goes_on_by_itself() -> None:
    params = parameters()
    optimizer = FlashMuon(params, lr=0.1, nonfinite="skip")
    run(optimizer, params, 2)
    copied_params, copied = copy.deepcopy((params, optimizer))
    run(copied, copied_params, 2)
    assert distance(copied_params, params) > 0
    run(optimizer, params, 2)
    assert distance(copied_params, params) == 0
    assert copied.nonfinite == "skip"


def test_stochastic_rounding_does_not_depend_on_wrappers() -> None:
    found = []
    for name in ("0.w", "module.0.w", "_orig_mod.module.0.w", "0._checkpoint_wrapped_module.w"):
        param = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
        param.grad = torch.arange(256.0).view(16, 16).sin().bfloat16()
        FlashMuon([(name, param)], rounding="stochastic").step()
        found.append(param.detach())
    other = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
    other.grad = param.grad
    FlashMuon([("1.w", other)], rounding="stochastic").step()
    assert all(torch.equal(each, found[0]) for each in found)
    assert not torch.equal(other, found[0])


@pytest.mark.parametrize("cut", [2, 6, 9, 250])
def test_adamw_does_not_depend_on_the_sharding(cut: int) -> None:
    """torch's fused kernel on the CPU rounds a memory's last few elements otherwise."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(1000, generator=generator)
        scales = 10.0 ** torch.empty(3, 1).uniform_(-8, 4, generator=generator)
        gradients = scales * torch.randn(3, 1000, generator=generator)
        found = []
        for sizes in ([1000], [cut] * (1000 // cut) + [1000 % cut] * bool(1000 % cut)):
            params = [nn.Parameter(part.clone()) for part in start.split(sizes)]
            optimizer = FlashMuon(params, update_rule="adamw")
            for gradient in gradients:
                for param, part in zip(params, gradient.split(sizes), strict=True):
                    param.grad = part.clone()
                optimizer.step()
            moments = [optimizer.state[param]["exp_avg_sq"] for param in params]
            found.append((torch.cat([p.detach() for p in params]), torch.cat(moments)))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
