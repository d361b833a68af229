"""Tile configurations of the Triton products, and which of them a problem gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileConfig:
    """How one product is cut into programs.

    Attributes:
        rows: Rows of a program's tile.
        cols: Columns of its tile. Symmetric products: ``rows``, or twice that with programs that
            stay and take tile after tile.
        depth: How much of the summed dimension is loaded at a time.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        group: Block rows that run together, for the L2 cache.
        specialized: The Gluon kernel, in which some warps load and others multiply.
        backwards: Whether the last tiles come first.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    specialized: bool = False
    backwards: bool = False

    def label(self) -> str:
        """A short name for logs and the tuning cache."""
        kind = "gluon" if self.specialized else ""
        return f"{self.rows}x{self.cols}x{self.depth}w{self.warps}s{self.stages}{kind}"


# Measured on one H200 with triton 3.6.0: symmetric products in docs/benchmarks/kernels-h200.jsonl,
# general ones in docs/benchmarks/tuning-h200.jsonl. A candidate stays that won a shape there, and
# one small tile for problems that leave most of the device idle, which were not measured.
#
# With tensor descriptors (Hopper and later). Two programs of 128 x 128 x 64 with 4 warps fit on one
# SM of an H100 or H200 (98 KB of shared memory each), which hides one's epilogue behind the other's
# loop.
SYMMETRIC_TMA = (
    TileConfig(128, 128, 64, 4, 3),
    TileConfig(128, 128, 64, 8, 4),
    TileConfig(128, 256, 64, 8, 3),
    TileConfig(64, 64, 64, 4, 4),
)
# On Hopper, where the Gluon kernels fit (``gluon_launch``). With the GPU kept busy
# its forerunner was 1.0 to 1.2 times as fast as the default of the others from 768 rows on, most
# where there are few tiles per SM, and it is faster still (docs/benchmarks/README.md).
SPECIALIZED = TileConfig(128, 256, 64, 4, 4, specialized=True)
SYMMETRIC_HOPPER = (SPECIALIZED, *SYMMETRIC_TMA)
PRODUCT_TMA = (
    TileConfig(128, 128, 64, 4, 3),
    TileConfig(128, 256, 64, 8, 3),
    TileConfig(128, 256, 64, 8, 4),
    TileConfig(64, 128, 64, 4, 4),
)
PRODUCT_HOPPER = (SPECIALIZED, *PRODUCT_TMA)
MAX_IDLE = 1.15
"""How many times the work of a product its rounds may offer, for the Gluon kernel to take it."""
# What only moves memory, as the products of deflation with the matrix (k is 64 there): at most 64
# rows, at most 64 columns, and sums of at most 64. Tiles as small as that, and for the last no
# pipeline, so that many programs fit on an SM. Measured on eight shapes: the first is within 6 % of
# the best everywhere (docs/benchmarks/README.md). Deflation reads the same memory in turn forwards
# (the sketch, and products of the first kind) and backwards, so that each pass begins with what is
# still in L2.
PRODUCT_FLAT = (TileConfig(64, 128, 64, 4, 4), TileConfig(64, 256, 64, 8, 4))
PRODUCT_NARROW = (
    TileConfig(64, 64, 64, 4, 6, backwards=True),
    TileConfig(64, 64, 128, 4, 4, backwards=True),
)
PRODUCT_SHALLOW = (
    TileConfig(64, 128, 64, 4, 1, backwards=True),
    TileConfig(64, 256, 64, 4, 1, backwards=True),
)
PRODUCT_SHALLOW_HOPPER = (SPECIALIZED, *PRODUCT_SHALLOW)
# With plain pointers (other devices, and strides that descriptors cannot express). No depth of 32:
# with odd strides the symmetric product of 128 x 128 x 32 and 4 warps came out wrong on the H200 at
# (5, 129, 131), float16 and bfloat16, while every depth of 64 was right. Why is not known: the PTX
# differs from that of depth 64 in the shapes alone, and ptxas spills 2 KB per thread of both (with
# 8 warps 0.2 KB, hence those). At most 99 KB of shared memory, for consumer Ampere and Ada.
SYMMETRIC_POINTER = (
    TileConfig(128, 128, 64, 8, 3),
    TileConfig(64, 64, 64, 4, 3),
)
PRODUCT_POINTER = SYMMETRIC_POINTER
# fp32 runs on tf32 tensor cores in three passes, or on ordinary arithmetic: never tuned.
FLOAT32 = TileConfig(64, 64, 32, 4, 2)


