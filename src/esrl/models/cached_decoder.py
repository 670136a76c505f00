"""One token at a time for many rows: the decoder of stage one, without a graph.

What makes it fast: one matrix product for query, key and value; a pre-allocated cache that grows by doubling; the
cross-attention state read once for all samples of a prompt, never copied per sample; finished rows dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from esrl.models.policy import PromptState

_FIRST_CAPACITY = 16
# prompts whose samples have all ended leave the shared state once they are a quarter of it
_KEEP_PROMPTS = 0.75


class CachedDecoder:
    """Decodes rows of a post-norm Transformer decoder with a key/value cache.

    Args:
        decoder: Hugging Face's decoder module (its weights are read, its forward is not used).
        state: the shared prompt state.
        prompt_index: (R,) int64, never falling.
    """

    def __init__(self, decoder: Any, state: PromptState, prompt_index: Tensor) -> None:
        self.device = state.mask.device
        self.decoder = decoder
        self.state = state
        self.layers = list(decoder.layers)
        self.heads = self.layers[0].self_attn.num_heads
        self.fused = [_fused_projection(layer.self_attn) for layer in self.layers]
        self.position = 0
        width = decoder.embed_tokens.weight.shape[1]
        shape = (len(prompt_index), self.heads, _FIRST_CAPACITY, width // self.heads)
        options = {"dtype": decoder.embed_tokens.weight.dtype, "device": self.device}
        self.keys = [torch.empty(shape, **options) for _ in self.layers]
        self.values = [torch.empty(shape, **options) for _ in self.layers]
        self._place(prompt_index.to(self.device))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """(R,) last tokens -> (R, D) states for the next ones."""
        decoder = self.decoder
        self._reserve()
        hidden = functional.embedding(tokens, decoder.embed_tokens.weight) * decoder.embed_scale
        hidden += decoder.embed_positions.weight[self.position]
        for i, layer in enumerate(self.layers):
            hidden = layer.self_attn_layer_norm(hidden + layer.self_attn.out_proj(self._self_attention(i, hidden)))
            query = layer.encoder_attn.q_proj(hidden)
            hidden = layer.encoder_attn_layer_norm(
                hidden + layer.encoder_attn.out_proj(self._cross_attention(i, query))
            )
            hidden = layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))
        self.position += 1
        return hidden

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (rising)."""
        used = self.position
        for cache in (self.keys, self.values):
            for i, old in enumerate(cache):
                new = old.new_empty(len(rows), *old.shape[1:])
                new[:, :, :used] = old[:, :, :used].index_select(0, rows)
                cache[i] = new
        prompt_index = self.prompt_index[rows]
        alive = torch.unique_consecutive(prompt_index)
        if len(alive) < _KEEP_PROMPTS * self.state.mask.shape[0]:
            self.state = self.state.select(alive)
            prompt_index = torch.searchsorted(alive, prompt_index)
        self._place(prompt_index)

    def _place(self, prompt_index: Tensor) -> None:
        """Lay the rows out as (prompt, rank within the prompt), so that attention reads each prompt's state once."""
        self.prompt_index = prompt_index
        num_prompts = self.state.mask.shape[0]
        counts = torch.bincount(prompt_index, minlength=num_prompts)
        first = torch.cumsum(counts, 0) - counts
        rank = torch.arange(len(prompt_index), device=self.device) - first[prompt_index]
        self.ranks = max(1, int(counts.max())) if len(prompt_index) else 1
        full = len(prompt_index) == num_prompts * self.ranks
        self.slots = None if full else prompt_index * self.ranks + rank
        mask = self.state.mask
        self.source_mask = None if bool(mask.all()) else mask[:, None, None, :]

    def _reserve(self) -> None:
        capacity = self.keys[0].shape[2]
        if self.position < capacity:
            return
        for cache in (self.keys, self.values):
            for i, old in enumerate(cache):
                new = old.new_empty(old.shape[0], old.shape[1], 2 * capacity, old.shape[3])
                new[:, :, :capacity] = old
                cache[i] = new

    def _self_attention(self, i: int, hidden: Tensor) -> Tensor:
        weight, bias = self.fused[i]
        rows = hidden.shape[0]
        query, key, value = functional.linear(hidden, weight, bias).view(rows, 3, self.heads, 1, -1).unbind(1)
        keys, values = self.keys[i], self.values[i]
        end = self.position + 1
        keys[:, :, self.position : end] = key
        values[:, :, self.position : end] = value
        mixed = functional.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end])
        return mixed.view(rows, -1)

    def _cross_attention(self, i: int, query: Tensor) -> Tensor:
        num_prompts, width = self.state.mask.shape[0], query.shape[1]
        if self.slots is not None:
            padded = query.new_zeros(num_prompts * self.ranks, width)
            query = padded.index_copy_(0, self.slots, query)
        query = query.view(num_prompts, self.ranks, self.heads, -1).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            query, self.state.keys[i], self.state.values[i], attn_mask=self.source_mask
        )
        mixed = mixed.transpose(1, 2).reshape(num_prompts * self.ranks, width)
        return mixed if self.slots is None else mixed.index_select(0, self.slots)


def _fused_projection(attention: Any) -> tuple[Tensor, Tensor]:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([projection.weight.detach() for projection in projections])
    return weight, torch.cat([projection.bias.detach() for projection in projections])
