"""What orthogonalizing and moving a matrix costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """Predicts seconds from shapes and bytes. Only ratios matter for balance.

    The defaults describe one H200 (measured anchors: 790 TFLOP/s for large half-precision products,
    174-336 GB/s out per GPU in an all-to-all of 64 MB to 2 GB on four GPUs of one host). They need
    not be exact: a wrong model makes a plan slower, never wrong.

    Attributes:
        cube_flops, wide_flops: FLOPs of one orthogonalization are
            ``cube_flops n^3 + wide_flops n^2 m`` for the short side n and the long side m; the
            defaults are a five-step Gram iteration with one restart, symmetric products at half.
        flops_per_second: Rate reached on large matrices.
        half_rate_size: Short side at which half of that rate is reached.
        matrix_seconds: Fixed cost of one matrix.
        link_bytes_per_second: Bytes that one rank sends in a second.
        exchange_seconds: Latency of one collective.
    """

    cube_flops: float = 14.0
    wide_flops: float = 6.0
    flops_per_second: float = 790e12
    half_rate_size: float = 512.0
    matrix_seconds: float = 2e-6
    link_bytes_per_second: float = 250e9
    exchange_seconds: float = 40e-6

    def orthogonalize_seconds(self, rows: int, cols: int) -> float:
        """Seconds for one ``(rows, cols)`` matrix in a large batch."""
        n, m = float(min(rows, cols)), float(max(rows, cols))
        flops = self.cube_flops * n**3 + self.wide_flops * n**2 * m
        rate = self.flops_per_second * n / (n + self.half_rate_size)
        return self.matrix_seconds + flops / rate

    def wire_seconds(self, num_bytes: float) -> float:
        """Seconds for a rank to send ``num_bytes``, latency not included."""
        return num_bytes / self.link_bytes_per_second
