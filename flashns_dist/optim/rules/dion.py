"""The Dion update rule: a low-rank power iteration on the momentum, where it lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashns_dist.exchange import matrix_box, reduce_sum_
from flashns_dist.layout import Block, Box, Piece
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.pieces import Pieces, Run
from flashns_dist.optim.rounding import element_noise
from flashns_dist.optim.rules.muon import update_weights
from flashns_dist.optim.rules.rule import MatrixRule, check_fraction
from flashns_dist.optim.rules.selection import check_rectangles

_BATCH_ELEMENTS = 2**24  # of the factors that are reduced at once
_STACK_ELEMENTS = 2**22  # of those that are orthonormalized at once, in fp64


class Dion(MatrixRule):
    """Dion (arXiv 2504.05295), algorithm 1, on matrices cut in any way.

    ``m <- m + g``, ``P = orth(m Q)``, ``R = m^T P``, ``m <- m - (1 - momentum) P R^T`` (error
    feedback), ``Q <-`` the columns of ``R`` at norm one, ``w <- w - lr scale P Q^T``. A column of
    ``R`` below the rounding of the largest one moves no weight and keeps its column of ``Q``.

    Nothing is gathered: every rank multiplies its pieces, the ``(rows, r)`` and ``(cols, r)``
    products are summed over the process group, and each rank orthonormalizes ``P`` (Cholesky QR,
    twice, in float64) and updates its pieces. The sums' order depends on the sharding: results do
    not, up to rounding. ``right_factor`` (``Q``) is the same on every rank.

    Settings: ``rank_fraction``, of the shorter side; ``independent_decay`` as Muon's; and
    ``compressed_gradients``, for replicated parameters whose gradients nobody has averaged: each
    replica keeps a momentum of its own, and the products are averaged instead of the gradients,
    as in the paper. ``m`` enters linearly, so weights are as if gradients had been averaged.
    Before a checkpoint, call ``FlashMuon.average_momenta``.
    """

    name = "dion"
    travels = False
    settings: ClassVar[Mapping[str, Any]] = {
        "rank_fraction": 0.25,
        "independent_decay": False,
        "compressed_gradients": False,
    }

    def check(self, group: Mapping[str, Any]) -> None:
        check_fraction("rank_fraction", group["rank_fraction"], one=True)

    def check_layout(self, bound: BoundParameter, group: Mapping[str, Any]) -> None:
        check_rectangles(bound)
        size = bound.layout.group_size
        if group["compressed_gradients"] and size > 1 and not bound.is_replicated:
            raise NotImplementedError(
                f"{bound.name}: compressed_gradients=True averages over replicas of whole "
                f"matrices, but this one is cut over {size} ranks, whose gradients are averaged "
                "already. Use it for replicated parameters, trained without DDP's averaging."
            )

    def block_states(self, group: Mapping[str, Any], block: Block) -> dict[str, int]:
        return {"right_factor": block.cols * rank_of(block.shape, group)}

    def init_state(
        self, param: Tensor, group: Mapping[str, Any], blocks: Sequence[Block]
    ) -> dict[str, Tensor]:
        """The momentum is zero, and the right factor noise: the same in every storage."""
        state = super().init_state(param, group, blocks)
        sizes = [self.block_states(group, block)["right_factor"] for block in blocks]
        for factor in state["right_factor"].split(sizes) if sizes else ():
            shape = (factor.shape[0],)
            noise = element_noise(1, Box((0,), shape), shape, factor.device)
            factor.copy_(noise / 2.0**15 - 1)
        return state

    def begin(self, run: Run, group_index: int) -> None:
        """All of the step.

        Collectives: two ``all_reduce`` on the process group per 2^24 elements of the products,
        and for matrices of each dtype.
        """
        for matrices in _batches(run, group_index):
            _Factors(run, group_index, matrices).step()


def rank_of(shape: tuple[int, int], group: Mapping[str, Any]) -> int:
    """Columns of the factors."""
    return max(1, round(float(group["rank_fraction"]) * min(shape)))


def _batches(run: Run, group_index: int) -> Iterator[list[int]]:
    """A parameter group's matrices, a few at a time, whose states are of one dtype."""
    batch: list[int] = []
    elements, dtype = 0, None
    for index in run.matrices_of(group_index):
        other, dtype = dtype, run.block_state(index, "right_factor").dtype
        shape = run.matrix(index).block.shape
        size = max(shape) * rank_of(shape, run.groups[group_index])
        if batch and (dtype != other or elements + size > _BATCH_ELEMENTS):
            yield batch
            batch, elements = [], 0
        batch.append(index)
        elements += size
    yield batch


