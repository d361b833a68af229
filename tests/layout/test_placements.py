"""Layouts of DTensors against what torch itself stores on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from flashns_dist.layout import Box, Layout, placements_layout
from flashns_dist.testing.pool import RankPool, rank_device

SHAPES = ((7, 5), (8, 4), (1, 9), (9, 1), (3, 4, 5), (2, 3, 1, 4), (5,), (4, 0), ())


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Every element is its own row-major index."""
    return torch.arange(prod(shape), dtype=torch.float32, device=rank_device()).view(shape)


def check_local(layout: Layout, group_rank: int, local: Tensor, full: Tensor, case: str) -> None:
    """The local tensor is exactly the layout's fragments cut out of the full one."""
    written = torch.zeros_like(local)
    whole = Box((0,) * full.ndim, tuple(full.shape))
    for fragment in layout.fragments[group_rank]:
        assert torch.equal(fragment.view(local), full[fragment.box.slices_in(whole)]), case
        fragment.view(written).add_(1)
    assert written.eq(1).all(), f"{case}: fragments miss or repeat elements of the local tensor"
    assert layout.local_numel(group_rank) == local.numel(), case


def placements_of(ndim: int) -> list[object]:
    return [Replicate(), *(Shard(dim) for dim in range(ndim))]


def compare_every_placement(mesh_shape: tuple[int, ...]) -> int:
    mesh = init_device_mesh(rank_device().type, mesh_shape)
    count = 0
    for shape in SHAPES:
        full = numbered(shape)
        for placements in product(placements_of(len(shape)), repeat=len(mesh_shape)):
            local = distribute_tensor(full, mesh, placements, src_data_rank=None).to_local()
            layout = placements_layout(shape, placements, mesh_shape)
            case = f"{shape} {placements} on {mesh_shape}"
            check_local(layout, dist.get_rank(), local, full, case)
            count += 1
    return count


@pytest.mark.parametrize(
    "mesh_shape",
    [(1,), (2,), (3,), (4,), (2, 2), (1, 3), (4, 1), (2, 1, 2)],
    ids=lambda mesh: "x".join(map(str, mesh)),
)
def test_local_tensors_are_the_fragments_of_the_layout(
    ranks: RankPool, mesh_shape: tuple[int, ...]
) -> None:
    counts = ranks.run(prod(mesh_shape), compare_every_placement, mesh_shape)
    assert min(counts) >= 2 * len(SHAPES)


def compare_permuted_mesh() -> None:
    """A mesh that does not list the ranks in order needs the coordinates of the group's ranks."""
    device = rank_device().type
    mesh = DeviceMesh(device, [[3, 1], [0, 2]])
    coordinates = ((1, 0), (0, 1), (1, 1), (0, 0))
    for shape in SHAPES:
        full = numbered(shape)
        for placements in product(placements_of(len(shape)), repeat=2):
            local = distribute_tensor(full, mesh, placements, src_data_rank=None).to_local()
            layout = placements_layout(shape, placements, (2, 2), coordinates)
            check_local(layout, dist.get_rank(), local, full, f"{shape} {placements}")


def test_coordinates_say_where_ranks_stand_in_the_mesh(ranks: RankPool) -> None:
    ranks.run(4, compare_permuted_mesh)


