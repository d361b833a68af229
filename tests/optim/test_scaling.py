"""Hooks on stacks of matrices: the bits of each matrix by itself, in as many launches."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flashns_dist import ExchangeOptions, FlashMuon
from flashns_dist.optim.rules import MATRIX_RULES, muon, scaling
from flashns_dist.optim.rules.normuon import moment_dtype, scale_rows_
from flashns_dist.testing.pool import rank_device

SHAPES = ((1, 1), (1, 9), (5, 1), (7, 50), (33, 17), (16, 64), (70, 301))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def normuon_(batch: Tensor) -> None:
    moments = torch.linspace(0, 2, batch.shape[1], device=batch.device, dtype=moment_dtype(batch))
    stacked = moments.expand(batch.shape[:2]).clone()
    scale_rows_(batch, stacked, {"beta2": 0.9, "eps": 1e-8})
    batch[..., 0] += stacked.to(batch.dtype)  # to be compared too


def renormalize(mode: str) -> Callable[[Tensor], None]:
    return lambda batch: scaling.renormalize_(batch, mode)


HOOKS: dict[str, Callable[[Tensor], None]] = {
    "equilibrate": scaling.equilibrate_,
    "normuon": normuon_,
    **{mode: renormalize(mode) for mode in scaling.RENORMALIZE[1:]},
}


def stack(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Seven matrices of different scale: one is zero, another has zero rows and columns."""
    generator = torch.Generator().manual_seed(shape[0])
    batch = torch.randn(7, *shape, generator=generator, dtype=torch.float64)
    batch *= torch.logspace(-2, 1, 7, dtype=torch.float64)[:, None, None]
    batch[2] = 0
    batch[4, ::3] = 0
    batch[4, :, ::5] = 0
    return batch.to(dtype).to(rank_device())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_matrix_has_the_same_bits_in_any_batch(
    hook: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in SHAPES:
        together = stack(shape, dtype)
        alone = [matrix[None].clone() for matrix in together]
        backwards, in_parts = together.flip(0).contiguous(), together.clone()
        transposed = together.mT.clone(memory_format=torch.contiguous_format).mT
        for batch in (together, backwards, transposed, *alone):
            HOOKS[hook](batch)
        with monkeypatch.context() as patch:
            patch.setattr(scaling, "_MOST_ELEMENTS", {rank_device().type: 2 * together[0].numel()})
            assert [len(part) for part in scaling.chunks(in_parts)] == [2, 2, 2, 1]
            HOOKS[hook](in_parts)
        assert together.isfinite().all()
        expected = torch.cat(alone)
        for found in (together, backwards.flip(0), transposed, in_parts):
            assert torch.equal(found, expected), shape
        assert (expected[2, :, 1:] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 31, 64, 1000, 4097])
@pytest.mark.parametrize("dim", [1, 2])
def test_folded_sums_are_as_exact_as_pairwise_ones(size: int, dim: int) -> None:
    x = torch.randn(3, size, 5, generator=torch.Generator().manual_seed(size)).square()
    x = x if dim == 1 else x.mT.contiguous()
    exact = x.double().sum(dim, keepdim=True)
    found = scaling.fold_sum_(x.clone(), dim)
    assert found.shape == exact.shape
    bound = (ceil(log2(size)) + 1) * torch.finfo(torch.float32).eps
    assert ((found.double() - exact).abs() <= bound * exact).all()


class Launches(TorchDispatchMode):
    """Counts the operations that a device works on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


LAUNCHING: dict[str, tuple[str, dict[str, Any]]] = {
    "equilibrate": ("on_owner", {"equilibrate": True}),
    **{mode: ("on_owner", {"renormalize": mode}) for mode in scaling.RENORMALIZE[1:]},
    "normuon": ("on_owner", {"update_rule": "normuon"}),
    "adamuon": ("after", {"update_rule": "adamuon"}),
    "adamuon, before": ("before", {"update_rule": "adamuon"}),
    "dion2": ("begin", {"update_rule": "dion2"}),
    "dion2 with normuon": ("on_owner", {"update_rule": "dion2", "normuon": True}),
}


@pytest.mark.parametrize("case", LAUNCHING)
def test_as_many_launches_for_many_matrices_as_for_two(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, twenty = launches_of(*LAUNCHING[case], monkeypatch)
    assert len(two) > 2
    assert two == twenty


def test_dion_launches_its_products_and_no_more_for_each_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its pieces lie apart."""
    two, twenty = launches_of("begin", {"update_rule": "dion"}, monkeypatch)
    assert len(twenty) - len(two) <= 18 * 4


def launches_of(
    hook: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """Operations of a hook for two matrices, and for twenty."""
    rule = type(MATRIX_RULES[settings.get("update_rule", "muon")])
    original = getattr(rule, hook)
    counts = []

    def counted(*args: Any) -> Any:
        with Launches() as launches:
            result = original(*args)
        counts.append(launches.names)
        return result

    monkeypatch.setattr(rule, hook, counted)
    monkeypatch.setattr(muon, "orthogonalize", lambda batch, **_: batch)  # on CPUs one by one
    for number in (2, 20):
        params = [nn.Parameter(torch.zeros(8, 12)) for _ in range(number)]
        optimizer = FlashMuon(params, exchange=ExchangeOptions(replica_group=None), **settings)
        for _ in range(2):  # the first one finds out where matrices lie
            for param in params:
                param.grad = torch.randn(8, 12)
            optimizer.step()
    _, two, _, twenty = counts
    return two, twenty
