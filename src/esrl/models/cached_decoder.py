"""One token at a time for many rows: the decoder of stage one, without a graph.

What makes it fast: weights laid out for products with few rows; one product for query, key and value; a pre-allocated
cache in which a row that has ended is overwritten by the last one; the cross-attention state read once for all samples
of a prompt, never copied per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from esrl.algorithm.log_probs import Projection
from esrl.models.groups import PromptGroups
from esrl.models.linear import FrozenLinear, FrozenProjection
from esrl.models.policy import PromptState

_FIRST_CAPACITY = 8
# prompts whose samples have all ended leave the shared state once they are a quarter of it
_KEEP_PROMPTS = 0.75


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

    def start(self, state: PromptState, prompt_index: Tensor) -> CachedDecoder:
        return CachedDecoder(self, state, prompt_index)


class CachedDecoder:
    """Decodes rows with a key/value cache.

    Args:
        weights: of the decoder.
        state: the shared prompt state.
        prompt_index: (R,) int64, each row's prompt.
    """

    def __init__(self, weights: FrozenMarianDecoder, state: PromptState, prompt_index: Tensor) -> None:
        self.device = state.mask.device
        self.weights = weights
        self.state = state
        self.position = 0
        self.rows = len(prompt_index)
        heads, width = weights.layers[0].heads, weights.embedding.shape[1]
        shape = (self.rows, heads, _FIRST_CAPACITY, width // heads)
        options = {"dtype": weights.embedding.dtype, "device": self.device}
        self.keys = [torch.empty(shape, **options) for _ in weights.layers]
        self.values = [torch.empty(shape, **options) for _ in weights.layers]
        self._place(prompt_index.to(self.device))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """(R,) last tokens -> (R, D) states for the next ones."""
        weights = self.weights
        self._reserve()
        hidden = functional.embedding(tokens, weights.embedding) * weights.scale
        hidden += weights.positions[self.position]
        for i, layer in enumerate(weights.layers):
            hidden = layer.norm(layer.mix(self._self_attention(i, hidden), hidden))
            hidden = layer.cross_norm(layer.cross_mix(self._cross_attention(i, hidden), hidden))
            hidden = layer.final_norm(layer.feed_forward(hidden))
        self.position += 1
        return hidden

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; most of them should be where they were.

        Only rows that change place are copied. The room of the others is given back when the cache next grows.
        """
        moved = (rows != torch.arange(len(rows), device=self.device)).nonzero()[:, 0]
        source, used = rows[moved], self.position
        for cache in (*self.keys, *self.values):
            cache[moved, :, :used] = cache[source, :, :used]
        self.rows = len(rows)
        prompt_index = self.prompt_index[rows]
        alive, local = torch.unique(prompt_index, return_inverse=True)
        if len(alive) == len(rows):  # a row each: in the rows' order, nothing is to be gathered at every step
            self.state, prompt_index = self.state.select(prompt_index), torch.arange(len(rows), device=self.device)
        elif len(alive) < _KEEP_PROMPTS * self.state.mask.shape[0]:
            self.state, prompt_index = self.state.select(alive), local
        self._place(prompt_index)

    def _place(self, prompt_index: Tensor) -> None:
        self.prompt_index = prompt_index
        self.groups = PromptGroups.of(prompt_index, self.state.mask.shape[0])
        mask = self.state.mask
        self.source_mask = None if bool(mask.all()) else mask[:, None, None, :]

    def _reserve(self) -> None:
        """Double the cache where it is full; rows that have ended are left behind."""
        capacity = self.keys[0].shape[2]
        if self.position < capacity:
            return
        for caches in (self.keys, self.values):
            for i, old in enumerate(caches):
                new = old.new_empty(self.rows, old.shape[1], 2 * capacity, old.shape[3])
                new[:, :, :capacity] = old[: self.rows]
                caches[i] = new

    def _self_attention(self, i: int, hidden: Tensor) -> Tensor:
        layer, end = self.weights.layers[i], self.position + 1
        query, key, value = layer.project(hidden).view(self.rows, 3, layer.heads, 1, -1).unbind(1)
        keys, values = self.keys[i][: self.rows, :, :end], self.values[i][: self.rows, :, :end]
        keys[:, :, -1:] = key
        values[:, :, -1:] = value
        return attention(query, keys, values).reshape(self.rows, -1)

    def _cross_attention(self, i: int, hidden: Tensor) -> Tensor:
        layer, groups = self.weights.layers[i], self.groups
        query = groups.spread(layer.cross_query(hidden))
        query = query.view(*query.shape[:2], layer.heads, -1).transpose(1, 2)
        mixed = attention(query, self.state.keys[i], self.state.values[i], self.source_mask)
        return groups.collect(mixed.transpose(1, 2).flatten(2))


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: (B, H, Q, d), (B, H, S, d) twice -> (B, H, Q, d).

    On CPUs, PyTorch's fused kernel is slower than two batched products while there are few queries
    (docs/performance.md).

    Args:
        mask: broadcasts to (B, H, Q, S); True where attention may look.
    """
    if query.is_cuda:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    # in three dimensions: `matmul` would look for a way to broadcast, at each of many small steps
    batch, heads, queries, width = query.shape
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
