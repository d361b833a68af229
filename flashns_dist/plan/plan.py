"""Who orthogonalizes what, and in which order: frozen data, the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from flashns_dist.layout import Block, Box, Layout, Piece, block_holders, rank_pieces
from flashns_dist.plan.routing import replica_of


@dataclass(frozen=True)
class Matrix:
    """One matrix to orthogonalize.

    Attributes:
        name: Name of its parameter (for errors).
        tensor: Index of its parameter among those of the process group.
        layout: How the parameter lies across the group.
        block: Which part of the parameter it is.
        kind: Whatever must agree for matrices to be batched together (method, coefficients, dtype),
            as text.
        work: Rows and columns of what travels and is orthogonalized, where that is a selection of
            the block's, another one in each step; None for all of them.
        workspace_bytes: That orthogonalizing it takes beyond itself, its result included.
        pass_bytes: Per element that a rank stores of it, that the elementwise passes take at once.
    """

    name: str
    tensor: int
    layout: Layout
    block: Block
    kind: str = ""
    work: tuple[int, int] | None = None
    workspace_bytes: int = 0
    pass_bytes: float = 0.0

    @property
    def work_shape(self) -> tuple[int, int]:
        """Rows and columns of what travels and is orthogonalized."""
        return self.work or self.block.shape

    @property
    def numel(self) -> int:
        """Elements that travel and are orthogonalized."""
        rows, cols = self.work_shape
        return rows * cols

    @cached_property
    def digest(self) -> str:
        text = repr((self.name, self.layout.digest, self.block, self.kind, self.work))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


Turn = Literal["gather", "compute", "finish"]


def step_order(num_buckets: int, depth: int) -> Iterator[tuple[Turn, int]]:
    """The order of a step: momentum and gather, owner and scatter, wait and update of each bucket.

    Args:
        num_buckets: In the plan.
        depth: How many buckets are under way at a time. With 3, bucket k + 1 is gathered and bucket
            k - 1 scattered while bucket k is on its owners; with 2, bucket k + 1 is gathered; with
            1, each bucket ends before the next one begins.
    """
    for turn in range(num_buckets + depth - 1):
        computed, finished = turn - min(1, depth - 1), turn - (depth - 1)
        if turn < num_buckets:
            yield "gather", turn
        if 0 <= computed < num_buckets:
            yield "compute", computed
        if finished >= 0:
            yield "finish", finished


@dataclass(frozen=True)
class Prediction:
    """What the cost model expects of one step on one group.

    Attributes:
        compute_seconds: Orthogonalization per group rank.
        sent_bytes: Bytes each group rank sends to others, both ways together.
        step_seconds: Of the whole step, overlapped as in ``timeline.py``.
        buffer_bytes: Reserved by each group rank for transfers.
        memory_bytes: Allocated by each group rank at the peak of a step, beyond weights, gradients
            and state; with those buffers, as in ``memory.py``.
    """

    compute_seconds: tuple[float, ...]
    sent_bytes: tuple[float, ...]
    step_seconds: float
    buffer_bytes: tuple[int, ...]
    memory_bytes: tuple[int, ...]

    @property
    def balance(self) -> float:
        """Largest over mean orthogonalization time; 1 is perfect."""
        mean = sum(self.compute_seconds) / max(len(self.compute_seconds), 1)
        return max(self.compute_seconds, default=0.0) / mean if mean else 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """Owners and buckets.

    Attributes:
        group_size: Ranks in the process group.
        matrices: What is orthogonalized, in the order of the parameters.
        owners: For each matrix, the group ranks that orthogonalize it: one where the work is
            shared by all replicas, several where groups of replicas (or each one) repeat it.
        buckets: Indices of the matrices that move and are orthogonalized together, in order.
        depth: How many buckets are under way at a time, each in buffers of its own: see
            ``step_order``.
        prediction: What the cost model expects.
    """

    group_size: int
    matrices: tuple[Matrix, ...]
    owners: tuple[tuple[int, ...], ...]
    buckets: tuple[tuple[int, ...], ...]
    depth: int
    prediction: Prediction

    @cached_property
    def digest(self) -> str:
        """A short text that is equal on all ranks exactly when their plans are."""
        parts = [m.digest for m in self.matrices]
        text = repr((self.group_size, parts, self.owners, self.buckets, self.depth))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def order(self) -> Iterator[tuple[Turn, int]]:
        """What a step does with which bucket, in order: ``step_order``."""
        return step_order(len(self.buckets), self.depth)

    def boxes(self, index: int) -> tuple[tuple[int, Box, tuple[int, ...]], ...]:
        """The distinct boxes of matrix ``index``: (part of the block, box, ranks that store it)."""
        matrix = self.matrices[index]
        return block_holders(matrix.layout, matrix.block)

    def pieces(self, index: int, group_rank: int) -> tuple[Piece, ...]:
        """What a rank stores of matrix ``index``, in the order of ``boxes``."""
        matrix = self.matrices[index]
        return rank_pieces(matrix.layout, matrix.block, group_rank)

    def replica_of(self, index: int, owner: int) -> int:
        """Which replica of matrix ``index`` an owner reads from."""
        matrix = self.matrices[index]
        return replica_of(matrix.layout, matrix.block, owner, index)

    def moves(self, bucket: int) -> bool:
        """Whether any rank sends anything for a bucket; if not, its collectives are left out."""
        return any(
            holders != self.owners[index]
            for index in self.buckets[bucket]
            for _, _, holders in self.boxes(index)
        )
