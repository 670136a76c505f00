"""What sampling and training need from a model family (design: one path for all families)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from esrl.algorithm.log_probs import Projection
from esrl.models.linear import FrozenProjection
from esrl.models.precision import Precision
from esrl.types import Prompts

BatchSizes = Literal["any", "few"]
"""Numbers of rows that a decoder takes without preparation: any, or a few that come again and again."""


@dataclass(frozen=True, slots=True)
class PromptState:
    """What the decoder reads of a batch of prompts: keys and values, one pair per layer.

    It is shared by all samples of a prompt, in stage one and in stage two, and it is where the backward pass is cut:
    the samples' gradients add up here, then go back through the encoder once.
    """

    keys: tuple[Tensor, ...]  # L tensors (P, heads, S, head width)
    values: tuple[Tensor, ...]
    mask: Tensor  # (P, S) bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys + self.values

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> PromptState:
        half = len(tensors) // 2
        return PromptState(tensors[:half], tensors[half:], self.mask)

    @classmethod
    def join(cls, parts: list[PromptState]) -> PromptState:
        """One batch of prompts after the other; narrower ones are filled up with positions that the mask hides."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.mask.shape[1] for part in parts)
        room = [width - part.mask.shape[1] for part in parts]

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat([pad(each, (0, 0, 0, more)) for each, more in zip(tensors, room, strict=True)])

        return cls(
            tuple(joined(list(each)) for each in zip(*(part.keys for part in parts), strict=True)),
            tuple(joined(list(each)) for each in zip(*(part.values for part in parts), strict=True)),
            torch.cat([pad(part.mask, (0, more)) for part, more in zip(parts, room, strict=True)]),
        )

    def select(self, index: Tensor) -> PromptState:
        """The state of some prompts."""
        return PromptState(
            tuple(key[index] for key in self.keys), tuple(value[index] for value in self.values), self.mask[index]
        )


class Decoder(Protocol):
    """Stage one's view: rows decoded a token at a time, without a graph. Rows that begin together are a wave."""

    def join(self, state: PromptState, prompt_index: Tensor) -> None:
        """Let a wave of R rows begin, behind those that are there; ``prompt_index`` (R,) gives each row's prompt."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """(R,) last tokens -> (R, D) states for the next ones; the caches grow by one position."""
        ...

    def keep(self, *rows: Sequence[int]) -> None:
        """Go on with these rows of each wave, in this order; cheap where most of them stay where they are."""
        ...


def behind_each_other(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """Rows of each wave -> rows of the batch, in which waves of these sizes follow each other."""
    starts = accumulate(sizes[:-1], initial=0)
    return [row + start for own, start in zip(rows, starts, strict=True) for row in own]


class FrozenDecoder(Protocol):
    """The weights of decoder and vocabulary projection as they are now, laid out for stage one."""

    projection: FrozenProjection
    batch_sizes: BatchSizes

    def start(self, state: PromptState, prompt_index: Tensor) -> Decoder:
        """Begin to decode a wave of R rows; ``prompt_index`` (R,) gives each row's prompt."""
        ...


class Policy(Protocol):
    """A model family."""

    model: nn.Module
    tokenizer: Any
    precision: Precision
    """Of matrix products in all that follows; the weights stay what they are."""
    eos_tokens: tuple[int, ...]
    max_length: int
    vocabulary: int
    notice: str | None
    """What a user should be told about how this model is run."""

    @property
    def device(self) -> torch.device: ...

    def start_tokens(self, prompts: Prompts) -> Tensor:
        """(P,) the first decoder input of each prompt's samples."""
        ...

    def room(self, prompts: Prompts) -> Tensor:
        """(P,) the longest sample, in tokens, that the model's positions allow each prompt."""
        ...

    def encode(self, prompts: Prompts) -> PromptState:
        """Run the prompts once; with a graph when gradients are enabled."""
        ...

    def frozen_decoder(self) -> FrozenDecoder:
        """Prepare stage one, in the precision of the place; to be made anew after each update of the weights."""
        ...

    def hidden_states(self, state: PromptState, prompt_index: Tensor, inputs: Tensor) -> Tensor:
        """One parallel forward: decoder inputs (R, T), start token first -> (R, T, D)."""
        ...

    @property
    def packs(self) -> bool:
        """Whether ``token_states`` spends neither time nor memory on padding."""
        ...

    def token_states(self, state: PromptState, prompt_index: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
        """The same for real tokens alone, those of a row before its padding: (R, T) bool -> (n, D), row by row."""
        ...

    def projection(self) -> Projection:
        """The vocabulary projection, suppressed tokens at -inf."""
        ...

    def set_dropout(self, rate: float) -> None:
        """0 turns all dropout off, layer dropout included."""
        ...
