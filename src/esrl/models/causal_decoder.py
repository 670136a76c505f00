"""Stage one for any causal model: Hugging Face's own code, a token at a time, over our cache and frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esrl.algorithm.log_probs import Projection
from esrl.models.causal_attention import CausalRows, CausalWaves, attending
from esrl.models.frozen import frozen_linear, twin
from esrl.models.linear import FrozenProjection
from esrl.models.policy import BatchSizes, PromptState


class FrozenCausalDecoder:
    """A causal model's layers as they are now, its linear layers laid out for products with few rows.

    Args:
        body: Hugging Face's model without its vocabulary projection; it is not changed.
        projection: of the vocabulary.
        max_length: positions of the model.
    """

    @torch.no_grad()
    def __init__(self, body: nn.Module, projection: Projection, max_length: int) -> None:
        self.body = twin(body, frozen_linear)
        self.projection = FrozenProjection(projection)
        self.batch_sizes: BatchSizes = "few" if self.projection.compiled is None else "any"
        self.max_length = max_length

    def start(self, state: PromptState, prompt_index: Tensor) -> CausalDecoder:
        return CausalDecoder(self, CausalRows(state, prompt_index, self.max_length))


class CausalDecoder:
    """Decodes rows with a key/value cache. It is itself the cache that the model's layers see."""

    def __init__(self, weights: FrozenCausalDecoder, first: CausalRows) -> None:
        self.weights = weights
        self.waves = CausalWaves(first)

    def join(self, state: PromptState, prompt_index: Tensor) -> None:
        self.waves.add(CausalRows(state, prompt_index, self.weights.max_length))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """(R,) last tokens -> (R, D) states for the next ones."""
        self.waves.reserve()
        with attending(self.weights.body.config, waves=self.waves):
            output = self.weights.body(
                input_ids=tokens[:, None],
                position_ids=self.waves.positions()[:, None],
                past_key_values=self,
                use_cache=True,
            )
        self.waves.advance()
        hidden: Tensor = output.last_hidden_state[:, 0]
        return hidden

    def keep(self, *rows: Sequence[int]) -> None:
        self.waves.keep(*rows)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The attention function keeps them, wave by wave."""
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return self.waves.waves[0].cache.position
