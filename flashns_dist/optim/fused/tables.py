"""Tables of pieces of memory, which the kernels walk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashns_dist.exchange.schedule import Segment
from flashns_dist.optim.fused.rows import Rows, matched

GATHER_SEND, GATHER_RECEIVE, SCATTER_SEND, SCATTER_RECEIVE, FIRST_BATCH = range(5)
"""Numbers of the exchange's buffers; then come the batches, then the results."""

BLOCK = 4096
"""Elements of a program."""

MAX_NUMEL = 2**31 - 1
"""Elements of a piece, which the kernels count in int32."""


Piece = tuple[int, Rows, int, Rows, int]
"""Number of the one memory and the rows there, of the other and there, and the piece's kind."""


class Table:
    """Pieces of memory, on the device.

    Args:
        pieces: At least one.
        device: Where the memories are.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        rows = [
            (
                *(at_one.numel, at_one.cols, one, at_one.offset, at_one.stride),
                *(other, at_other.offset, at_other.stride),
            )
            for one, at_one, other, at_other, _ in pieces
        ]
        self.is_flat = all(a.rows == 1 and b.rows == 1 for _, a, _, b, _ in pieces)
        # Eight elements of two bytes are what one instruction moves.
        self.is_aligned = all(
            side.offset % 8 == side.cols % 8 == side.stride % 8 == side.numel % 16 == 0
            for _, a, _, b, _ in pieces
            for side in (a, b)
        )
        self.pieces = torch.tensor(rows, dtype=torch.int64, device=device)
        counts = torch.tensor([-(-row[0] // BLOCK) for row in rows], device="cpu")
        self.num_chunks = int(counts.sum())
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        starts = (torch.arange(self.num_chunks, device="cpu") - first) * BLOCK
        numbers = torch.arange(len(rows), device="cpu")
        self.chunk_piece = numbers.repeat_interleave(counts).int().to(device)
        self.chunk_start = starts.int().to(device)
        kinds = [kind for *_, kind in pieces]
        self.kinds = torch.tensor(kinds, dtype=torch.int32, device=device)


class BucketPasses:
    """The tables of one bucket.

    Attributes:
        momentum: Parameters to send buffer and batches.
        unpack: Receive buffer to batches.
        pack: Results to send buffer.
        update: Parameters from receive buffer and results.
        weight_dtype: Of all parameters of which this rank holds pieces.
        buffers: Addresses of the exchange's four buffers, the batches and the results.
    """

    def __init__(
        self,
        momentum: Sequence[Piece],
        unpack: Sequence[Piece],
        pack: Sequence[Piece],
        update: Sequence[Piece],
        num_batches: int,
        weight_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.momentum, self.unpack, self.pack, self.update = (
            Table(pieces, device) if pieces else None for pieces in (momentum, unpack, pack, update)
        )
        self.weight_dtype = weight_dtype
        self.num_batches = num_batches
        size = FIRST_BATCH + 2 * num_batches
        self.buffers = torch.zeros(size, dtype=torch.int64, device=device)


def segment_rows(segment: Segment) -> Rows:
    """A segment of a flat buffer."""
    return Rows(segment.offset, 1, segment.box.numel, segment.box.numel)


def matched_pieces(
    entries: Sequence[tuple[int, Rows | None, int, Rows | None, int]],
) -> list[Piece] | None:
    """Pieces cut alike in both memories; None where one of them cannot be, or is too large."""
    found: list[Piece] = []
    for one, at_one, other, at_other, kind in entries:
        pair = None if at_one is None or at_other is None else matched(at_one, at_other)
        if pair is None or pair[0].numel > MAX_NUMEL:
            return None
        if pair[0].numel:
            found.append((one, pair[0], other, pair[1], kind))
    return found
