"""Stage one for models of Llama's layout, written out: fewer and larger products than Hugging Face's code has.

RMSNorm before attention and before a gated feed-forward layer, rotary positions, grouped heads, norms on queries and
keys or none. The generic decoder (``causal_decoder``) is its slow twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from esrl.algorithm.log_probs import Projection
from esrl.models.causal_attention import CausalRows, CausalWaves
from esrl.models.frozen import linear_bias, linear_weight
from esrl.models.linear import FrozenLinear, FrozenProjection
from esrl.models.policy import BatchSizes, PromptState

LAYOUT = ("llama", "mistral", "qwen2", "qwen3")

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's weights as stage one reads them."""

    key_heads: int
    head_width: int
    scale: float
    window: int | None
    project: FrozenLinear  # query, key and value at once
    query_norm: Norm | None
    key_norm: Norm | None
    mix: FrozenLinear
    norm: Norm
    gate: FrozenLinear  # gate and up at once
    down: FrozenLinear
    feed_forward_norm: Norm

    @classmethod
    def of(cls, layer: Any, config: Any) -> _Layer:
        own, inner = layer.self_attn, layer.mlp
        query_norm, key_norm = (getattr(own, name, None) for name in ("q_norm", "k_norm"))
        return cls(
            key_heads=config.num_key_value_heads,
            head_width=own.head_dim,
            scale=own.scaling,
            window=config.sliding_window if config.model_type == "mistral" else getattr(own, "sliding_window", None),
            project=_joined(own.q_proj, own.k_proj, own.v_proj),
            query_norm=None if query_norm is None else _norm(query_norm),
            key_norm=None if key_norm is None else _norm(key_norm),
            mix=_joined(own.o_proj),
            norm=_norm(layer.input_layernorm),
            gate=_joined(inner.gate_proj, inner.up_proj),
            down=_joined(inner.down_proj),
            feed_forward_norm=_norm(layer.post_attention_layernorm),
        )


class FrozenLlamaDecoder:
    """The weights as they are now, LoRA's added, laid out for many small steps.

    Args:
        body: Hugging Face's model without its vocabulary projection, of which ``fits`` holds.
        projection: of the vocabulary.
        max_length: positions of the model.
    """

    @torch.no_grad()
    def __init__(self, body: Any, projection: Projection, max_length: int) -> None:
        self.embed = body.embed_tokens
        self.rotary = body.rotary_emb
        self.layers = [_Layer.of(layer, body.config) for layer in body.layers]
        self.norm = _norm(body.norm)
        self.projection = FrozenProjection(projection)
        self.batch_sizes: BatchSizes = "few" if self.projection.compiled is None else "any"
        self.max_length = max_length

    def start(self, state: PromptState, prompt_index: Tensor) -> LlamaDecoder:
        return LlamaDecoder(self, CausalRows(state, prompt_index, self.max_length))


def fits(body: Any) -> bool:
    """Whether the model has this layout, with weights that are plain sums (no quantization, no DoRA)."""
    if body.config.model_type not in LAYOUT or body.config.hidden_act not in ("silu", "swish"):
        return False
    return all(
        linear_weight(part) is not None
        for layer in body.layers
        for block in (layer.self_attn, layer.mlp)
        for name, part in block.named_children()
        if name.endswith("_proj")
    )


class LlamaDecoder:
    """Decodes rows with a key/value cache."""

    def __init__(self, weights: FrozenLlamaDecoder, first: CausalRows) -> None:
        self.weights = weights
        self.waves = CausalWaves(first)

    def join(self, state: PromptState, prompt_index: Tensor) -> None:
        self.waves.add(CausalRows(state, prompt_index, self.weights.max_length))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """(R,) last tokens -> (R, D) states for the next ones."""
        weights, waves = self.weights, self.waves
        waves.reserve()
        hidden: Tensor = weights.embed(tokens)
        cos, sin = (part[:, None, 0] for part in weights.rotary(hidden, waves.positions()[:, None]))  # (R, 1, d)
        # rotate_half as a roll: the first half of the sines changes sign
        sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)
        for i, layer in enumerate(weights.layers):
            mixed = self._attention(i, layer, layer.project(layer.norm(hidden)), cos, sin)
            hidden = layer.mix(mixed, hidden)
            gate, up = layer.gate(layer.feed_forward_norm(hidden)).chunk(2, 1)
            hidden = layer.down(functional.silu(gate).mul_(up), hidden)
        waves.advance()
        return weights.norm(hidden)

    def keep(self, *rows: Sequence[int]) -> None:
        self.waves.keep(*rows)

    def _attention(self, i: int, layer: _Layer, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(R, heads + 2 key heads, d) as one row each -> (R, D)."""
        rows = projected.shape[0]
        heads = projected.view(rows, -1, layer.head_width)
        turning, value = heads[:, : -layer.key_heads], heads[:, -layer.key_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = turning[:, : -layer.key_heads], turning[:, -layer.key_heads :]
            turning = torch.cat([layer.query_norm(query), layer.key_norm(key)], 1)
        turned = (turning * cos).addcmul_(turning.roll(layer.head_width // 2, -1), sin)
        query, key = turned[:, : -layer.key_heads, None], turned[:, -layer.key_heads :, None]
        settings = (layer.scale, layer.window, None)
        mixed = self.waves.attend(i, settings, query, key, value[:, :, None])
        return mixed.reshape(rows, -1)


def _joined(*linears: Any) -> FrozenLinear:
    """Several linear layers with the same input as one."""
    weights, biases = [], []
    for linear in linears:
        weight, bias = linear_weight(linear), linear_bias(linear)
        assert weight is not None
        weights.append(weight)
        biases.append(bias)
    given = [bias for bias in biases if bias is not None]
    if not given:
        return FrozenLinear(torch.cat(weights), None)
    filled = [weight.new_zeros(len(weight)) if b is None else b for weight, b in zip(weights, biases, strict=True)]
    return FrozenLinear(torch.cat(weights), torch.cat(filled))


def _norm(module: Any) -> Norm:
    """RMSNorm in one call where that is the same: Hugging Face's goes through float32."""
    weight = module.weight.detach()
    if weight.dtype != torch.float32:
        norm: Norm = module
        return norm
    return lambda hidden: functional.rms_norm(hidden, weight.shape, weight, module.variance_epsilon)
