"""What the planner decides, case by case."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

import pytest
from torch.distributed.tensor import Replicate, Shard

from flashns_dist.exchange import make_schedule
from flashns_dist.layout import (
    Layout,
    flat_layout,
    leading_blocks,
    placements_layout,
    replicated_layout,
)
from flashns_dist.plan import CostModel, Matrix, Plan, make_plan

FREE_LINK = CostModel(link_bytes_per_second=1e18, exchange_seconds=1e-12)
SLOW_LINK = CostModel(link_bytes_per_second=1e6, exchange_seconds=1.0)


def matrix(layout: Layout, tensor: int = 0, kind: str = "") -> Matrix:
    (block,) = leading_blocks(layout.shape)
    return Matrix(f"w{tensor}", tensor, layout, block, kind)


def on_rank(home: int, shape: tuple[int, int], size: int) -> Layout:
    """The whole matrix on one rank, in flat storage."""
    numel = shape[0] * shape[1]
    return flat_layout(shape, tuple(((0, numel, 0),) if r == home else () for r in range(size)))


def sharded(size: int, shapes: list[tuple[int, int]]) -> list[Matrix]:
    layouts = [placements_layout(shape, (Shard(0),), (size,)) for shape in shapes]
    return [matrix(layout, tensor) for tensor, layout in enumerate(layouts)]


def buffered(plan: Plan, rank: int) -> list[int]:
    """Most elements of each bucket that a rank sends, receives or orthogonalizes.

    Where nothing travels, half of the latter.
    """
    found = []
    for number, bucket in enumerate(plan.buckets):
        schedule = make_schedule(plan, bucket, rank)
        owned = sum(plan.matrices[index].numel for index in schedule.owned)
        sums = [owned if plan.moves(number) else -(-owned // 2)]
        for route in (schedule.gather, schedule.scatter):
            sums += [sum(route.send_splits), sum(route.receive_splits)]
        found.append(max(sums))
    return found


def test_no_matrices_make_an_empty_plan() -> None:
    plan = make_plan([], 4)
    assert (plan.owners, plan.buckets) == ((), ())
    assert plan.prediction.compute_seconds == (0.0,) * 4
    assert plan.prediction.step_seconds == 0.0
    assert plan.prediction.balance == 1.0


def test_one_matrix_has_one_owner_and_one_bucket() -> None:
    plan = make_plan(sharded(4, [(16, 8)]), 4)
    assert plan.owners == ((0,),)
    assert plan.buckets == ((0,),)
    assert plan.prediction.balance == 4.0


def test_ranks_beyond_the_matrices_stay_idle() -> None:
    plan = make_plan(sharded(8, [(16, 8)] * 3), 8)
    assert sorted(plan.owners) == [(0,), (1,), (2,)]


def test_one_rank_moves_nothing() -> None:
    plan = make_plan(sharded(1, [(16, 8), (8, 16), (4, 4)]), 1)
    assert plan.prediction.sent_bytes == (0,)
    assert not any(plan.moves(bucket) for bucket in range(len(plan.buckets)))


def test_all_shapes_are_balanced_together() -> None:
    """One large matrix weighs as much as many small ones, whatever their shapes."""
    large, small = (2048, 2048), (512, 1024)
    cost = CostModel()
    count = int(cost.orthogonalize_seconds(*large) / cost.orthogonalize_seconds(*small))
    plan = make_plan(sharded(2, [large] + [small] * count), 2)
    (big,) = plan.owners[0]
    assert all(owner != (big,) for owner in plan.owners[1:])


@pytest.mark.parametrize("seed", range(20))
def test_random_matrices_keep_the_bound_of_largest_first(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 12)
    shapes = [(rng.randint(1, 40) * 64, rng.randint(1, 40) * 64) for _ in range(rng.randint(1, 60))]
    plan = make_plan(sharded(size, shapes), size)
    busy = plan.prediction.compute_seconds
    largest = max(CostModel().orthogonalize_seconds(*shape) for shape in shapes)
    assert max(busy) <= (fmean(busy) + largest) * (1 + 1e-9)
    assert sum(busy) == pytest.approx(sum(CostModel().orthogonalize_seconds(*s) for s in shapes))


def test_a_rank_that_stores_everything_gives_most_of_it_away() -> None:
    size = 4
    plan = make_plan([matrix(on_rank(0, (2048, 2048), size), t) for t in range(16)], size)
    assert plan.prediction.balance == pytest.approx(1.0)
    assert plan.prediction.sent_bytes[0] > 0


def test_matrices_do_not_move_where_the_link_is_too_slow() -> None:
    size = 4
    matrices = [matrix(on_rank(0, (2048, 2048), size), t) for t in range(16)]
    plan = make_plan(matrices, size, cost=SLOW_LINK)
    assert set(plan.owners) == {(0,)}
    assert not any(plan.prediction.sent_bytes)


def test_matrices_move_only_as_far_as_the_balance_needs() -> None:
    """Nine on rank 0, seven on rank 1: one moves, and fifteen stay."""
    homes = [0] * 9 + [1] * 7
    matrices = [matrix(on_rank(home, (2048, 2048), 2), t) for t, home in enumerate(homes)]
    plan = make_plan(matrices, 2)
    moved = [t for t, home in enumerate(homes) if plan.owners[t] != (home,)]
    assert len(moved) == 1
    assert plan.prediction.balance == pytest.approx(1.0)


def test_a_shared_owner_of_whole_replicas_is_one_of_them() -> None:
    """Experts on two replicas of four ranks: either copy may do the work, no other rank should."""
    layout = placements_layout((8, 256, 512), (Replicate(), Shard(0)), (2, 4))
    blocks = leading_blocks(layout.shape)
    matrices = [Matrix("experts", 0, layout, block) for block in blocks]
    plan = make_plan(matrices, 8, replicas="share")
    for index, (owner,) in enumerate(plan.owners):
        assert owner % 4 == index // 2
    assert plan.prediction.balance == pytest.approx(1.0)


HYBRID = [placements_layout((64 * n, 256), (Replicate(), Shard(0)), (4, 2)) for n in (1, 2, 3, 4)]
HYBRID_MATRICES = [matrix(HYBRID[t % 4], t) for t in range(24)]


def test_replicas_share_the_work_where_the_link_is_free() -> None:
    plan = make_plan(HYBRID_MATRICES, 8, cost=FREE_LINK)
    assert {len(owners) for owners in plan.owners} == {1}
    assert plan.prediction.balance < 1.1


def test_replicas_repeat_the_work_where_the_link_is_slow() -> None:
    plan = make_plan(HYBRID_MATRICES, 8, cost=SLOW_LINK)
    assert {len(owners) for owners in plan.owners} == {4}
    replica = {owner // 2 for owner in plan.owners[0]}
    assert replica == {0, 1, 2, 3}


def test_whole_replicas_that_repeat_send_nothing() -> None:
    layout = replicated_layout((64, 256), 4)
    plan = make_plan([matrix(layout, t) for t in range(6)], 4, replicas="repeat")
    assert set(plan.owners) == {(0, 1, 2, 3)}
    assert not any(plan.prediction.sent_bytes)
    assert not any(plan.moves(bucket) for bucket in range(len(plan.buckets)))


@pytest.mark.parametrize("cost", [None, FREE_LINK, SLOW_LINK])
def test_auto_takes_what_is_predicted_faster(cost: CostModel | None) -> None:
    seconds = {
        replicas: make_plan(
            HYBRID_MATRICES, 8, cost=cost, replicas=replicas
        ).prediction.step_seconds
        for replicas in ("auto", "share", "repeat")
    }
    assert seconds["auto"] == min(seconds.values())


def test_repeating_replicas_do_not_mix_up_meshes() -> None:
    """Parameters replicated over different axes of one mesh: each is owned once per replica."""
    layouts = [
        placements_layout((64, 96), placements, (2, 2))
        for placements in ((Replicate(), Shard(0)), (Shard(0), Replicate()), (Shard(0), Shard(1)))
    ]
    matrices = [matrix(layouts[t % 3], t) for t in range(30)]
    plan = make_plan(matrices, 4, replicas="repeat")
    assert set(plan.owners[0::3]) <= {(0, 2), (1, 3)}
    assert set(plan.owners[1::3]) <= {(0, 1), (2, 3)}
    assert {len(owners) for owners in plan.owners[2::3]} == {1}
    busy = plan.prediction.compute_seconds
    assert max(busy) <= fmean(busy) + CostModel().orthogonalize_seconds(64, 96) * (1 + 1e-9)


@pytest.mark.parametrize("bucket_bytes", [2 * 64 * 64, 7 * 2 * 64 * 64, 2**20])
def test_a_rank_that_sends_to_all_keeps_to_the_cap(bucket_bytes: int) -> None:
    """Everything lies on rank 0, whose buffers fill faster than any owner's."""
    size = 8
    matrices = [matrix(on_rank(0, (64, 64), size), t) for t in range(40)]
    plan = make_plan(matrices, size, cost=FREE_LINK, bucket_bytes=bucket_bytes)
    assert plan.prediction.balance == pytest.approx(1.0)
    for rank in range(size):
        assert max(buffered(plan, rank)) * 2 <= bucket_bytes
    assert sorted(index for bucket in plan.buckets for index in bucket) == list(range(40))


