"""QK-clip: the heads whose logits were too large end at the threshold, the others stay."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flashns_dist.layout import QKV
from flashns_dist.optim.qk_clip import Attention, QKClip, largest_logits
from flashns_dist.testing.pool import RankPool, rank_device

HEADS, KV_HEADS, HEAD, DIM, THRESHOLD = 6, 3, 5, 13, 20.0


def values(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(rank_device())


def head_logits(x: Tensor, q: Tensor, k: Tensor, biases: tuple[Tensor, Tensor] | None) -> Tensor:
    """Largest causal logit of each query head in float64: ``(heads,)``."""
    x = x.double()
    queries, keys = x @ q.double().T, x @ k.double().T
    if biases is not None:
        queries, keys = queries + biases[0].double(), keys + biases[1].double()
    queries = queries.unflatten(-1, (-1, HEAD)).transpose(1, 2)
    keys = keys.unflatten(-1, (-1, HEAD)).transpose(1, 2)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = queries @ keys.mT / HEAD**0.5
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    return logits.masked_fill(hidden, -float("inf")).amax((0, 2, 3))


def query_weight() -> Tensor:
    """Head 0 is far above the threshold, 1 a little, 2 above it beside 3 below; 4 and 5 below."""
    sizes = torch.tensor([12.0, 4.0, 6.0, 0.3, 0.2, 0.1], device=rank_device())
    return values((HEADS * HEAD, DIM), 1) * sizes.repeat_interleave(HEAD)[:, None]


def place(value: Tensor, kind: str) -> nn.Parameter:
    if kind == "plain":
        return nn.Parameter(value.clone())
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    placements = [Shard({"rows": 0, "columns": 1}[kind])]
    return nn.Parameter(distribute_tensor(value.clone(), mesh, placements, src_data_rank=None))


def whole(param: Tensor) -> Tensor:
    found = param.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def clip_by_layout(kind: str, alpha: float) -> None:
    """Every rank sees other data; together they decide."""
    size, rank = dist.get_world_size(), dist.get_rank()
    q, k = query_weight(), values((KV_HEADS * HEAD, DIM), 2)
    parameters = [place(q, kind), place(k, kind)]
    clip = QKClip(
        [Attention.separate(*parameters, HEADS, KV_HEADS)],
        threshold=THRESHOLD,
        alpha=alpha,
        group=dist.group.WORLD,
    )
    x = values((size, 2, 7, DIM), 3)
    before = torch.stack([head_logits(part, q, k, None) for part in x]).amax(0)
    exceeded = before > THRESHOLD
    assert exceeded.tolist() == [True, True, True, False, False, False]
    (factor,) = clip([head_logits(x[rank], q, k, None).float()])
    new_q, new_k = map(whole, parameters)
    after = torch.stack([head_logits(part, new_q, new_k, None) for part in x]).amax(0)
    expected = torch.where(exceeded, THRESHOLD, before)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(factor.to(before.device), expected / before, rtol=1e-6, atol=0)
    same_heads = (new_q == q).view(HEADS, -1).all(1)
    assert same_heads.tolist() == [False, alpha == 0, False, True, True, True]
    # Heads 2 and 3 share a key head, and head 3 does not need the scaling.
    same_keys = (new_k == k).view(KV_HEADS, -1).all(1)
    assert same_keys.tolist() == [alpha == 1, True, True]


@pytest.mark.parametrize(
    ("kind", "world_size", "alpha"),
    [("plain", 1, 0.5), ("rows", 2, 0.5), ("rows", 4, 0.0), ("columns", 3, 1.0), ("plain", 2, 0.5)],
)
def test_heads_above_the_threshold_end_there_and_others_stay(
    ranks: RankPool, kind: str, world_size: int, alpha: float
) -> None:
    ranks.run(world_size, clip_by_layout, kind, alpha)


@pytest.mark.parametrize("order", ["stacked", "grouped"])
def test_a_fused_weight_with_biases_is_clipped_as_separate_ones(order: str) -> None:
    q, k, v = query_weight(), values((KV_HEADS * HEAD, DIM), 2), values((KV_HEADS * HEAD, DIM), 4)
    biases = [values((w.shape[0],), 5 + i) for i, w in enumerate((q, k, v))]

    def fuse(q: Tensor, k: Tensor, v: Tensor) -> nn.Parameter:
        if order == "stacked":
            return nn.Parameter(torch.cat([q, k, v]))
        by_group = [part.unflatten(0, (KV_HEADS, -1)) for part in (q, k, v)]
        return nn.Parameter(torch.cat(by_group, dim=1).flatten(0, 1))

    fused, bias = fuse(q, k, v), fuse(*biases)
    view = QKV(HEADS, KV_HEADS, order=order)
    x = values((2, 7, DIM), 3)
    logits = head_logits(x, q, k, (biases[0], biases[1]))
    QKClip([Attention.fused(fused, view, bias=bias)], threshold=THRESHOLD)([logits])
    apart = [nn.Parameter(w.clone()) for w in (q, k, biases[0], biases[1])]
    layer = Attention.separate(
        apart[0], apart[1], HEADS, KV_HEADS, biases=(apart[2], apart[3]), name="layer"
    )
    QKClip([layer], threshold=THRESHOLD)([logits])
    assert torch.equal(fused, fuse(apart[0], apart[1], v))
    assert torch.equal(bias, fuse(apart[2], apart[3], biases[2]))
    after = head_logits(x, apart[0], apart[1], (apart[2], apart[3]))
    torch.testing.assert_close(after, logits.clamp(max=THRESHOLD), rtol=1e-5, atol=0)


def test_latent_attention_keeps_its_shared_rotary_key() -> None:
    heads, nope, rope, width, rank = 4, 5, 3, 6, 7
    query_up = values((heads * (nope + rope), rank), 1, 2.0)
    query_up.view(heads, -1)[2:] *= 0.01
    key_value_up = values((heads * (nope + width), rank), 2)
    latent_q, latent_kv, rotary_key = (values((9, n), 3 + n) for n in (rank, rank, rope))

    def logits(query_up: Tensor, key_value_up: Tensor) -> Tensor:
        queries = (latent_q.double() @ query_up.double().T).unflatten(-1, (heads, -1))
        keys = (latent_kv.double() @ key_value_up.double().T).unflatten(-1, (heads, -1))
        keys = torch.cat(
            [keys[..., :nope], rotary_key.double()[:, None].expand(-1, heads, -1)], dim=-1
        )
        return torch.einsum("qhd,khd->hqk", queries, keys).amax((1, 2))

    parameters = [nn.Parameter(query_up.clone()), nn.Parameter(key_value_up.clone())]
    before = logits(query_up, key_value_up)
    assert (before > 3).tolist() == [True, True, False, False]
    layer = Attention.latent(*parameters, heads, nope=nope, rope=rope)
    QKClip([layer], threshold=3.0)([before])
    after = logits(*parameters)
    torch.testing.assert_close(after, before.clamp(max=3.0), rtol=1e-5, atol=0)
    same = (parameters[1] == key_value_up).view(heads, nope + width, rank).all(2)
    assert same[:, nope:].all(), "values changed"
    assert same[2:].all()
    assert not same[:2, :nope].any()


def test_nothing_changes_below_the_threshold() -> None:
    weights = [nn.Parameter(values((HEADS * HEAD, DIM), i)) for i in range(2)]
    before = [w.detach().clone() for w in weights]
    clip = QKClip([Attention.separate(*weights, HEADS)], threshold=THRESHOLD)
    (factor,) = clip([torch.full((HEADS,), THRESHOLD)])
    assert factor.tolist() == [1.0] * HEADS
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_low_precision_weights_are_scaled_in_fp32() -> None:
    weights = [nn.Parameter(values((HEADS * HEAD, DIM), i).bfloat16()) for i in range(2)]
    expected = (weights[0].detach().float() * 0.25**0.5).bfloat16()
    clip = QKClip([Attention.separate(*weights, HEADS)], threshold=1.0)
    clip([torch.full((HEADS,), 4.0)])
    assert torch.equal(weights[0], expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [3, 512])
def test_largest_logits_are_those_of_attention(causal: bool, chunk: int) -> None:
    x, q, k = values((2, 7, DIM), 3), query_weight(), values((KV_HEADS * HEAD, DIM), 2)
    query = (x @ q.T).unflatten(-1, (-1, HEAD)).transpose(1, 2)
    key = (x @ k.T).unflatten(-1, (-1, HEAD)).transpose(1, 2)
    found = largest_logits(query, key, causal=causal, chunk=chunk)
    if causal:
        expected = head_logits(x, q, k, None)
    else:
        keys = key.double().repeat_interleave(2, dim=1)
        expected = (query.double() @ keys.mT / HEAD**0.5).amax((0, 2, 3))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def nan_on_one_rank() -> None:
    weights = [place(values((HEADS * HEAD, DIM), i), "rows") for i in range(2)]
    before = [whole(w).clone() for w in weights]
    layer = Attention.separate(*weights, HEADS, name="layers.4.attention")
    clip = QKClip([layer], threshold=1.0, group=dist.group.WORLD)
    logits = torch.full((HEADS,), 4.0, device=rank_device())
    if dist.get_rank() == 1:
        logits[2] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.4\.attention: .* heads \[2\] is NaN"):
        clip([logits])
    assert all(torch.equal(whole(w), b) for w, b in zip(weights, before, strict=True))
    logits[:3] = -float("inf")  # heads of other ranks
    (factor,) = clip([logits.nan_to_num(4.0)])
    assert factor.tolist() == [1.0] * 3 + [0.25] * 3


def test_a_nan_on_one_rank_is_an_error_on_all(ranks: RankPool) -> None:
    ranks.run(2, nan_on_one_rank)


def wrong_shape_on_one_rank() -> None:
    weights = [place(values((HEADS * HEAD, DIM), i), "rows") for i in range(2)]
    before = [whole(w).clone() for w in weights]
    clip = QKClip([Attention.separate(*weights, HEADS)], threshold=1.0, group=dist.group.WORLD)
    is_wrong = dist.get_rank() == 1
    logits = torch.full((HEADS // (2 if is_wrong else 1),), 4.0, device=rank_device())
    message = r"shapes \[\(3,\)\]; give one" if is_wrong else "on another rank: see its error"
    for given in ([logits], [] if is_wrong else [logits]):
        message = r"max_logits has shapes \[\]" if not given else message
        with pytest.raises(ValueError, match=message):
            clip(given)
    assert all(torch.equal(whole(w), b) for w, b in zip(weights, before, strict=True))
    (factor,) = clip([torch.full((HEADS,), 4.0, device=rank_device())])
    assert factor.tolist() == [0.25] * HEADS


def test_a_wrong_shape_on_one_rank_is_an_error_on_all(ranks: RankPool) -> None:
    ranks.run(2, wrong_shape_on_one_rank)


def weight(rows: int = HEADS * HEAD) -> nn.Parameter:
    return nn.Parameter(torch.ones(rows, DIM))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QKClip([], threshold=0.0), "threshold=0.0"),
        (lambda: QKClip([], alpha=1.5), "alpha=1.5"),
        (lambda: Attention.separate(weight(31), weight(), HEADS), "31 rows are not 6 heads"),
        (
            lambda: Attention.separate(weight(), weight(4 * HEAD), HEADS, 4),
            "num_heads=6 is not a multiple of num_kv_heads=4",
        ),
        (lambda: Attention.latent(weight(), weight(), HEADS, nope=3, rope=3), "5 query rows"),
        (lambda: Attention.fused(weight(31), QKV(HEADS)), "31 rows are not 6 query heads"),
        (
            lambda: QKClip([Attention.separate(weight(), weight(), HEADS)])([torch.ones(3)]),
            "shapes [(3,)]; give one tensor per layer, of shapes [(6,)]",
        ),
        (lambda: QKClip([Attention.separate(weight(), weight(), HEADS)])([]), "shapes []"),
        (lambda: QKClip([])([torch.ones(3)]), "of shapes []"),
    ],
)
def test_unsuitable_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
