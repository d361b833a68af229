"""Schedules and transfers of random layouts: everything arrives, once, where it belongs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from flashns_dist.exchange import Exchange, Schedule, Transfer, make_schedule
from flashns_dist.layout import (
    Block,
    Box,
    Layout,
    flat_layout,
    leading_blocks,
    placements_layout,
    replicated_layout,
)
from flashns_dist.plan import Matrix, Plan, make_plan
from flashns_dist.plan.traffic import Traffic
from flashns_dist.testing.pool import RankPool, rank_device


def factorized(size: int, rng: random.Random) -> tuple[int, ...]:
    """A mesh of ``size`` ranks with one to three axes."""
    mesh = []
    for _ in range(rng.randint(0, 2)):
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        mesh.append(rng.choice(divisors))
        size //= mesh[-1]
    return (*mesh, size)


def random_layout(shape: tuple[int, ...], size: int, rng: random.Random) -> Layout:
    """Placements on some mesh, flat ranges (with replicas), or a copy on every rank."""
    kind = rng.choice(["placements", "placements", "flat", "flat", "scattered", "replicated"])
    if kind == "scattered":
        return scattered_layout(shape, size, rng)
    if kind == "replicated":
        return replicated_layout(shape, size)
    if kind == "placements":
        mesh = factorized(size, rng)
        choices = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        return placements_layout(shape, [rng.choice(choices) for _ in mesh], mesh)
    numel = prod(shape)
    num_replicas = rng.choice([n for n in range(1, size + 1) if size % n == 0])
    num_shards = size // num_replicas
    cuts = [
        0,
        *sorted(rng.choice([0, numel, rng.randint(0, numel)]) for _ in range(num_shards - 1)),
    ]
    ranges = [((a, b, rng.randint(0, 4)),) for a, b in pairwise([*cuts, numel])]
    if rng.random() < 0.5:
        rng.shuffle(ranges)
    by_rank = [ranges[rank % num_shards] for rank in range(size)]
    if rng.random() < 0.5:  # replicas next to one another instead
        by_rank = [ranges[rank // num_replicas] for rank in range(size)]
    return flat_layout(shape, tuple(by_rank))


def scattered_layout(shape: tuple[int, ...], size: int, rng: random.Random) -> Layout:
    """Flat ranges that any ranks store, each in its own order and some more often than others."""
    numel = prod(shape)
    cuts = [0, *sorted(rng.randint(0, numel) for _ in range(rng.randint(0, 5))), numel]
    held: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    for a, b in pairwise(cuts):
        for rank in rng.sample(range(size), rng.randint(1, size)) if a < b else ():
            held[rank].append((a, b))
    by_rank = []
    for ranges in held:
        rng.shuffle(ranges)
        starts = accumulate((b - a for a, b in ranges), initial=0)
        by_rank.append(tuple((a, b, start) for (a, b), start in zip(ranges, starts, strict=False)))
    return flat_layout(shape, tuple(by_rank))


def random_parameter(rng: random.Random) -> tuple[tuple[int, ...], tuple[Block, ...]]:
    kind = rng.choice(["matrix", "matrix", "stack", "interleaved"])
    rows, cols = rng.randint(1, 9), rng.randint(1, 9)
    if kind == "matrix":
        return (rows, cols), leading_blocks((rows, cols))
    if kind == "stack":
        shape = (rng.randint(1, 4), rows, cols)
        return shape, leading_blocks(shape)
    groups = rng.randint(1, 3)  # two matrices whose rows alternate in groups
    blocks = tuple(
        Block(
            tuple(Box(((2 * g + n) * rows, 0), (rows, cols)) for g in range(groups)),
            groups * rows,
            cols,
        )
        for n in range(2)
    )
    return (2 * groups * rows, cols), blocks


def random_plan(seed: int, size: int) -> tuple[Plan, torch.dtype]:
    rng = random.Random(seed)
    matrices = []
    for tensor in range(rng.choice([0, 1, 2, 5, 12])):
        shape, blocks = random_parameter(rng)
        layout = random_layout(shape, size, rng)
        matrices += [Matrix(f"w{tensor}", tensor, layout, block) for block in blocks]
    dtype = rng.choice([torch.bfloat16, torch.float32, torch.float16])
    plan = make_plan(
        matrices,
        size,
        wire_itemsize=dtype.itemsize,
        bucket_bytes=rng.choice([64, 512, 2**20]),
        replicas=rng.choice(["auto", "share", "repeat"]),
    )
    return plan, dtype


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12])
def test_schedules_bring_every_box_once(size: int) -> None:
    """To every owner all boxes of its matrices; to every holder a result for each of its pieces."""
    for seed in range(60):
        plan, dtype = random_plan(seed, size)
        everyone = [[make_schedule(plan, b, rank) for b in plan.buckets] for rank in range(size)]
        for bucket, indices in enumerate(plan.buckets):
            schedules = [everyone[rank][bucket] for rank in range(size)]
            check_peers_agree(schedules)
            for rank, schedule in enumerate(schedules):
                check_gathered(plan, indices, rank, schedule)
                check_scattered(plan, indices, rank, schedule)
            check_counted(plan, indices, schedules)
            travels = any(sum(s.gather.send_splits + s.scatter.send_splits) for s in schedules)
            assert plan.moves(bucket) == travels, seed
        sent = [
            sum(sum(s.gather.send_splits) + sum(s.scatter.send_splits) for s in everyone[rank])
            for rank in range(size)
        ]
        assert list(plan.prediction.sent_bytes) == [n * dtype.itemsize for n in sent], seed


def peer_segments(segments: tuple, splits: tuple[int, ...], peer: int) -> list:
    begin = sum(splits[:peer])
    return [s for s in segments if begin <= s.offset < begin + splits[peer]]


def check_peers_agree(schedules: list[Schedule]) -> None:
    for direction in ("gather", "scatter"):
        routes = [getattr(schedule, direction) for schedule in schedules]
        for a, sender in enumerate(routes):
            for b, receiver in enumerate(routes):
                sends = peer_segments(sender.sends, sender.send_splits, b)
                receives = peer_segments(receiver.receives, receiver.receive_splits, a)
                assert [(s.matrix, s.part, s.box) for s in sends] == [
                    (s.matrix, s.part, s.box) for s in receives
                ]
                assert sender.send_splits[b] == sum(s.box.numel for s in sends)
                assert receiver.receive_splits[a] == sum(s.box.numel for s in receives)
            assert sender.send_splits[a] == 0


def check_gathered(plan: Plan, indices: tuple[int, ...], rank: int, schedule: Schedule) -> None:
    assert list(schedule.owned) == [i for i in indices if rank in plan.owners[i]]
    route = schedule.gather
    found = Counter((s.matrix, s.part, s.box) for s in (*route.receives, *route.local))
    expected = Counter((i, part, box) for i in schedule.owned for part, box, _ in plan.boxes(i))
    assert found == expected
    for segment in (*route.sends, *route.local):
        matrix, piece = schedule.held[segment.held]
        assert (matrix, piece.part, piece.box) == (segment.matrix, segment.part, segment.box)


def check_scattered(plan: Plan, indices: tuple[int, ...], rank: int, schedule: Schedule) -> None:
    held = Counter((i, piece.part, piece.box) for i, piece in schedule.held)
    expected = Counter(
        (i, part, box) for i in indices for part, box, ranks in plan.boxes(i) if rank in ranks
    )
    assert held == expected
    route = schedule.scatter
    assert sorted(s.held for s in (*route.receives, *route.local)) == list(range(len(held)))
    for segment in (*route.receives, *route.local):
        matrix, piece = schedule.held[segment.held]
        assert (matrix, piece.part, piece.box) == (segment.matrix, segment.part, segment.box)
    assert all(rank in plan.owners[s.matrix] for s in (*route.sends, *route.local))


def check_counted(plan: Plan, indices: tuple[int, ...], schedules: list[Schedule]) -> None:
    """What the planner counts without schedules, when it keeps buckets to their cap."""
    counted = Traffic(plan.group_size)
    counted.add(plan.matrices, plan.owners, indices)
    gathers, scatters = [s.gather for s in schedules], [s.scatter for s in schedules]
    assert counted.gather_sends == [sum(r.send_splits) for r in gathers]
    assert counted.gather_receives == [sum(r.receive_splits) for r in gathers]
    assert counted.scatter_sends == [sum(r.send_splits) for r in scatters]
    assert counted.scatter_receives == [sum(r.receive_splits) for r in scatters]
    assert counted.owned == [sum(plan.matrices[i].numel for i in s.owned) for s in schedules]


def test_an_owner_that_stores_a_box_reads_its_own_copy() -> None:
    for seed in range(60):
        plan, _ = random_plan(seed, 6)
        for rank in range(6):
            for bucket in plan.buckets:
                schedule = make_schedule(plan, bucket, rank)
                held = {(i, piece.part, piece.box) for i, piece in schedule.held}
                assert not any((s.matrix, s.part, s.box) in held for s in schedule.gather.receives)


# On real ranks --------------------------------------------------------------------------------


def value_of(plan: Plan, tensor: int, seed: int) -> Tensor:
    """The whole parameter, the same on every rank."""
    shape = next(m.layout.shape for m in plan.matrices if m.tensor == tensor)
    generator = torch.Generator().manual_seed(1000 * seed + tensor)
    return torch.randn(shape, generator=generator).to(rank_device())


def local_part(layout: Layout, rank: int, full: Tensor) -> Tensor:
    """What a rank stores of a parameter, in the storage that its fragments index into."""
    fragments = layout.fragments[rank]
    if not fragments:
        return full.new_empty(0)
    if fragments[0].flat:
        size = [max(f.offset[0] + f.box.numel for f in fragments)]
    else:
        size = [max(f.offset[d] + f.box.size[d] for f in fragments) for d in range(full.ndim)]
    local = torch.full(size, float("nan"), device=full.device)
    whole = Box((0,) * full.ndim, tuple(full.shape))
    for fragment in fragments:
        fragment.view(local).copy_(full[fragment.box.slices_in(whole)])
    return local


def matrix_of(matrix: Matrix, full: Tensor) -> Tensor:
    whole = Box((0,) * full.ndim, tuple(full.shape))
    rows = [full[p.slices_in(whole)].reshape(-1, matrix.block.cols) for p in matrix.block.parts]
    return torch.cat(rows)


def result_of(index: int, gathered: Tensor) -> Tensor:
    """What the owner answers: different for each matrix, exact in every dtype."""
    return torch.flip(gathered, (0, 1)) * (-2.0 if index % 2 else 4.0)


def round_trip(seeds: list[int]) -> int:
    """Gather, answer and scatter random plans, bucket by bucket as the step loop does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    transferred = 0
    for seed in seeds:
        plan, dtype = random_plan(seed, size)
        full = {m.tensor: value_of(plan, m.tensor, seed) for m in plan.matrices}
        local = {m.tensor: local_part(m.layout, rank, full[m.tensor]) for m in plan.matrices}
        exchange = Exchange(plan, dist.group.WORLD, rank, rank_device(), dtype)
        reserved = exchange.buffer_bytes
        gathers: dict[int, Transfer] = {}
        scatters: dict[int, Transfer] = {}
        inputs: dict[int, dict[int, Tensor]] = {}
        for turn, bucket in plan.order:
            if turn == "gather":
                held = exchange.schedules[bucket].held
                directions = [piece.view(local[plan.matrices[i].tensor]) for i, piece in held]
                into = inputs[bucket] = empty_inputs(plan, exchange, bucket)
                gathers[bucket] = exchange.start_gather(bucket, directions, into)
            elif turn == "compute":
                into = inputs.pop(bucket)
                exchange.finish_gather(bucket, gathers.pop(bucket), into)
                results = answer(plan, into, full, dtype)
                scatters[bucket] = exchange.start_scatter(bucket, results)
            else:
                check_updates(plan, exchange, bucket, scatters.pop(bucket), full, dtype)
                transferred += len(exchange.schedules[bucket].held)
        assert exchange.buffer_bytes == reserved
        check_inputs_unchanged(plan, rank, local, full)
    return transferred


