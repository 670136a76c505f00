"""Causal models whose prompts cannot be shared: Hugging Face's model over whole sequences, in both stages.

Recurrent layers keep a state instead of keys and values, and attention may know more than these (sinks). What such a
model gives for a sequence is what it gives for it anywhere else: nothing of it is replaced. So nothing is saved either.
Stage one runs a row anew for each of its tokens, and stage two runs a prompt for each of its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esrl.models.causal import CausalPolicy
from esrl.models.causal_support import CannotShareError, fault_of, longest_sequence, refused
from esrl.models.linear import FrozenProjection
from esrl.models.policy import BatchSizes, FrozenDecoder, PromptState, behind_each_other
from esrl.models.precision import in_precision
from esrl.types import Prompts

_STEP_TOKENS = 1 << 13
"""Tokens that stage one runs at a time, padding included."""


class PlainCausalPolicy(CausalPolicy):
    """A causal model that runs each row's prompt and answer together, padded on the right.

    A prompt's state is its tokens; none of it has a gradient, and stage two goes back through prompt and answer of each
    micro-batch at once. ``gradient.micro_batch_tokens`` counts the answers alone, so prompts come on top.

    Args:
        why: what keeps the model from sharing its prompts; a user is told.

    Raises:
        ValueError: a model whose states in such a batch are not those of each row alone (one that looks ahead, or that
            mixes the rows of a batch), by name.
    """

    def __init__(self, model: Any, tokenizer: Any, why: CannotShareError | None = None) -> None:
        super().__init__(model, tokenizer)
        if why is not None:
            self.notice = (
                f"{why.reason}. Each sample runs its prompt and answer as a whole instead, anew for every token drawn: "
                "correct, but slower."
            )

    def encode(self, prompts: Prompts) -> PromptState:
        """Each prompt's tokens but the last, as (P, 1, S, 1) numbers, which floats hold exactly up to 2^24."""
        tokens, there = self._but_last(prompts)
        kept = tokens[:, None, :, None].to(torch.promote_types(self._dtype, torch.float32))
        return PromptState((kept,), (kept,), there)  # a state has as many values as keys

    def frozen_decoder(self) -> FrozenDecoder:
        return FrozenPlainDecoder(self)

    @in_precision
    def hidden_states(self, state: PromptState, prompt_index: Tensor, inputs: Tensor) -> Tensor:
        before, lengths = _prompts_of(state, prompt_index.to(self.device))
        count = inputs.shape[1]
        # what lies behind the last position is another row's length: samples end in time (``room``)
        width = min(int(lengths.max()) + count, self.max_length)
        place = torch.arange(width, device=self.device).expand(len(inputs), -1)
        own = place - lengths[:, None]
        tokens = torch.where(
            own < 0,
            before.gather(1, place.clamp_max(before.shape[1] - 1)),
            inputs.gather(1, own.clamp(0, count - 1)),
        )
        states = self.states(tokens)
        wanted = (lengths[:, None] + torch.arange(count, device=self.device)).clamp_max(width - 1)
        return states.gather(1, wanted[:, :, None].expand(-1, -1, states.shape[2]))

    def states(self, tokens: Tensor) -> Tensor:
        """(R, N) whole sequences, with anything behind their ends -> (R, N, D)."""
        hidden: Tensor = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden.to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.plain.lm_head.weight.dtype
        return dtype

    def _positions(self) -> int:
        return longest_sequence(self.plain.config)

    def _compare(self) -> None:
        if (fault := fault_of(self)) is not None:
            raise refused(self.plain.config, fault)


class FrozenPlainDecoder:
    """The model as it is. Its layers see whole sequences, for which the plain layout of weights is good enough."""

    def __init__(self, policy: PlainCausalPolicy) -> None:
        self.policy = policy
        self.projection = FrozenProjection(policy.projection())
        self.batch_sizes: BatchSizes = "few"

    def start(self, state: PromptState, prompt_index: Tensor) -> PlainDecoder:
        decoder = PlainDecoder(self.policy)
        decoder.join(state, prompt_index)
        return decoder


class PlainDecoder:
    """Rows with all their tokens so far, run as a whole at each step."""

    def __init__(self, policy: PlainCausalPolicy) -> None:
        self.policy = policy
        self.sizes: list[int] = []  # rows of each wave
        self.tokens = torch.zeros(0, 0, dtype=torch.int64, device=policy.device)  # (R, N)
        self.lengths = self.tokens.new_zeros(0)  # (R,) tokens that each row has

    def join(self, state: PromptState, prompt_index: Tensor) -> None:
        tokens, lengths = _prompts_of(state, prompt_index.to(self.policy.device))
        width = max(self.tokens.shape[1], tokens.shape[1])
        self.tokens = torch.cat([_widened(self.tokens, width), _widened(tokens, width)])
        self.lengths = torch.cat([self.lengths, lengths])
        self.sizes.append(len(tokens))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """(R,) last tokens -> (R, D) states for the next ones."""
        place = self.lengths.clamp_max(self.policy.max_length - 1)  # rows that have ended go on
        width = int(place.max()) + 1
        if width > self.tokens.shape[1]:
            self.tokens = _widened(self.tokens, width + width // 2)
        rows = torch.arange(len(tokens), device=place.device)
        self.tokens[rows, place] = tokens
        self.lengths = self.lengths + 1
        return torch.cat([self._last_states(part, place) for part in rows.split(max(1, _STEP_TOKENS // width))])

    def keep(self, *rows: Sequence[int]) -> None:
        """Go on with these rows of each wave, in this order; a wave without any is gone."""
        left = torch.tensor(behind_each_other(rows, self.sizes), dtype=torch.int64, device=self.lengths.device)
        self.tokens, self.lengths = self.tokens[left], self.lengths[left]
        self.sizes = [len(own) for own in rows if len(own)]

    def _last_states(self, rows: Tensor, place: Tensor) -> Tensor:
        """(r,) rows -> (r, D) the states at their places."""
        place = place[rows]
        states = self.policy.states(self.tokens[rows, : int(place.max()) + 1])
        return states[torch.arange(len(rows), device=rows.device), place]


def _prompts_of(state: PromptState, prompt_index: Tensor) -> tuple[Tensor, Tensor]:
    """(R, S) tokens of each row's prompt but its last, padded on the right, and (R,) how many they are."""
    return state.keys[0][prompt_index, 0, :, 0].long(), state.mask.sum(1)[prompt_index]


def _widened(tokens: Tensor, width: int) -> Tensor:
    """(R, N) -> (R, width), filled up with 0."""
    wide = tokens.new_zeros(len(tokens), width)
    wide[:, : tokens.shape[1]] = tokens
    return wide