def symmetric_configs(
    dtype: torch.dtype, tma: bool, specialized: bool = False
) -> tuple[TileConfig, ...]:
    """The candidates of a symmetric product."""
    if dtype == torch.float32:
        return (FLOAT32,)
    if specialized:
        return SYMMETRIC_HOPPER
    return SYMMETRIC_TMA if tma else SYMMETRIC_POINTER


def product_configs(
    dtype: torch.dtype, tma: bool, n: int, m: int, k: int, specialized: bool = False
) -> tuple[TileConfig, ...]:
    """The candidates of a general ``n x m`` product that sums over ``k``."""
    if dtype == torch.float32:
        return (FLOAT32,)
    if not tma:
        return PRODUCT_POINTER
    if k <= 64:
        return PRODUCT_SHALLOW_HOPPER if specialized else PRODUCT_SHALLOW
    if n <= 64:
        return PRODUCT_FLAT
    if m <= 64:
        return PRODUCT_NARROW
    return PRODUCT_HOPPER if specialized else PRODUCT_TMA


def default_symmetric(
    configs: tuple[TileConfig, ...], batch: int, n: int, k: int, num_sms: int
) -> TileConfig:
    """The configuration of an unmeasured symmetric product.

    The specialized one where it is offered and every SM gets a tile. Of the others the last, a
    small tile, if the first would leave SMs idle. With descriptors the wide one for
    sums of 4096 and more: on the H200 3 % faster at (4, 4096, 4096) and 14 % at (2, 8192, 8192),
    where the operands' way through L2 limits the first.
    """
    blocks = -(-n // configs[0].rows)
    if configs[0].specialized:
        if batch * blocks * (blocks + 1) // 4 >= num_sms:
            return configs[0]
        configs = configs[1:]
    if batch * blocks * (blocks + 1) // 2 < num_sms:
        return configs[-1]
    return configs[2] if configs == SYMMETRIC_TMA and n >= 2048 and k >= 4096 else configs[0]


def default_product(
    configs: tuple[TileConfig, ...], batch: int, n: int, m: int, num_sms: int
) -> TileConfig:
    """The configuration of an unmeasured general product.

    The specialized one where it is offered and its last round of tiles does not leave too many SMs
    idle: on the H200 it was 2 to 11 % faster than the others at twelve shapes, and slower by 3 % at
    (2, 1536, 7168), with 5.1 rounds. Of the others the last, a small tile, if the first would leave
    SMs idle. With descriptors the second, twice as wide, from n = 2048 on: 16 % faster than the
    first at (16, 2048, 2048), and slower by 1 % at n = 1024. The first of those that only move
    memory (of sums of 64 after the specialized one, which took 0.92 to 1.02 of its time at eight
    shapes).
    """

    def programs(config: TileConfig) -> int:
        return batch * -(-n // config.rows) * -(-m // config.cols)

    if configs[0].specialized:
        tiles = programs(configs[0])
        if -(-tiles // num_sms) * num_sms <= MAX_IDLE * tiles:
            return configs[0]
        configs = configs[1:]
    if configs in (PRODUCT_FLAT, PRODUCT_NARROW, PRODUCT_SHALLOW):
        return configs[0]
    if programs(configs[0]) < num_sms:
        return configs[-1]
    wide = configs == PRODUCT_TMA and n >= 2048 and m >= configs[1].cols
    wide = wide and programs(configs[1]) >= num_sms
    return configs[1] if wide else configs[0]
