"""The decoder-only transformer that the main job trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a transformer.

    Attributes:
        vocab_size: Rows of the embedding and of the head.
        dim: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Query heads; `dim / num_heads` is the width of one head.
        num_kv_heads: Key and value heads; divides `num_heads`.
        hidden_dim: Width of the SwiGLU layer.
        max_seq_len: Longest sequence that the rotary table covers.
        rope_base: Base of the rotary frequencies.
        norm_eps: Added to the mean square in every RMSNorm.
    """

    vocab_size: int = 256
    dim: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    hidden_dim: int = 512
    max_seq_len: int = 256
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}: "
                "every head needs the same width. Change --dim or --heads."
            )
        if (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"head width {self.dim // self.num_heads} is odd, and rotary embeddings turn "
                "pairs of features. Change --dim or --heads."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}: every key head serves the same number of query heads. "
                "Change --heads or --kv-heads."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


SIZES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),
    "160m": ModelConfig(
        dim=768, num_layers=12, num_heads=12, num_kv_heads=4, hidden_dim=2304, max_seq_len=1024
    ),
    "390m": ModelConfig(
        dim=1024, num_layers=24, num_heads=16, num_kv_heads=8, hidden_dim=2816, max_seq_len=1024
    ),
    "1b": ModelConfig(
        dim=2048, num_layers=20, num_heads=16, num_kv_heads=8, hidden_dim=5632, max_seq_len=2048
    ),
}
"""Named shapes for `--size`. The parameter counts are with the 50304-token vocabulary."""


def rotary_table(head_dim: int, seq_len: int, base: float) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines of the rotary embedding.

    Returns:
        Two fp32 tensors of shape `(seq_len, head_dim / 2)`.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(
    x: Tensor,  # (batch, heads, seq, head_dim)
    cos: Tensor,  # (seq, head_dim / 2)
    sin: Tensor,
) -> Tensor:
    """Apply the rotary embedding; same shape and dtype as `x`."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and normalized queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.num_heads // config.num_kv_heads
        self.norm_eps = config.norm_eps
        self.wq = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `(batch, seq, dim)` to the same shape."""
        batch, seq_len, _ = x.shape
        # -1 heads, since tensor parallelism leaves only some of them on this rank.
        q, k, v = (
            projection(x).view(batch, seq_len, -1, self.head_dim).transpose(1, 2)
            for projection in (self.wq, self.wk, self.wv)
        )
        # Without parameters, so that it needs no plan of its own under tensor parallelism.
        q = rotate(F.rms_norm(q, (self.head_dim,), eps=self.norm_eps), cos, sin)
        k = rotate(F.rms_norm(k, (self.head_dim,), eps=self.norm_eps), cos, sin)
        if self.group > 1:
            k = k.repeat_interleave(self.group, dim=1)
            v = v.repeat_interleave(self.group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, seq_len, -1)
        out: Tensor = self.wo(mixed)
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward layer, `w_down(silu(w_gate x) * w_up x)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w_up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w_down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, seq, dim)` to the same shape."""
        out: Tensor = self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))
        return out


class Block(nn.Module):
    """One transformer layer with normalization before each branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `(batch, seq, dim)` to the same shape."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


class Transformer(nn.Module):
    """Decoder-only transformer: token ids in, logits out.

    The weights are the same for the same `seed` on every device, at every world size: they are
    drawn on the CPU, before any sharding.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rotary_table(config.head_dim, config.max_seq_len, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor
        self._draw_weights(seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids `(batch, seq)` to logits `(batch, seq, vocab_size)`."""
        seq_len = tokens.shape[1]
        cos, sin = self.cos[:seq_len], self.sin[:seq_len]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def num_parameters(self) -> int:
        """Count the weights of the whole model, sharded or not."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def _draw_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 1.0, generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
        # Branches start at zero, so that the model starts as its embedding and head.
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.wo.weight.zero_()
            block.feed_forward.w_down.weight.zero_()
        self.head.weight.zero_()
