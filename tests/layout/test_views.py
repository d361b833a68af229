"""Matrix views: which elements of a parameter are a matrix, and what does not fit."""

from __future__ import annotations

import gc
import pickle
import re
import weakref
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from flashns_dist.layout import (
    QKV,
    Block,
    Box,
    Equal,
    Flattened,
    MatrixView,
    PackedExperts,
    Sections,
    Split,
    named_view,
    view_blocks,
)


def numbered(shape: Sequence[int]) -> Tensor:
    return torch.arange(prod(shape)).view(*shape)


def matrices(shape: tuple[int, ...], view: MatrixView | None) -> list[Tensor]:
    """The elements' numbers in each block, in the matrix that the exchange puts together."""
    full, whole = numbered(shape), Box((0,) * len(shape), shape)
    found = []
    for block in view_blocks("w", shape, view):
        matrix = torch.full(block.shape, -1)
        for index, part in enumerate(block.parts):
            block.view(matrix, index, part).copy_(full[part.slices_in(whole)])
        found.append(matrix)
    return found


def by_group(w: Tensor, groups: int, per_group: int, head: int) -> list[Tensor]:
    """Queries, keys, values of a weight ``(groups * (per_group + 2) * head, cols)``."""
    q, k, v = w.view(groups, -1, w.shape[1]).split([per_group * head, head, head], dim=1)
    return [part.reshape(-1, w.shape[1]) for part in (q, k, v)]