class _Factors:
    """The low-rank factors of some matrices in one step."""

    def __init__(self, run: Run, group_index: int, matrices: list[int]) -> None:
        self.run = run
        self.group = run.groups[group_index]
        self.matrices = matrices
        self.bound = run.bound[run.matrix(matrices[0]).tensor]
        self.held: list[tuple[int, Piece]] = [
            (i, piece) for i in matrices for piece in run.pieces_of(i)
        ]
        self.boxes = [matrix_box(run.matrix(i), p.part, p.box) for i, p in self.held]
        self.momenta = [
            p.view(run.local_state(run.matrix(i).tensor, "momentum_buffer")) for i, p in self.held
        ]

    def step(self) -> None:
        mu, right = float(self.group["momentum"]), {}
        for index in self.matrices:
            cols, state = self.run.matrix(index).block.cols, self._right(index)
            right[index] = state.view(cols, -1)
        gradients = [self.run.gradients[self.run.matrix(index).tensor] for index, _ in self.held]
        present = [
            (momentum, piece.view(gradient))
            for (_, piece), momentum, gradient in zip(
                self.held, self.momenta, gradients, strict=True
            )
            if gradient is not None
        ]
        if present:
            torch._foreach_add_([m for m, _ in present], [g for _, g in present])
        left = self._products(right, dim=0)
        for indices, stack in _stacks(left):
            _write([left[i] for i in indices], orthonormal(stack))
        products = self._products(left, dim=1)
        steps: dict[int, Tensor] = {}  # P Q^T is what weights move by; Q without columns not kept
        for indices, stack in _stacks(products):
            unit, is_kept = _unit_columns(stack)
            old = torch.stack([right[i] for i in indices])
            _write([right[i] for i in indices], torch.where(is_kept, unit, old))
            steps.update(zip(indices, unit * is_kept, strict=True))
        updates = []
        for (index, piece), box, momentum in zip(self.held, self.boxes, self.momenta, strict=True):
            rows, transposed = _rows(left[index], box, 0), _rows(products[index], box, 1).T
            momentum.view(box.size).addmm_(rows, transposed, alpha=mu - 1)
            update = rows @ _rows(steps[index], box, 1).T
            updates.append(update.view(piece.box.size))
        pieces = Pieces(self.run, self.group, tuple(self.matrices), tuple(self.held))
        update_weights(pieces, updates)

    def _right(self, index: int) -> Tensor:
        return self.run.block_state(index, "right_factor")

    def _products(self, factors: Mapping[int, Tensor], dim: int) -> dict[int, Tensor]:
        """The whole momentum (``dim=1``: transposed) times a factor: ``(shape[dim], r)`` each."""
        sizes = [self.run.matrix(i).block.shape[dim] for i in self.matrices]
        ranks = [factors[i].shape[1] for i in self.matrices]
        dtype, device = factors[self.matrices[0]].dtype, factors[self.matrices[0]].device
        numels = [size * rank for size, rank in zip(sizes, ranks, strict=True)]
        buffer = torch.zeros(sum(numels), dtype=dtype, device=device)
        parts = zip(self.matrices, buffer.split(numels), ranks, strict=True)
        found = {index: part.view(-1, rank) for index, part, rank in parts}
        for (index, piece), box, momentum in zip(self.held, self.boxes, self.momenta, strict=True):
            holders = self.run.matrix(index).layout.holders[piece.fragment.box]
            differ = self.group["compressed_gradients"]
            if differ or holders[0] == self.bound.group_rank:  # else another replica adds it
                inside = momentum.view(box.size)
                _rows(found[index], box, dim).addmm_(
                    inside if dim == 0 else inside.T,
                    _rows(factors[index], box, 1 - dim),
                    alpha=1 / len(holders) if differ else 1,
                )
        reduce_sum_(buffer, self.bound.process_group)
        return found


def _rows(factor: Tensor, box: Box, dim: int) -> Tensor:
    """The rows of a factor that belong to a box's rows (0) or columns (1)."""
    return factor.narrow(0, box.start[dim], box.size[dim])


def _stacks(factors: Mapping[int, Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Stacks of factors of equal shape, ``(number, n, r)``, and which they are."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, factor in factors.items():
        alike.setdefault(tuple(factor.shape), []).append(index)
    for shape, indices in alike.items():
        most = max(1, _STACK_ELEMENTS // math.prod(shape))
        for begin in range(0, len(indices), most):
            part = indices[begin : begin + most]
            yield part, torch.stack([factors[index] for index in part])


def _write(targets: list[Tensor], stack: Tensor) -> None:
    torch._foreach_copy_(targets, list(stack))


def _unit_columns(products: Tensor) -> tuple[Tensor, Tensor]:
    """``(number, cols, r)`` with columns at norm one, and whether each was above the rounding of
    the largest one of its matrix, ``(number, 1, r)``.
    """
    full = products.double()  # squares in fp32 over- and underflow
    norms = torch.linalg.vector_norm(full, dim=-2, keepdim=True)
    floor = 10 * torch.finfo(products.dtype).eps
    is_kept = torch.gt(norms, floor * norms.amax(-1, keepdim=True))
    return (full / torch.where(norms > 0, norms, 1.0)).to(products.dtype), is_kept


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``x``: Cholesky QR, twice, in float64.

    A column that depends on earlier ones (to 1e-6) becomes zero.

    Args:
        x: ``(..., n, r)``, any float dtype; columns of any norm.

    Returns:
        float64 ``(..., n, r)``.
    """
    full = x.double()
    norms = torch.linalg.vector_norm(full, dim=-2, keepdim=True)
    full = full / torch.where(norms > 0, norms, 1.0)
    kept = torch.ones_like(norms, dtype=torch.bool)
    for _ in range(2):
        gram = full.mT @ full
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(torch.where(kept, 1e-14 * full.shape[-1], 1.0).squeeze(-2))
        lower = torch.linalg.cholesky_ex(gram).L
        kept &= lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) > 1e-6
        full = torch.linalg.solve_triangular(lower, full.mT, upper=False).mT * kept
    return full


__all__ = ["Dion", "orthonormal", "rank_of"]