def empty_inputs(plan: Plan, exchange: Exchange, bucket: int) -> dict[int, Tensor]:
    return {
        index: exchange.new_batch(1, *plan.matrices[index].block.shape).fill_(float("nan"))[0]
        for index in exchange.schedules[bucket].owned
    }


def answer(
    plan: Plan, into: dict[int, Tensor], full: dict[int, Tensor], dtype: torch.dtype
) -> dict[int, Tensor]:
    results = {}
    for index, found in into.items():
        matrix = plan.matrices[index]
        assert found.dtype == dtype
        expected = matrix_of(matrix, full[matrix.tensor]).to(dtype)
        assert torch.equal(found, expected), f"matrix {index} came together wrong"
        results[index] = result_of(index, found).contiguous()
    return results


def check_updates(
    plan: Plan,
    exchange: Exchange,
    bucket: int,
    transfer: Transfer,
    full: dict[int, Tensor],
    dtype: torch.dtype,
) -> None:
    updates = exchange.finish_scatter(bucket, transfer)
    held = exchange.schedules[bucket].held
    assert len(updates) == len(held)
    for (index, piece), update in zip(held, updates, strict=True):
        matrix = plan.matrices[index]
        result = result_of(index, matrix_of(matrix, full[matrix.tensor]).to(dtype)).contiguous()
        expected = matrix.block.view(result, piece.part, piece.box)
        assert update.dtype == dtype
        assert torch.equal(update, expected), f"a result of matrix {index} arrived wrong"


