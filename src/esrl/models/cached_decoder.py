"""One token at a time for many rows: the decoder of stage one, without a graph.

What makes it fast: weights laid out for products with few rows; one product for query, key and value; a pre-allocated
cache in which a row that has ended is overwritten by the last one; the cross-attention state read once for all samples
of a prompt, never copied per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from esrl.algorithm.log_probs import Projection
from esrl.models.groups import PromptGroups
from esrl.models.linear import FrozenLinear, FrozenProjection
from esrl.models.policy import BatchSizes, PromptState
from esrl.models.row_cache import RowCache, Waves

FEW_QUERIES = 32
"""Up to so many queries of all prompts together, the fused kernel computes attention on CPUs."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A post-norm decoder layer's weights as stage one reads them."""

    heads: int
    project: FrozenLinear  # query, key and value at once
    mix: FrozenLinear
    norm: Callable[[Tensor], Tensor]
    cross_query: FrozenLinear
    cross_mix: FrozenLinear
    cross_norm: Callable[[Tensor], Tensor]
    inner: FrozenLinear
    activation: Callable[[Tensor], Tensor] | None  # None where `inner` applies it
    outer: FrozenLinear
    final_norm: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        own, cross = layer.self_attn, layer.encoder_attn
        relu = isinstance(layer.activation_fn, torch.nn.ReLU) or layer.activation_fn is functional.relu
        parts = (own.q_proj, own.k_proj, own.v_proj)
        weight = torch.cat([part.weight.detach() for part in parts])
        return cls(
            heads=own.num_heads,
            project=FrozenLinear(weight, torch.cat([part.bias.detach() for part in parts])),
            mix=_frozen(own.out_proj),
            norm=layer.self_attn_layer_norm,
            cross_query=_frozen(cross.q_proj),
            cross_mix=_frozen(cross.out_proj),
            cross_norm=layer.encoder_attn_layer_norm,
            inner=FrozenLinear(layer.fc1.weight, layer.fc1.bias, "relu" if relu else "none"),
            activation=None if relu else layer.activation_fn,
            outer=_frozen(layer.fc2),
            final_norm=layer.final_layer_norm,
        )

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """With the residual."""
        inner = self.inner(hidden)
        return self.outer(inner if self.activation is None else self.activation(inner), hidden)


class FrozenMarianDecoder:
    """A Marian decoder's weights as they are now, laid out for many small steps.

    Args:
        decoder: Hugging Face's decoder module (its weights are read, its forward is not used).
        projection: of the vocabulary.
    """

    @torch.no_grad()
    def __init__(self, decoder: Any, projection: Projection) -> None:
        self.embedding = decoder.embed_tokens.weight.detach()
        self.scale = decoder.embed_scale
        self.positions = decoder.embed_positions.weight.detach()
        self.layers = [_Layer.of(layer) for layer in decoder.layers]
        self.projection = FrozenProjection(projection)
        self.batch_sizes: BatchSizes = "few"

    def start(self, state: PromptState, prompt_index: Tensor) -> CachedDecoder:
        return CachedDecoder(self, SourceRows(state, prompt_index))


class SourceRows:
    """Rows that have begun together: what they have decoded (``cache``), and how they read their sources.

    Args:
        state: the shared prompt state.
        prompt_index: (R,) int64, each row's prompt.
    """

    def __init__(self, state: PromptState, prompt_index: Tensor) -> None:
        self.cache = RowCache(state, prompt_index)
        self._place()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.cache.keep(rows)
        self._place()

    def _place(self) -> None:
        mask = self.cache.state.mask
        self.groups = PromptGroups.of(self.cache.prompt_index, mask.shape[0])
        self.source_mask = None if bool(mask.all()) else mask[:, None, None, :]

    def self_attention(self, i: int, projected: Tensor) -> Tensor:
        """(R, 3, H, 1, d) queries, keys and values of layer i -> (R, D)."""
        query, key, value = projected.unbind(1)
        return attention(query, *self.cache.write(i, key, value)).reshape(len(projected), -1)

    def cross_attention(self, i: int, query: Tensor, heads: int) -> Tensor:
        """(R, D) -> (R, D)."""
        groups, state = self.groups, self.cache.state
        query = groups.spread(query)
        query = query.view(*query.shape[:2], heads, -1).transpose(1, 2)
        mixed = attention(query, state.keys[i], state.values[i], self.source_mask)
        return groups.collect(mixed.transpose(1, 2).flatten(2))


class CachedDecoder:
    """Decodes rows with a key/value cache.

    Args:
        weights: of the decoder.
        first: the rows to begin with.
    """

    def __init__(self, weights: FrozenMarianDecoder, first: SourceRows) -> None:
        self.weights = weights
        self.waves = Waves(first)

    def join(self, state: PromptState, prompt_index: Tensor) -> None:
        """Let more rows begin, behind those that are there."""
        self.waves.add(SourceRows(state, prompt_index))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """(R,) last tokens -> (R, D) states for the next ones."""
        weights, each = self.weights, self.waves.each
        self.waves.reserve()
        hidden = functional.embedding(tokens, weights.embedding) * weights.scale
        hidden = each(lambda wave, part: part + weights.positions[wave.cache.position], hidden)
        for i, layer in enumerate(weights.layers):
            projected = layer.project(hidden).view(len(hidden), 3, layer.heads, 1, -1)
            mixed = each(lambda wave, part, i=i: wave.self_attention(i, part), projected)
            hidden = layer.norm(layer.mix(mixed, hidden))
            query = layer.cross_query(hidden)
            mixed = each(lambda wave, part, i=i, layer=layer: wave.cross_attention(i, part, layer.heads), query)
            hidden = layer.cross_norm(layer.cross_mix(mixed, hidden))
            hidden = layer.final_norm(layer.feed_forward(hidden))
        self.waves.advance()
        return hidden

    def keep(self, *rows: Sequence[int]) -> None:
        """Go on with these rows of each wave, in this order."""
        self.waves.keep(*rows)


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: (B, H, Q, d), (B, H, S, d) twice -> (B, H, Q, d).

    On CPUs, PyTorch's fused kernel is slower than two batched products, but one operation instead of six: it pays
    where there is little to compute (docs/performance.md).

    Args:
        mask: broadcasts to (B, H, Q, S); True where attention may look.
    """
    batch, heads, queries, width = query.shape
    if query.is_cuda or batch * queries <= FEW_QUERIES:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    # in three dimensions: `matmul` would look for a way to broadcast, at each of many small steps
    flat = (batch * heads, -1, width)
    scores = torch.bmm(query.reshape(flat).mul(width**-0.5), _flat(keys).transpose(1, 2))
    if mask is not None:
        scores.view(batch, heads, queries, -1).masked_fill_(~mask, -torch.inf)
    return torch.bmm(torch.softmax(scores, 2), _flat(values)).view(query.shape)


def _flat(cache: Tensor) -> Tensor:
    """(B, H, S, d) -> (B * H, S, d), a view: S may be cut from a longer cache."""
    batch, heads, length, width = cache.shape
    row = cache.stride(1)
    return cache.as_strided((batch * heads, length, width), (row, cache.stride(2), 1))


def _frozen(linear: Any) -> FrozenLinear:
    return FrozenLinear(linear.weight, linear.bias)
