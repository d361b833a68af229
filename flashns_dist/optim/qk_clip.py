"""QK-clip, the second half of MuonClip: keeps attention logits below a threshold.

Kimi K2 (arXiv 2507.20534, section 2.1). After an optimizer step, every head whose largest logit in
that step's forward pass exceeded the threshold gets its query and key weights scaled down, so that
the same logit would have been the threshold. Other heads keep their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from flashns_dist.exchange import agree_on_largest
from flashns_dist.layout import QKV
from flashns_dist.optim.binding import BoundParameter, bind_parameter

Weight: TypeAlias = "Tensor | BoundParameter"

QUERY, KEY, ROTARY_QUERY = "query", "key", "rotary query"


@dataclass(frozen=True)
class Rows:
    """Rows ``[start, start + size)`` of a weight or bias that make one head's queries or keys."""

    weight: int
    start: int
    size: int
    kind: str
    head: int


@dataclass(frozen=True, eq=False)
class Attention:
    """The query and key weights of one attention layer, by head.

    Attributes:
        name: For errors.
        weights: Weights ``(out, in)`` and biases ``(out,)``: plain tensors, DTensors, or what an
            adapter has bound.
        rows: Which of their rows belong to which head. Those of kind ``"key"`` count key heads.
        num_heads: Query heads.
        num_kv_heads: Key heads; each serves ``num_heads / num_kv_heads`` query heads in a row.

    Raises:
        ValueError: ``num_heads`` is not a multiple of ``num_kv_heads``.
    """

    name: str
    weights: tuple[Weight, ...]
    rows: tuple[Rows, ...]
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}, as grouped queries need"
            )

    @staticmethod
    def separate(
        query: Weight,
        key: Weight,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        biases: tuple[Weight, Weight] | None = None,
        name: str = "attention",
    ) -> Attention:
        """Projections of their own for queries and keys, heads one after the other.

        Raises:
            ValueError: A weight's rows are not so many heads of one width.
        """
        kv_heads = num_kv_heads or num_heads
        rows = []
        for offset in range(0, 4 if biases else 2, 2):
            for number, kind, count in ((0, QUERY, num_heads), (1, KEY, kv_heads)):
                size = _head_size(name, (query, key)[number], count)
                rows += [Rows(offset + number, h * size, size, kind, h) for h in range(count)]
        return Attention(name, (query, key, *(biases or ())), tuple(rows), num_heads, kv_heads)

    @staticmethod
    def fused(
        qkv: Weight, view: QKV, *, bias: Weight | None = None, name: str = "attention"
    ) -> Attention:
        """One weight for queries, keys and values, ordered as ``view`` says.

        Raises:
            ValueError: The view does not fit the weight.
            NotImplementedError: The view has ``dim=1``.
        """
        heads, kv_heads = view.num_heads, view.num_kv_heads or view.num_heads
        if view.dim != 0:
            raise NotImplementedError(f"{name}: QK-clip needs the heads in rows, not in columns")
        view(tuple(_shape(qkv)))  # checks that it fits
        size, shared = _head_size(name, qkv, heads + 2 * kv_heads), heads // kv_heads
        starts = {}
        for h in range(heads):
            group = h // shared
            starts[QUERY, h] = h if view.order == "stacked" else h + 2 * group
        for h in range(kv_heads):
            starts[KEY, h] = heads + h if view.order == "stacked" else (h + 1) * shared + 2 * h
        weights = (qkv,) if bias is None else (qkv, bias)
        rows = tuple(
            Rows(number, start * size, size, kind, h)
            for number in range(len(weights))
            for (kind, h), start in starts.items()
        )
        return Attention(name, weights, rows, heads, kv_heads)

    @staticmethod
    def latent(
        query_up: Weight,
        key_value_up: Weight,
        num_heads: int,
        *,
        nope: int,
        rope: int,
        name: str = "attention",
    ) -> Attention:
        """Multi-head latent attention: up-projections of DeepSeek and Kimi.

        Args:
            query_up: ``(num_heads * (nope + rope), rank)``: each head's rows without rotation, then
                the rotary ones.
            key_value_up: ``(num_heads * (nope + v), rank)``: each head's key, then its value.
            num_heads: Heads.
            nope: Width of a head's part without rotation.
            rope: Width of the rotary part, whose key all heads share. That key stays as it is; the
                rotary queries take the whole factor.
            name: For errors.

        Raises:
            ValueError: The rows are not heads of these widths.
        """
        query = _head_size(name, query_up, num_heads)
        key_value = _head_size(name, key_value_up, num_heads)
        if query != nope + rope or key_value <= nope:
            raise ValueError(
                f"{name}: {num_heads} heads have {query} query rows and {key_value} key and value "
                f"rows each, which are not nope={nope} + rope={rope} and more than nope"
            )
        rows = []
        for h in range(num_heads):
            rows.append(Rows(0, h * query, nope, QUERY, h))
            rows.append(Rows(0, h * query + nope, rope, ROTARY_QUERY, h))
            rows.append(Rows(1, h * key_value, nope, KEY, h))
        return Attention(name, (query_up, key_value_up), tuple(rows), num_heads, num_heads)


