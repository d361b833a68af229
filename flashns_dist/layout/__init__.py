"""How a matrix lies across ranks."""

from flashns_dist.layout.dtensor import placements_layout
from flashns_dist.layout.fragment import Box, Fragment
from flashns_dist.layout.layout import Layout, even_flat_layout, flat_layout, replicated_layout
from flashns_dist.layout.matrix import (
    Block,
    Piece,
    block_holders,
    leading_blocks,
    rank_pieces,
    rectangle,
)
from flashns_dist.layout.split import Split
from flashns_dist.layout.views import (
    QKV,
    Equal,
    Flattened,
    MatrixView,
    PackedExperts,
    Sections,
    named_view,
    view_blocks,
)

__all__ = [
    "QKV",
    "Block",
    "Box",
    "Equal",
    "Flattened",
    "Fragment",
    "Layout",
    "MatrixView",
    "PackedExperts",
    "Piece",
    "Sections",
    "Split",
    "block_holders",
    "even_flat_layout",
    "flat_layout",
    "leading_blocks",
    "named_view",
    "placements_layout",
    "rank_pieces",
    "rectangle",
    "replicated_layout",
    "view_blocks",
]