# View, shape, and the matrices as torch cuts them.
CASES: dict[str, tuple[MatrixView, tuple[int, ...], Callable[[Tensor], Sequence[Tensor]]]] = {
    "gate and up": (Equal(2), (8, 6), lambda w: w.chunk(2)),
    "gate and up of experts": (
        Equal(2),
        (3, 8, 6),
        lambda w: [half for e in w for half in e.chunk(2)],
    ),
    "heads in rows": (Equal(4), (8, 6), lambda w: w.split(2)),
    "heads in columns": (Equal(3, dim=1), (8, 6), lambda w: w.split(2, dim=1)),
    "unequal rows": (Sections((5, 1, 2)), (8, 6), lambda w: w.split([5, 1, 2])),
    "queries, keys, values": (QKV(4, 2), (16, 5), lambda w: w.split([8, 4, 4])),
    "as many keys as queries": (QKV(2), (12, 5), lambda w: w.split(4)),
    "by query group": (QKV(6, 2, order="grouped"), (20, 5), lambda w: by_group(w, 2, 3, 2)),
    "each head": (QKV(6, 2, order="grouped", per_head=True), (20, 5), lambda w: w.split(2)),
    "transposed, by query group": (
        QKV(6, 2, order="grouped", dim=1),
        (5, 20),
        lambda w: [
            w.view(5, 2, 10)[:, :, begin:end].reshape(5, -1)
            for begin, end in ((0, 6), (6, 8), (8, 10))
        ],
    ),
    "MLA, keys and values of each head": (
        Sections((3, 2), repeats=4, merged=False),
        (20, 6),
        lambda w: [part for head in w.split(5) for part in head.split([3, 2])],
    ),
    "MLA, all keys and all values": (
        Sections((3, 2), repeats=4),
        (20, 6),
        lambda w: [w.view(4, 5, 6)[:, :3].reshape(12, 6), w.view(4, 5, 6)[:, 3:].reshape(8, 6)],
    ),
    "convolution": (Flattened(), (6, 3, 2, 2), lambda w: [w.flatten(1)]),
    "grouped convolution": (Flattened(3), (6, 2, 5), lambda w: w.flatten(1).split(2)),
    "packed rows": (PackedExperts(3), (12, 5), lambda w: w.view(3, 4, 5)),
    "packed memory": (PackedExperts(3, 6), (6, 12), lambda w: w.view(3, 6, 4)),
    "packed, rows of another length": (PackedExperts(2, 3), (4, 9), lambda w: w.view(2, 3, 6)),
    "packed across rows": (PackedExperts(4, 7), (7, 12), lambda w: w.view(4, 7, 3)),
    "function, rows": (
        Split(lambda w: w.split([5, 3])),
        (8, 6),
        lambda w: w.split([5, 3]),
    ),
    "function, columns of experts": (
        Split(lambda w: w.split([5, 3], dim=-1), lambda parts: torch.cat(parts, dim=-1)),
        (2, 4, 8),
        lambda w: [e for part in w.split([5, 3], dim=-1) for e in part],
    ),
    "function, interleaved rows": (
        Split(lambda w: [w[0::2], w[1::2]], lambda parts: torch.stack(parts, 1).flatten(0, 1)),
        (8, 6),
        lambda w: [w[0::2], w[1::2]],
    ),
    "function, interleaved columns": (
        Split(lambda w: [w[:, 0::2], w[:, 1::2]]),
        (4, 6),
        lambda w: [w[:, 0::2], w[:, 1::2]],
    ),
    "function, across rows": (
        Split(lambda w: list(w.reshape(4, 7, 3))),
        (7, 12),
        lambda w: w.view(4, 7, 3),
    ),
    "function, some rows of a window": (
        Split(lambda w: [torch.cat([w[:1, 2:4], w[5:, 2:4]]), w[1:5, 2:4], w[:, :2], w[:, 4:]]),
        (8, 6),
        lambda w: [w[[0, 5, 6, 7], 2:4], w[1:5, 2:4], w[:, :2], w[:, 4:]],
    ),
    "function, convolution": (
        Split(lambda w: [w[:4].flatten(1), w[4:].flatten(1)]),
        (6, 3, 2, 2),
        lambda w: [w[:4].flatten(1), w[4:].flatten(1)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_view_cuts_as_torch_does(case: str) -> None:
    view, shape, cut = CASES[case]
    found, expected = matrices(shape, view), list(cut(numbered(shape)))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_few_parts_are_made_where_neighbours_touch() -> None:
    parts = [len(b.parts) for b in QKV(4, 4, order="grouped")((24, 5))]
    assert parts == [4, 4, 4]
    assert [len(b.parts) for b in Sections((24,), repeats=1)((24, 5))] == [1]
    assert [len(b.parts) for b in Sections((4,), repeats=6)((24, 5))] == [1]
    (block,) = Split(lambda w: [w])((24, 5))
    assert block == Block((Box((0, 0), (24, 5)),), 24, 5)


NO_FIT: list[tuple[MatrixView, tuple[int, ...], str]] = [
    (Equal(3), (8, 6), "8 rows cannot be cut into 3 equal blocks; give a divisor of 8"),
    (Equal(4, dim=1), (8, 6), "6 columns cannot be cut into 4"),
    (Sections((5, 2)), (8, 6), "add up to 7, but it has 8; give sizes that add up to 8"),
    (Sections((2, 1), repeats=3), (8, 6), "sections of 3 times (2, 1) rows add up to 9"),
    (QKV(4, 3), (16, 6), "num_heads=4 is not a multiple of num_kv_heads=3"),
    (QKV(4, 2), (15, 6), "15 rows are not 4 query heads and twice 2 key and value heads"),
    (QKV(4, 2, dim=2), (16, 6), "dim=2 must be 0 (rows) or 1 (columns)"),
    (QKV(4, 2, order="mixed"), (16, 6), "order='mixed' is unknown"),
    (Flattened(4), (6, 3, 2), "6 output channels are not divisible by groups=4"),
    (Flattened(), (6,), "at least two dims; leave it to AdamW"),
    (PackedExperts(5), (12, 6), "cannot be viewed as (5, ?, -1)"),
    (PackedExperts(5, 4), (12, 6), "cannot be viewed as (5, 4, -1)"),
    (PackedExperts(3, 2), (4, 9), "begin inside rows of the parameter"),
    (Split(lambda w: [w * 2]), (4, 4), "not made of boxes"),
    (Split(lambda w: [w * 0.5]), (4, 4), "holds computed values"),
    (Split(lambda w: [w[:2]]), (4, 4), "do not hold every element exactly once; cover all"),
    (Split(lambda w: [w, w]), (4, 4), "do not hold every element exactly once"),
    (Split(lambda w: w), (4, 4), "must return a list"),
    (Split(lambda w: [w[0], w[1:]]), (4, 4), "has shape (4,); return matrices"),
    (Split(lambda w: w.split([3, 3])), (4, 4), "split failed on it: RuntimeError"),
    (Split(lambda w: [w.view(4, 2, 2)[:, ::-1]]), (4, 4), "split failed on it: ValueError"),
    (Split(lambda w: [w[[1, 0]][:, [1, 0]]]), (2, 2), "not made of boxes"),
    (Split(lambda w: list(w.reshape(3, 2, 6))), (4, 9), "not made of boxes"),
    (Split(lambda w: list(w.chunk(2)), lambda parts: parts[0]), (4, 4), "recombine(split"),
    (lambda shape: (), (4, 4), "cover all of it"),
    (lambda shape: (Block((Box((0,), (16,)),), 4, 4),), (4, 4), "cover all of it"),
    ("qkv", (4, 4), "it is no view; give one of flashns_dist.layout"),
    ([Equal(2)], (4, 4), "it is no view"),
    ((2.0, 2.0), (4, 4), "it is no view"),
    (QKV, (4, 4), "it is a class; make a view of it"),
    (Equal(2.0), (4, 4), "count=2.0 must be a whole number"),
    (Equal("2"), (4, 4), "count='2' must be a whole number"),
    (QKV(2.0), (6, 4), "num_heads=2.0 must be a whole number"),
    (QKV(2, [1]), (8, 4), "num_kv_heads=[1] must be a whole number"),
    (QKV(-2, 1), (8, 4), "num_heads=-2 must be at least 1"),
    (QKV(2, per_head="no"), (6, 4), "per_head='no' must be True or False"),
    (Flattened(None), (4, 4), "groups=None must be a whole number"),
    (PackedExperts("2"), (4, 4), "num_experts='2' must be a whole number"),
    (PackedExperts(2, 2.0), (4, 4), "rows=2.0 must be a whole number"),
    (lambda shape: None, (4, 4), "failed with TypeError: 'NoneType' object is not iterable"),
    (lambda: (), (4, 4), "a view takes the shape and returns Blocks"),
    (lambda shape: shape.rows, (4, 4), "failed with AttributeError"),
    (lambda shape: [(2, 4), (2, 4)], (4, 4), "it returned (2, 4) among its blocks"),
    (lambda shape: [Block((Box((0, 0), (4, 4)),), 4.0, 4)], (4, 4), "4.0, which must be a whole"),
    (lambda shape: [Block((Box((0, 0), (4, True)),), 4, 1)], (4, 1), "True, which must be a whole"),
]


@pytest.mark.parametrize(("view", "shape", "message"), NO_FIT, ids=[m[2] for m in NO_FIT])
def test_a_view_that_does_not_fit_is_refused(
    view: MatrixView, shape: tuple[int, ...], message: str
) -> None:
    start = re.escape("layers.3.w: matrix_view ") + ".*" + re.escape(f"shape {shape}: ")
    with pytest.raises(ValueError, match=start + ".*" + re.escape(message)):
        view_blocks("layers.3.w", shape, view)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sections(()),
        lambda: Sections((4, 0)),
        lambda: Sections((4,), dim=2),
        lambda: Sections((4,), repeats=0),
    ],
)
def test_sections_that_fit_nothing_are_refused_at_once(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="positive sizes and repeats, and dim 0"):
        make()


@pytest.mark.parametrize("sizes", [(4.0, 8.0), "ab", 12, None, (True, 11), [[4], [8]]])
def test_sections_of_no_whole_numbers_are_refused_at_once(sizes: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sizes={sizes!r} must be a tuple of whole")):
        Sections(sizes)


@pytest.mark.parametrize(("name", "value"), [("repeats", 2.0), ("repeats", "2"), ("merged", "no")])
def test_settings_of_sections_of_another_type_are_refused_at_once(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} must be "):
        Sections((4, 8), **{name: value})


def test_the_failure_of_a_function_is_the_cause() -> None:
    with pytest.raises(ValueError, match=r"w: .*ZeroDivisionError: integer") as caught:
        view_blocks("w", (4, 4), lambda shape: 1 // 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_views_are_values() -> None:
    view = QKV(8, 2, order="grouped")
    assert pickle.loads(pickle.dumps(view)) == view
    assert view_blocks("a", (24, 5), view) is view_blocks("b", (24, 5), QKV(8, 2, order="grouped"))


def test_an_empty_parameter_has_no_matrices() -> None:
    assert view_blocks("w", (0, 6), Equal(2)) == ()


def test_configurations_name_views() -> None:
    assert named_view({"QKV": {"num_heads": 8, "order": "grouped"}}) == QKV(8, order="grouped")
    assert named_view({"Sections": {"sizes": [3, 2]}}) == Sections((3, 2)) == Sections([3, 2])
    for wrong, message in (
        ("QKV", "'QKV' is no view"),
        ({"qkv": {}}, "write one of ['Equal'"),
        ({"QKV": {"heads": 8}}, "unexpected keyword argument 'heads'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            named_view(wrong)  # type: ignore[arg-type]


class Model:
    """Cuts its own weights; counts how often it is asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def halves(self, shape: tuple[int, ...]) -> tuple[Block, ...]:
        self.calls += 1
        return Equal(2)(shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: model.halves,
        lambda model: lambda shape: model.halves(shape),
        lambda model: Split(lambda w: [w[: len(model.halves(w.shape))], w[2:]]),
    ],
    ids=["method", "closure", "split function"],
)
def test_views_keep_no_model_alive(make: Callable[[Model], MatrixView]) -> None:
    model = Model()
    view = make(model)
    blocks = view_blocks("w", (4, 6), view)
    assert view_blocks("w", (4, 6), view) == blocks
    assert model.calls == 1 or make(model) == view  # a method is another object each time
    kept = weakref.ref(model)
    del model, view
    gc.collect()
    assert kept() is None


def test_a_view_needs_no_hash() -> None:
    class Halves:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, shape: tuple[int, ...]) -> tuple[Block, ...]:
            return Equal(2)(shape)

    assert view_blocks("w", (4, 6), Halves()) == Equal(2)((4, 6))


def test_the_default_device_does_not_matter_to_split() -> None:
    for split in (lambda w: w.split([5, 3]), lambda w: [w[:, 0::2], w[:, 1::2]]):
        with torch.device("meta"):
            found = Split(split)((8, 6))
        assert found == Split(split)((8, 6))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (Split(lambda w: [w[:0], w]), r"result 0 of split has shape \(0, 8\), without any"),
        (Split(lambda w: [w, w[:, :0]]), r"result 1 of split has shape \(6, 0\), without any"),
        (PackedExperts(2, -3), r"cannot be viewed as \(2, -3, -1\)"),
    ],
)
def test_matrices_without_elements_are_refused(view: MatrixView, message: str) -> None:
    with pytest.raises(ValueError, match=f"w: matrix_view .*{message}"):
        view_blocks("w", (6, 8), view)