class QKClip:
    """QK-clip (arXiv 2507.20534): call it with the largest logits after each ``optimizer.step()``.

    A head ``h`` with largest logit ``s`` above ``threshold`` has its logits scaled by
    ``g = threshold / s``: its queries by ``g^alpha``, its keys by ``g^(1 - alpha)``. Query heads
    that share a key head (grouped queries) may need different factors, and one of them none at all:
    the key takes ``max(g)^(1 - alpha)`` of its query heads, and each query head what its own ``g``
    still lacks. So every head's logits are scaled by its ``g`` exactly, and weights that only heads
    below the threshold use do not change. In MLA the shared rotary key does not change either.

    Of no use where queries or keys are normalized after their projection: such logits are bounded,
    and do not see the weights' size.

    Args:
        attentions: The layers, in the same order on every rank. Construct it on every rank.
        threshold: Largest logit allowed (Kimi K2: 100).
        alpha: Share of the queries in the scaling, in logarithm.
        group: Ranks that see different data or heads; the logits' maximum is over all of them.

    Raises:
        ValueError: An argument is out of range, or rows lie outside of their weight.
    """

    def __init__(
        self,
        attentions: Sequence[Attention],
        *,
        threshold: float = 100.0,
        alpha: float = 0.5,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold={threshold} must be positive")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be between 0 and 1")
        self._attentions = tuple(attentions)
        self._threshold = float(threshold)
        self._alpha = float(alpha)
        self._group = group
        self._bound = [[_bind(a.name, weight) for weight in a.weights] for a in self._attentions]
        for attention, bound in zip(self._attentions, self._bound, strict=True):
            for rows in attention.rows:
                length = bound[rows.weight].layout.shape[0]
                if rows.start + rows.size > length:
                    raise ValueError(
                        f"{attention.name}: weight {rows.weight} has {length} rows, but the "
                        f"{rows.kind} of head {rows.head} ends at {rows.start + rows.size}; "
                        "correct the heads"
                    )

    @torch.no_grad()
    def __call__(self, max_logits: Sequence[Tensor]) -> list[Tensor]:
        """Scale the heads whose logits were too large.

        Collectives: one ``all_reduce`` on ``group``. Waits for the device once.

        Args:
            max_logits: For each layer, ``(num_heads,)``: the largest logit, as softmax sees it, of
                each head on this rank; minus infinity for heads that it does not compute.

        Returns:
            For each layer, the factor on each head's logits, ``(num_heads,)``, 1 for most.

        Raises:
            ValueError: The logits' shapes are wrong on some rank, or one is NaN or infinite there;
                on all ranks, and no weight has changed.
        """
        largest = self._largest(max_logits)
        factors = [(self._threshold / s).clamp(max=1.0) for s in largest]
        factors = [
            torch.where(s > self._threshold, f, torch.ones_like(f))
            for s, f in zip(largest, factors, strict=True)
        ]
        for attention, bound, factor in zip(self._attentions, self._bound, factors, strict=True):
            if (factor < 1).any():
                self._scale(attention, bound, factor)
        return factors

    def _largest(self, max_logits: Sequence[Tensor]) -> list[Tensor]:
        """The logits' maxima over the group, float64 on the CPU."""
        sizes = [attention.num_heads for attention in self._attentions]
        shapes = [tuple(logits.shape) for logits in max_logits]
        fits = shapes == [(size,) for size in sizes]
        if sizes:
            sent = self._sent(max_logits, sum(sizes), fits=fits)
            agreed = agree_on_largest(sent, self._group)
        if not fits:
            raise ValueError(
                f"max_logits has shapes {shapes}; give one tensor per layer, of shapes "
                f"{[(size,) for size in sizes]}"
            )
        if not sizes:
            return []
        if agreed[-1] > 0:
            raise ValueError(
                "max_logits has shapes that do not fit the layers on another rank: see its error"
            )
        found = list(agreed[:-1].split(sizes))
        for attention, values in zip(self._attentions, found, strict=True):
            if values.isposinf().any():
                raise ValueError(
                    f"{attention.name}: the largest logit of heads "
                    f"{values.isposinf().nonzero().flatten().tolist()} is NaN or infinite on some "
                    "rank; skip QK-clip in steps that overflow"
                )
        return found

    def _sent(self, max_logits: Sequence[Tensor], count: int, *, fits: bool) -> Tensor:
        """The logits and minus infinity; ``count + 1`` infinities if they do not fit the layers."""
        infinity = float("inf")
        if not fits:
            first = self._bound[0][0]
            device = first.local(first.storage).device
            return torch.full((count + 1,), infinity, dtype=torch.float64, device=device)
        logits = torch.cat([logits.detach().double() for logits in max_logits])
        end = logits.new_full((1,), -infinity)
        return torch.cat([logits, end]).nan_to_num(infinity, neginf=-infinity)

    def _scale(self, attention: Attention, bound: Sequence[BoundParameter], factor: Tensor) -> None:
        """Multiply the rows of one layer's heads, where they lie."""
        shared = attention.num_heads // attention.num_kv_heads
        keys = factor.view(-1, shared).amax(1) ** (1 - self._alpha)
        queries = factor / keys.repeat_interleave(shared)
        by_kind = {QUERY: queries, KEY: keys, ROTARY_QUERY: factor}
        for number, weight in enumerate(bound):
            scales = torch.ones(weight.layout.shape[0], dtype=torch.float64, device="cpu")
            for rows in attention.rows:
                if rows.weight == number:
                    scales[rows.start : rows.start + rows.size] = by_kind[rows.kind][rows.head]
            _scale_rows(weight, scales)


