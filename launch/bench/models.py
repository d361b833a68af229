"""The matrices of models, by name: what optimizers are measured and planned on."""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]
Shapes = list[tuple[str, Shape]]


def dense(num_layers: int, dim: int, kv_dim: int, hidden_dim: int) -> Shapes:
    """Attention and gated MLP of a transformer, every projection a matrix of its own."""
    layer = {
        "wq": (dim, dim),
        "wk": (kv_dim, dim),
        "wv": (kv_dim, dim),
        "wo": (dim, dim),
        "gate": (hidden_dim, dim),
        "up": (hidden_dim, dim),
        "down": (dim, hidden_dim),
    }
    return [(f"{i}.{name}", shape) for i in range(num_layers) for name, shape in layer.items()]


def experts(num_layers: int, num_experts: int, dim: int, hidden_dim: int, first: int = 0) -> Shapes:
    """Stacks of experts: three tensors per layer."""
    layer = {
        "experts.gate": (num_experts, hidden_dim, dim),
        "experts.up": (num_experts, hidden_dim, dim),
        "experts.down": (num_experts, dim, hidden_dim),
    }
    return [(f"{first + i}.{n}", s) for i in range(num_layers) for n, s in layer.items()]


def deepseek_v3() -> Shapes:
    """61 layers of multi-head latent attention; three dense ones, 58 of 256 experts and one shared.

    Heads are not split: 128 heads of 128 + 64 (queries) and 128 + 128 (keys and values).
    """
    attention = {
        "q_a": (1536, 7168),
        "q_b": (24576, 1536),
        "kv_a": (576, 7168),
        "kv_b": (32768, 512),
        "o": (7168, 16384),
    }
    found = [(f"{i}.{n}", s) for i in range(61) for n, s in attention.items()]
    for first, count, hidden in ((0, 3, 18432), (3, 58, 2048)):
        for i in range(first, first + count):
            found += [
                (f"{i}.gate", (hidden, 7168)),
                (f"{i}.up", (hidden, 7168)),
                (f"{i}.down", (7168, hidden)),
            ]
    return found + experts(58, 256, 7168, 2048, first=3)


MODELS = {
    "1b": lambda: dense(16, 2048, 512, 8192),
    "7b": lambda: dense(32, 4096, 1024, 14336),
    "experts": lambda: experts(4, 128, 2048, 768),
    "tiny": lambda: dense(2, 64, 16, 128),
    "tiny-experts": lambda: experts(1, 8, 32, 16),
    "llama-3-8b": lambda: dense(32, 4096, 1024, 14336),
    "llama-3-70b": lambda: dense(80, 8192, 1024, 28672),
    "llama-3-405b": lambda: dense(126, 16384, 1024, 53248),
    "deepseek-v3": deepseek_v3,
}
"""Matrix parameters of each model; embeddings, head and norms are not among them."""


def num_elements(shapes: Shapes) -> int:
    return sum(prod(shape) for _, shape in shapes)