@pytest.mark.parametrize("seed", range(10))
def test_random_layouts_keep_to_the_cap_or_one_matrix(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 6)
    matrices = []
    for tensor in range(rng.randint(1, 40)):
        shape = (rng.randint(1, 48), rng.randint(1, 48))
        layout = rng.choice(
            [
                on_rank(rng.randrange(size), shape, size),
                placements_layout(shape, (Shard(rng.randrange(2)),), (size,)),
                replicated_layout(shape, size),
            ]
        )
        matrices.append(matrix(layout, tensor))
    cap = rng.choice([64, 1024, 8192])
    replicas = rng.choice(["auto", "share", "repeat"])
    plan = make_plan(matrices, size, bucket_bytes=2 * cap, replicas=replicas)
    largest = max(
        m.numel * -(-m.layout.num_replicas // len(owners))
        for m, owners in zip(plan.matrices, plan.owners, strict=True)
    )
    for rank in range(size):
        assert max(buffered(plan, rank)) <= max(cap, largest)


def test_a_smaller_cap_makes_more_buckets() -> None:
    matrices = sharded(2, [(64, 64)] * 32)
    counts = [
        len(make_plan(matrices, 2, bucket_bytes=2 * 64 * 64 * n).buckets) for n in (1, 4, 16, 64)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 16
    assert counts[-1] == 1


def test_buckets_are_twice_as_large_where_nothing_travels() -> None:
    """As of experts that lie whole on their ranks: there are no transfer buffers."""
    whole = [matrix(on_rank(t % 2, (64, 64), 2), t) for t in range(64)]
    plan = make_plan(whole, 2, bucket_bytes=2 * 64 * 64 * 4)
    assert [len(bucket) for bucket in plan.buckets] == [16] * 4
    assert len(make_plan(sharded(2, [(64, 64)] * 64), 2, bucket_bytes=2 * 64 * 64 * 4).buckets) == 8
    # One that is larger than both is alone.
    large = [matrix(on_rank(t % 2, (64, 64 * 9), 2), t) for t in range(4)]
    assert len(make_plan(large, 2, bucket_bytes=2 * 64 * 64 * 4).buckets) == 2


def test_buckets_hold_equal_shapes_together() -> None:
    """So that few kernels with large batches run."""
    shapes = [(64, 64), (64, 128), (128, 64), (32, 64)]
    matrices = sharded(2, [shapes[t % 4] for t in range(64)])
    plan = make_plan(matrices, 2, bucket_bytes=2 * 8 * 64 * 128)
    kinds = [{plan.matrices[index].block.shape for index in bucket} for bucket in plan.buckets]
    assert len(plan.buckets) >= 4
    assert sum(map(len, kinds)) <= len(plan.buckets) + len(shapes) - 1


def test_buckets_follow_the_arrival_of_gradients() -> None:
    """The last parameters' first, so that the first bucket need not wait for the last gradient."""
    shapes = [(64, 64), (64, 128), (128, 64), (32, 64)]
    matrices = sharded(2, [shapes[t % 4] for t in range(64)])
    cap = 2 * 4 * 64 * 128
    plan = make_plan(matrices, 2, bucket_bytes=cap, arrival=range(64, 0, -1))
    usual = make_plan(matrices, 2, bucket_bytes=cap)
    assert plan.owners == usual.owners
    assert plan.digest != usual.digest
    assert len(plan.buckets) >= 4
    for owner in ((0,), (1,)):
        found = [
            index
            for bucket in plan.buckets
            for index in reversed(bucket)
            if plan.owners[index] == owner
        ]
        assert found == sorted(found, reverse=True)
    assert min(plan.buckets[0]) >= 64 - 2 * 64 // len(plan.buckets)
    assert max(max(buffered(plan, rank)) for rank in (0, 1)) * 2 <= cap


def test_buckets_that_follow_gradients_are_small_if_nobody_says_otherwise() -> None:
    matrices = sharded(2, [(4096, 4096)] * 32)  # 32 MiB each
    cost = CostModel(bucket_seconds=1.0)
    plan = make_plan(matrices, 2, cost=cost, memory_bytes=2**40)
    assert max(map(len, plan.buckets)) > 4
    early = make_plan(matrices, 2, cost=cost, memory_bytes=2**40, arrival=range(32, 0, -1))
    assert max(map(len, early.buckets)) == 4


def test_the_digest_tells_plans_apart() -> None:
    base = sharded(2, [(16, 8), (8, 16), (12, 12)])
    other_layout = matrix(placements_layout((12, 12), (Shard(1),), (2,)), 2)
    plans = [
        make_plan(base, 2),
        make_plan(base[::-1], 2),
        make_plan(base[:2], 2),
        make_plan([*base[:2], replace(base[2], name="other")], 2),
        make_plan([*base[:2], replace(base[2], kind="gram")], 2),
        make_plan([*base[:2], other_layout], 2),
        make_plan(base, 2, bucket_bytes=2 * 12 * 12),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert make_plan(sharded(2, [(16, 8), (8, 16), (12, 12)]), 2).digest == plans[0].digest


def test_a_layout_for_another_group_size_is_refused_by_name() -> None:
    wrong = replace(sharded(3, [(8, 8)])[0], name="layers.3.wq")
    with pytest.raises(ValueError, match=r"layers.3.wq: its layout is for 3 ranks.* has 2"):
        make_plan([*sharded(2, [(8, 8)]), wrong], 2)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="replicas='both' is unknown; use \"auto\""):
        make_plan([], 2, replicas="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bucket_bytes=0 must be positive"):
        make_plan([], 2, bucket_bytes=0)
    with pytest.raises(ValueError, match="memory_bytes=-1 must be positive"):
        make_plan([], 2, memory_bytes=-1)