def check_inputs_unchanged(
    plan: Plan, rank: int, local: dict[int, Tensor], full: dict[int, Tensor]
) -> None:
    for matrix in plan.matrices:
        expected = local_part(matrix.layout, rank, full[matrix.tensor])
        assert torch.equal(local[matrix.tensor].nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_matrices_and_results_survive_the_round_trip_in_the_wire_dtype(
    ranks: RankPool, size: int
) -> None:
    counts = ranks.run(size, round_trip, list(range(40)))
    assert min(counts) > 0


def row_sharded_plan(size: int, num_matrices: int) -> Plan:
    layout = placements_layout((8, 6), (Shard(0),), (size,))
    (block,) = leading_blocks((8, 6))
    matrices = [Matrix(f"w{t}", t, layout, block) for t in range(num_matrices)]
    return make_plan(matrices, size, bucket_bytes=2 * 8 * 6)


def reused_buffers(depth: int) -> tuple[int, list[list[int]]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    plan = replace(row_sharded_plan(size, 6 * size), depth=depth)
    exchange = Exchange(plan, dist.group.WORLD, rank, rank_device())
    addresses = []
    for bucket in range(len(plan.buckets)):
        held = exchange.schedules[bucket].held
        sources = [torch.ones(piece.box.size, device=rank_device()) for _, piece in held]
        into = empty_inputs(plan, exchange, bucket)
        transfer = exchange.start_gather(bucket, sources, into)
        exchange.finish_gather(bucket, transfer, into)
        back = exchange.start_scatter(bucket, into)
        back.wait()
        assert back.sent is not None
        assert transfer.sent is not None
        assert transfer.received.data_ptr() == back.sent.data_ptr()
        assert transfer.sent.data_ptr() == back.received.data_ptr()
        addresses.append(exchange.addresses(bucket))
        assert addresses[-1] == addresses[-1][::-1]
    return exchange.buffer_bytes, addresses


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_pair_of_buffers_for_each_bucket_under_way_serves_all(
    ranks: RankPool, depth: int
) -> None:
    size = 2
    for reserved, addresses in ranks.run(size, reused_buffers, depth):
        assert len(addresses) == 6
        assert len({tuple(each) for each in addresses}) == depth
        assert addresses == addresses[:depth] * (6 // depth)
        # One 8 x 6 bf16 matrix per owner and bucket; half of it stays.
        assert reserved == depth * 2 * (8 * 6 // 2) * 2


def one_process() -> None:
    plan = row_sharded_plan(1, 3)
    exchange = Exchange(plan, None, 0, torch.device("cpu"), torch.float32)
    assert exchange.buffer_bytes == 0
    for bucket, indices in enumerate(plan.buckets):
        values = [torch.full((8, 6), float(index)) for index in indices]
        into = {index: torch.empty(8, 6) for index in indices}
        transfer = exchange.start_gather(bucket, values, into)
        exchange.finish_gather(bucket, transfer, into)
        assert all(into[index].eq(index).all() for index in indices)
        back = exchange.finish_scatter(bucket, exchange.start_scatter(bucket, into))
        assert all(torch.equal(b, v) for b, v in zip(back, values, strict=True))


def test_one_process_needs_no_group_and_no_buffers() -> None:
    one_process()


def silent() -> int:
    """Whole replicas that repeat: no collective may be started."""
    rank, size = dist.get_rank(), dist.get_world_size()
    layout = replicated_layout((8, 6), size)
    (block,) = leading_blocks((8, 6))
    plan = make_plan([Matrix("w", 0, layout, block)], size, replicas="repeat")
    exchange = Exchange(plan, dist.group.WORLD, rank, rank_device())
    value = torch.randn(8, 6, device=rank_device())
    into = {0: exchange.new_batch(1, 8, 6)[0]}
    transfer = exchange.start_gather(0, [value], into)
    assert transfer.work is None
    exchange.finish_gather(0, transfer, into)
    assert torch.equal(into[0], value.bfloat16())
    scatter = exchange.start_scatter(0, into)
    assert scatter.work is None
    (update,) = exchange.finish_scatter(0, scatter)
    assert torch.equal(update, into[0])
    return exchange.buffer_bytes


def test_replicas_that_repeat_the_work_do_not_communicate(ranks: RankPool) -> None:
    assert ranks.run(3, silent) == [0, 0, 0]