class Block(nn.Module):
    """Two layers that tensor parallel cuts by column and by row."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)


def compare_fsdp(
    sizes: Sequence[tuple[int, int]], mesh_shape: tuple[int, ...], names: str, tensor_parallel: bool
) -> list[str]:
    """Parameters of a really sharded model against their layouts; which placements were seen."""
    mesh = init_device_mesh(rank_device().type, mesh_shape, mesh_dim_names=tuple(names.split()))
    seen = set()
    for width, hidden in sizes:
        torch.manual_seed(0)
        model = Block(width, hidden).to(rank_device())
        full = {name: value.detach().clone() for name, value in model.named_parameters()}
        if tensor_parallel:
            styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], styles)
        fully_shard(model, mesh=mesh["dp"] if tensor_parallel else mesh)
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor)
            assert tuple(param.device_mesh.shape) == mesh_shape
            layout = placements_layout(tuple(param.shape), param.placements, mesh_shape, name=name)
            case = f"{name} {tuple(param.shape)} {param.placements} on {mesh_shape}"
            check_local(layout, dist.get_rank(), param.to_local(), full[name], case)
            seen.add(str(param.placements))
    return sorted(seen)


SIZES = ((8, 12), (7, 5), (5, 9), (3, 1), (2, 2))


def test_fsdp2_over_tensor_parallel_stores_what_the_layout_says(ranks: RankPool) -> None:
    seen = ranks.run(4, compare_fsdp, SIZES, (2, 2), "dp tp", True)[0]
    assert any("_S" in placements for placements in seen), "FSDP2 made no strided shard"
    assert len(seen) >= 3


@pytest.mark.parametrize("mesh_shape", [(3,), (2, 2)], ids=["fsdp", "hsdp"])
def test_fsdp2_stores_what_the_layout_says(ranks: RankPool, mesh_shape: tuple[int, ...]) -> None:
    names = "dp" if len(mesh_shape) == 1 else "replicate shard"
    ranks.run(prod(mesh_shape), compare_fsdp, SIZES, mesh_shape, names, False)


@pytest.mark.slow
def test_fsdp2_over_tensor_parallel_may_divide_badly() -> None:
    """Seven rows over 3 x 2 ranks: the placements, read in order, would cut elsewhere."""
    pool = RankPool(6, backend="gloo")
    try:
        pool.run(6, compare_fsdp, ((4, 7), (5, 13), (7, 8)), (3, 2), "dp tp", True)
    finally:
        pool.close()


def chunk(values: list[int], num_chunks: int, index: int) -> list[int]:
    size = -(-len(values) // num_chunks)
    return values[index * size : (index + 1) * size]


def local_rows(layout: Layout, rank: int) -> list[int]:
    """The rows that a rank stores, in local order."""
    rows: list[int] = []
    for fragment in sorted(layout.fragments[rank], key=lambda fragment: fragment.offset):
        rows += range(fragment.box.start[0], fragment.box.start[0] + fragment.box.size[0])
    return rows


@pytest.mark.parametrize("num_tp", [2, 3, 4, 8])
@pytest.mark.parametrize("num_dp", [2, 3, 5, 8])
def test_strided_shards_follow_tensor_parallel_first(num_dp: int, num_tp: int) -> None:
    for num_rows in range(1, 40):
        placements = (_StridedShard(0, split_factor=num_tp), Shard(0))
        layout = placements_layout((num_rows, 2), placements, (num_dp, num_tp))
        for dp, tp in product(range(num_dp), range(num_tp)):
            expected = chunk(chunk(list(range(num_rows)), num_tp, tp), num_dp, dp)
            assert local_rows(layout, dp * num_tp + tp) == expected, (num_rows, dp, tp)


def test_a_replica_axis_and_two_shard_axes_combine() -> None:
    placements = (Replicate(), _StridedShard(0, split_factor=2), Shard(0))
    layout = placements_layout((12, 2), placements, (2, 3, 2))
    assert layout.num_replicas == 2
    for replica, dp, tp in product(range(2), range(3), range(2)):
        expected = chunk(chunk(list(range(12)), 2, tp), 3, dp)
        assert local_rows(layout, replica * 6 + dp * 2 + tp) == expected


def test_a_strided_shard_without_inner_shards_stores_runs_one_after_the_other() -> None:
    layout = placements_layout((8, 3), (_StridedShard(0, split_factor=2),), (2,))
    assert [local_rows(layout, rank) for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [f.offset for f in layout.fragments[0]] == [(0, 0), (2, 0)]


def test_neighbouring_runs_are_one_fragment() -> None:
    layout = placements_layout((8, 3), (_StridedShard(0, split_factor=4), Shard(1)), (1, 3))
    assert [len(fragments) for fragments in layout.fragments] == [1, 1, 1]


@pytest.mark.parametrize("placement", [Partial(), Partial("avg"), object()])
def test_a_pending_reduction_is_refused_with_its_name(placement: object) -> None:
    with pytest.raises(NotImplementedError, match=r"layers.3.wq: placement .* is not supported"):
        placements_layout((4, 4), (Replicate(), placement), (2, 2), name="layers.3.wq")


def test_layouts_of_equal_shardings_are_one_object() -> None:
    one = placements_layout((8, 6), (Shard(0),), (4,), name="a")
    assert placements_layout([8, 6], [Shard(0)], [4], name="b") is one
