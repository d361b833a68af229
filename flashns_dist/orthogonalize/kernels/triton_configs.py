"""Tile configurations of the Triton products, and which of them a problem gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileConfig:
    """How one product is cut into programs.

    Attributes:
        rows: Rows of a program's tile.
        cols: Columns of its tile; equals ``rows`` for symmetric products.
        depth: How much of the summed dimension is loaded at a time.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        pairs: Symmetric products: two adjacent tiles per program.
        group: Block rows that run together, for the L2 cache.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    pairs: bool = False
    group: int = 8

    def label(self) -> str:
        """A short name for logs and the tuning cache."""
        pairs = "p" if self.pairs else ""
        return f"{self.rows}x{self.cols}x{self.depth}{pairs}w{self.warps}s{self.stages}"


# Candidates with tensor descriptors (Hopper and later). Two programs of 128 x 128 fit on one SM of
# an H100 or H200 (98 KB of shared memory each), which hides one's epilogue behind the other's loop.
SYMMETRIC_TMA = (
    TileConfig(128, 128, 64, 4, 3),
    TileConfig(128, 128, 64, 8, 3),
    TileConfig(128, 128, 64, 8, 4, pairs=True),
    TileConfig(64, 64, 64, 4, 4),
)
PRODUCT_TMA = (
    TileConfig(128, 256, 64, 8, 3),
    TileConfig(128, 256, 64, 8, 4),
    TileConfig(128, 128, 64, 4, 3),
    TileConfig(128, 128, 64, 8, 3),
    TileConfig(64, 128, 64, 4, 4),
)
# Candidates with plain pointers (other devices, and strides that descriptors cannot express).
SYMMETRIC_POINTER = (
    TileConfig(128, 128, 32, 4, 4),
    TileConfig(128, 128, 64, 8, 3),
    TileConfig(64, 64, 64, 4, 3),
)
PRODUCT_POINTER = (
    TileConfig(128, 128, 32, 4, 4),
    TileConfig(128, 128, 64, 8, 3),
    TileConfig(64, 64, 64, 4, 3),
)
# fp32 runs on tf32 tensor cores in three passes, or on ordinary arithmetic: never tuned.
FLOAT32 = TileConfig(64, 64, 32, 4, 2)


def symmetric_configs(dtype: torch.dtype, tma: bool) -> tuple[TileConfig, ...]:
    """The candidates of a symmetric product."""
    if dtype == torch.float32:
        return (FLOAT32,)
    return SYMMETRIC_TMA if tma else SYMMETRIC_POINTER


def product_configs(dtype: torch.dtype, tma: bool) -> tuple[TileConfig, ...]:
    """The candidates of a general product."""
    if dtype == torch.float32:
        return (FLOAT32,)
    return PRODUCT_TMA if tma else PRODUCT_POINTER


def default_symmetric(
    configs: tuple[TileConfig, ...], batch: int, n: int, num_sms: int
) -> TileConfig:
    """The configuration of an unmeasured symmetric product: the first that fills the device."""
    blocks = -(-n // configs[0].rows)
    if batch * blocks * (blocks + 1) // 2 >= num_sms:
        return configs[0]
    return configs[-1]


def default_product(
    configs: tuple[TileConfig, ...], batch: int, n: int, m: int, num_sms: int
) -> TileConfig:
    """The configuration of an unmeasured general product: the first that fills the device."""
    for config in configs:
        if batch * -(-n // config.rows) * -(-m // config.cols) >= num_sms:
            return config
    return configs[-1]
