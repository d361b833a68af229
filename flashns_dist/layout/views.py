"""Matrix views: which parts of a parameter are orthogonalized as matrices of their own.

A view is a function from a parameter's global shape to its blocks. Those here are frozen values:
they compare equal, print themselves, and travel by pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from flashns_dist.layout.fragment import Box, flat_range_boxes
from flashns_dist.layout.layout import boxes_tile
from flashns_dist.layout.matrix import Block, leading_blocks

MatrixView: TypeAlias = "Callable[[tuple[int, ...]], tuple[Block, ...]]"

Shape: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class Sections:
    """Rows (or columns) cut into sections; of a stack ``(..., n, m)``, those of each matrix.

    Attributes:
        sizes: Rows of each section.
        dim: 0 to cut rows, 1 to cut columns.
        repeats: How many times the sizes recur along the dim (a QKV weight that is ordered by query
            group: once per group).
        merged: Whether section ``i`` of all repeats is one matrix, or each a matrix by itself.
    """

    sizes: tuple[int, ...]
    dim: int = 0
    repeats: int = 1
    merged: bool = True

    def __post_init__(self) -> None:
        sizes = tuple(self.sizes) if isinstance(self.sizes, Iterable) else (None,)
        if not all(map(_is_whole, sizes)):
            raise ValueError(f"sizes={self.sizes!r} must be a tuple of whole numbers")
        object.__setattr__(self, "sizes", sizes)
        _check_whole(repeats=self.repeats)
        _check_flag(merged=self.merged)
        if not self.sizes or min(self.sizes) < 1 or self.repeats < 1 or self.dim not in (0, 1):
            raise ValueError(
                f"{self}: needs positive sizes and repeats, and dim 0 (rows) or 1 (columns)"
            )

    def __call__(self, shape: Shape) -> tuple[Block, ...]:
        """The blocks: section by section if merged, else in storage order."""
        *leading, rows, cols = _at_least_2d(shape)
        length, period = (rows, cols)[self.dim], sum(self.sizes)
        if period * self.repeats != length:
            times = f"{self.repeats} times " if self.repeats > 1 else ""
            raise ValueError(
                f"sections of {times}{self.sizes} {_NOUNS[self.dim]} add up to "
                f"{period * self.repeats}, but it has {length}; give sizes that add up to {length}"
            )
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        sections = list(zip(starts, self.sizes, strict=True))
        offsets = [period * repeat for repeat in range(self.repeats)]
        if self.merged:
            runs = [[(offset + begin, size) for offset in offsets] for begin, size in sections]
        else:
            runs = [[(offset + begin, size)] for offset in offsets for begin, size in sections]
        return tuple(
            self._block(index, joined(found), rows, cols)
            for index in product(*map(range, leading))
            for found in runs
        )

    def _block(self, index: Shape, runs: Sequence[tuple[int, int]], rows: int, cols: int) -> Block:
        ones = (1,) * len(index)
        total = sum(size for _, size in runs)
        if self.dim == 0:
            parts = tuple(Box((*index, a, 0), (*ones, size, cols)) for a, size in runs)
            return Block(parts, total, cols)
        parts = tuple(Box((*index, 0, a), (*ones, rows, size)) for a, size in runs)
        return Block(parts, rows, total, axis=1 if len(parts) > 1 else 0)


@dataclass(frozen=True)
class Equal:
    """Rows (or columns) cut into ``count`` equal blocks: heads, or gate and up.

    Attributes:
        count: Number of blocks.
        dim: 0 to cut rows (q, k and v projections), 1 to cut columns (output projections).
    """

    count: int
    dim: int = 0

    def __call__(self, shape: Shape) -> tuple[Block, ...]:
        """The blocks in storage order."""
        _check_whole(count=self.count)
        length = _length(shape, self.dim)
        if self.count < 1 or length % self.count:
            raise ValueError(
                f"{length} {_NOUNS[self.dim]} cannot be cut into {self.count} equal blocks; give a "
                f"divisor of {length}"
            )
        return Sections((length // self.count,) * self.count, self.dim)(shape)


@dataclass(frozen=True)
class QKV:
    """A fused projection: queries, keys and values of ``num_heads`` and ``num_kv_heads`` heads.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads (None: as many; grouped queries: fewer).
        order: ``"stacked"``: all queries, then all keys, then all values (Hugging Face, vLLM).
            ``"grouped"``: by key head, its queries, its key, its value (Megatron, GPT-NeoX).
        per_head: One matrix per head, instead of one each for queries, keys and values.
        dim: 1 where the weight is stored transposed, ``(in, out)`` (GPT-2's Conv1D).
    """

    num_heads: int
    num_kv_heads: int | None = None
    order: str = "stacked"
    per_head: bool = False
    dim: int = 0

    def __call__(self, shape: Shape) -> tuple[Block, ...]:
        """The blocks: queries, keys, values; per head in storage order."""
        heads = self.num_heads
        kv_heads = heads if self.num_kv_heads is None else self.num_kv_heads
        _check_whole(num_heads=heads, num_kv_heads=kv_heads)
        _check_flag(per_head=self.per_head)
        length = _length(shape, self.dim)
        if self.order not in ("stacked", "grouped"):
            raise ValueError(f'order={self.order!r} is unknown; use "stacked" or "grouped"')
        if heads < 1:
            raise ValueError(f"num_heads={heads} must be at least 1")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}, as grouped "
                "queries need"
            )
        if length % (heads + 2 * kv_heads):
            raise ValueError(
                f"{length} {_NOUNS[self.dim]} are not {heads} query heads and twice {kv_heads} key "
                "and value heads of one width; correct num_heads or num_kv_heads, or give the "
                "sizes to Sections"
            )
        head = length // (heads + 2 * kv_heads)
        if self.per_head:
            return Equal(heads + 2 * kv_heads, self.dim)(shape)
        if self.order == "stacked":
            return Sections((heads * head, kv_heads * head, kv_heads * head), self.dim)(shape)
        return Sections((heads // kv_heads * head, head, head), self.dim, kv_heads)(shape)


@dataclass(frozen=True)
class Flattened:
    """A convolution ``(out, in / groups, *kernel)`` as ``(out / groups, -1)`` for each group.

    Attributes:
        groups: Of the convolution; each reads other inputs, so each is a matrix of its own.
    """

    groups: int = 1

    def __call__(self, shape: Shape) -> tuple[Block, ...]:
        """One block per group."""
        _check_whole(groups=self.groups)
        out, *rest = _at_least_2d(shape)
        if self.groups < 1 or out % self.groups:
            raise ValueError(
                f"{out} output channels are not divisible by groups={self.groups}; give the "
                "convolution's groups"
            )
        rows = out // self.groups
        return tuple(
            Block((Box((i * rows, *(0 for _ in rest)), (rows, *rest)),), rows, prod(rest))
            for i in range(self.groups)
        )


@dataclass(frozen=True)
class PackedExperts:
    """A weight whose memory is read as ``(num_experts, rows, -1)``: each expert is a matrix.

    Attributes:
        num_experts: Number of matrices.
        rows: Rows of each (None: the parameter's divided by ``num_experts``).
    """

    num_experts: int
    rows: int | None = None

    def __call__(self, shape: Shape) -> tuple[Block, ...]:
        """One block per expert."""
        numel, first = prod(_at_least_2d(shape)), shape[0]
        rows = self.rows
        _check_whole(num_experts=self.num_experts, rows=0 if rows is None else rows)
        if rows is None and self.num_experts > 0 and first % self.num_experts == 0:
            rows = first // self.num_experts
        if not rows or rows < 1 or self.num_experts < 1 or numel % (self.num_experts * rows):
            raise ValueError(
                f"it cannot be viewed as ({self.num_experts}, {self.rows or '?'}, -1); give the "
                "number of experts and the rows of one expert"
            )
        cols = numel // (self.num_experts * rows)
        blocks = []
        for expert in range(self.num_experts):
            begin = expert * rows * cols
            parts = tuple(box for box, _ in flat_range_boxes(shape, begin, begin + rows * cols))
            if any(part.numel % cols for part in parts):
                raise ValueError(
                    f"rows of {cols} of a ({self.num_experts}, {rows}, {cols}) view begin inside "
                    "rows of the parameter at changing places; store one expert per index of a "
                    "leading dim instead"
                )
            blocks.append(Block(parts, rows, cols))
        return tuple(blocks)


def named_view(view: Mapping[str, Mapping[str, Any]]) -> MatrixView:
    """The view that a configuration file writes as ``{"QKV": {"num_heads": 32}}``.

    Raises:
        ValueError: No such view, or not with these arguments.
    """
    if not isinstance(view, Mapping) or len(view) != 1 or next(iter(view)) not in _NAMED:
        raise ValueError(
            f"{view!r} is no view; write one of {sorted(_NAMED)} with its arguments, as "
            '{"QKV": {"num_heads": 32}}'
        )
    ((name, arguments),) = view.items()
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        return _NAMED[name](**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{name} with {arguments!r}: {error}") from None


_NAMED: dict[str, Callable[..., MatrixView]] = {
    view.__name__: view for view in (Sections, Equal, QKV, Flattened, PackedExperts)
}


def view_blocks(name: str, shape: Sequence[int], view: MatrixView | None) -> tuple[Block, ...]:
    """The matrices of a parameter.

    Args:
        name: For errors.
        shape: Global shape.
        view: None takes the parameter as a matrix, or as a stack of them.

    Raises:
        ValueError: The view does not fit; the message names the parameter, its shape and the fix.
    """
    shape = tuple(int(size) for size in shape)
    if prod(shape) == 0:
        return ()
    try:
        return leading_blocks(shape) if view is None else _checked_blocks(shape, view)
    except ValueError as error:
        raise ValueError(
            f"{name}: matrix_view {view} does not fit its shape {shape}: {error}"
        ) from error.__cause__  # where a function of the user's failed


# Weak keys: a view of the user's may be a method of a model, or close over one.
_CHECKED: WeakKeyDictionary[MatrixView, dict[Shape, tuple[Block, ...]]] = WeakKeyDictionary()


def _checked_blocks(shape: Shape, view: MatrixView) -> tuple[Block, ...]:
    """The view's blocks, which hold every element once; computed once while the view lives."""
    try:
        known = _CHECKED.setdefault(view, {})
    except TypeError:  # no hash, or no weak references
        known = {}
    if shape not in known:
        known[shape] = _blocks(shape, view)
    return known[shape]


def _blocks(shape: Shape, view: MatrixView) -> tuple[Block, ...]:
    blocks = _returned(shape, view)
    parts = tuple(part for block in blocks for part in block.parts)
    if any(len(part.size) != len(shape) for part in parts) or not boxes_tile(shape, parts):
        raise ValueError("its blocks do not hold every element exactly once; cover all of it")
    return blocks


def _returned(shape: Shape, view: object) -> tuple[Block, ...]:
    """What a view of the user's, which may be anything, says of a shape."""
    if isinstance(view, type):
        raise ValueError("it is a class; make a view of it, with its arguments")
    if not callable(view):
        raise ValueError(
            "it is no view; give one of flashns_dist.layout, a function from the shape to Blocks, "
            "or None for a single matrix"
        )
    try:
        blocks = tuple(view(shape))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"it failed with {type(error).__name__}: {error}; a view takes the shape and returns "
            "Blocks"
        ) from error
    for block in blocks:
        if not isinstance(block, Block):
            raise ValueError(f"it returned {block!r} among its blocks; return Blocks alone")
        for part in block.parts:
            for number in (block.rows, block.cols, *part.start, *part.size):
                if not _is_whole(number):
                    raise ValueError(f"{block} has {number!r}, which must be a whole number")
    return blocks


_NOUNS = ("rows", "columns")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_whole(**arguments: object) -> None:
    for name, value in arguments.items():
        if not _is_whole(value):
            raise ValueError(f"{name}={value!r} must be a whole number")


def _check_flag(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise ValueError(f"{name}={value!r} must be True or False")


def _at_least_2d(shape: Shape) -> Shape:
    if len(shape) < 2:
        raise ValueError("a matrix needs at least two dims; leave it to AdamW")
    return shape


def _length(shape: Shape, dim: int) -> int:
    """Rows (0) or columns (1) of the matrices of a stack."""
    if dim not in (0, 1):
        raise ValueError(f"dim={dim} must be 0 (rows) or 1 (columns)")
    return _at_least_2d(shape)[-2:][dim]


def joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """``(start, size)`` runs with neighbours that touch made one."""
    found: list[tuple[int, int]] = []
    for start, size in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((start, size))
    return found


__all__ = [
    "QKV",
    "Equal",
    "Flattened",
    "MatrixView",
    "PackedExperts",
    "Sections",
    "named_view",
    "view_blocks",
]
