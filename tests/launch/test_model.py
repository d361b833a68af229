"""The transformer: shapes, causality, initial state."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from launch.model import SIZES, ModelConfig, Transformer, rotary_table, rotate

SMALL = ModelConfig(
    vocab_size=61,
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    hidden_dim=48,
    max_seq_len=20,
)


def busy_model(config=SMALL):
    """A model whose branches and head are not zero, as after training."""
    model = Transformer(config, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_logits_have_one_row_per_token(num_heads, num_kv_heads):
    model = Transformer(replace(SMALL, num_heads=num_heads, num_kv_heads=num_kv_heads))
    tokens = torch.randint(61, (3, 17))
    assert model(tokens).shape == (3, 17, 61)
    block = model.blocks[0]
    head_dim = 32 // num_heads
    assert block.attention.wk.weight.shape == (num_kv_heads * head_dim, 32)
    assert block.attention.wq.weight.shape == (num_heads * head_dim, 32)


def test_untrained_model_predicts_every_token_alike():
    model = Transformer(SMALL)
    tokens = torch.randint(61, (2, 20))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(61))


def test_later_tokens_do_not_reach_earlier_logits():
    model = busy_model()
    tokens = torch.randint(61, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_grouped_query_attention_equals_repeated_key_heads():
    grouped = busy_model()
    full = Transformer(replace(SMALL, num_kv_heads=4))
    state = grouped.state_dict()
    for name, value in state.items():
        if name.endswith(("wk.weight", "wv.weight")):
            heads = value.view(2, 8, 32).repeat_interleave(2, dim=0)
            state[name] = heads.reshape(32, 32)
    full.load_state_dict(state)
    tokens = torch.randint(61, (2, 9))
    torch.testing.assert_close(full(tokens), grouped(tokens))


def test_rotary_products_depend_on_distance_alone():
    cos, sin = rotary_table(8, 30, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float32)
    rotated_q = rotate(q.expand(1, 1, 30, 8), cos, sin)
    rotated_k = rotate(k.expand(1, 1, 30, 8), cos, sin)
    products = (rotated_q @ rotated_k.mT)[0, 0]
    for offset in (-5, 0, 7):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert products.diagonal(0)[0].item() == pytest.approx((q * k).sum().item(), abs=1e-5)


def test_weights_follow_the_seed():
    first, again, other = (Transformer(SMALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_named_sizes_have_the_parameters_that_they_announce():
    with torch.device("meta"):
        counts = {
            name: sum(
                p.numel() for p in Transformer(replace(config, vocab_size=50_304)).parameters()
            )
            for name, config in SIZES.items()
            if name != "tiny"
        }
    announced = {"160m": 160e6, "390m": 390e6, "1b": 1.15e9}
    for name, count in counts.items():
        assert count == pytest.approx(announced[name], rel=0.02), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 30}, "not a multiple of num_heads"),
        ({"dim": 36, "num_heads": 4}, "head width 9 is odd"),
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