def _scale_rows(bound: BoundParameter, scales: Tensor) -> None:
    """``w[i] *= scales[i]`` on this rank's part; rows with the scale 1 keep their bits."""
    local = bound.local(bound.storage)
    for fragment in bound.layout.fragments[bound.group_rank]:
        start, size = fragment.box.start[0], fragment.box.size[0]
        scale = scales[start : start + size]
        if (scale == 1).all():
            continue
        part = fragment.view(local)
        dtype = torch.promote_types(part.dtype, torch.float32)
        scale = scale.to(part.device, dtype).view(-1, *(1 for _ in fragment.box.size[1:]))
        part.copy_(part.to(dtype) * scale)


def largest_logits(
    query: Tensor,  # (batch, heads, seq, head_dim)
    key: Tensor,  # (batch, kv_heads, seq, head_dim)
    *,
    scale: float | None = None,
    causal: bool = True,
    chunk: int = 512,
) -> Tensor:
    """Each head's largest attention logit, fp32 ``(heads,)``, for attention that keeps none.

    Costs the product of queries and keys once more, ``chunk`` queries at a time. Without gradients.

    Args:
        query: ``(batch, heads, seq, head_dim)``, after rotary embedding; any float dtype.
        key: ``(batch, kv_heads, seq, head_dim)``, likewise; ``kv_heads`` divides ``heads``.
        scale: Of the logits (None: ``head_dim ** -0.5``).
        causal: Leave out keys after a query.
        chunk: Queries at once; ``batch * heads * chunk * seq`` logits are in memory.
    """
    with torch.no_grad():
        heads, length = query.shape[1], query.shape[2]
        shared = heads // key.shape[1]
        if shared > 1:
            key = key.repeat_interleave(shared, dim=1)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        largest = torch.full((heads,), -float("inf"), device=query.device)
        for begin in range(0, length, chunk):
            part = query[:, :, begin : begin + chunk]
            seen = key[:, :, : begin + part.shape[2]] if causal else key
            logits = (part @ seen.mT).float() * factor
            if causal:
                hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device)
                logits = logits.masked_fill(hidden.triu(begin + 1), -float("inf"))
            largest = torch.maximum(largest, logits.amax((0, 2, 3)))
        return largest


def _bind(name: str, weight: Weight) -> BoundParameter:
    return weight if isinstance(weight, BoundParameter) else bind_parameter(name, weight, 0, None)


def _shape(weight: Weight) -> Sequence[int]:
    return weight.layout.shape if isinstance(weight, BoundParameter) else weight.shape


def _head_size(name: str, weight: Weight, count: int) -> int:
    rows = int(_shape(weight)[0])
    if count < 1 or rows % count:
        raise ValueError(
            f"{name}: {rows} rows are not {count} heads of one width; correct the number of heads"
        )
    return rows // count


__all__ = ["Attention", "QKClip", "largest_logits"]
