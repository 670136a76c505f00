"""Where an answer ends: a causal model's end tokens, those of conversations too, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esrl.data.encoding import Encoder
from esrl.data.stops import stop_rows
from esrl.models.causal import CausalPolicy
from esrl.models.seq2seq import MarianPolicy
from esrl.types import Rollouts


def take_ends(policy: MarianPolicy | CausalPolicy, encoder: Encoder | None) -> None:
    """Let samples end by every token that ends an answer to the encoder's prompts.

    Raises:
        ValueError: a causal model without an encoder, or an encoder for another model.
    """
    if not isinstance(policy, CausalPolicy):
        if encoder is not None:
            raise ValueError("encoder is set, but an encoder-decoder has a tokenizer of its own; leave encoder out.")
        return
    if encoder is None:
        raise ValueError(
            "encoder is None, but a causal model's prompts need one, which says how they become token ids; give "
            "encoder = Encoder(policy.tokenizer, PromptConfig())."
        )
    ends = tuple(dict.fromkeys((*policy.eos_tokens, encoder.end_token, encoder.chat_end_token)))
    if ends == policy.eos_tokens:
        return
    policy.eos_tokens = ends
    policy.suppressed = [token for token in policy.suppressed if token not in ends]
    # beam search ends by these, and so does whoever loads the model that is exported
    policy.plain.generation_config.eos_token_id = list(ends)


def cut_at_stops(rollouts: Rollouts, tokenizer: Any, stops: Sequence[str]) -> Rollouts:
    """The samples as if each had ended with the token that completes a stop string (see ``data.stops``)."""
    if not stops or rollouts.num_rows == 0:
        return rollouts
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    kept, stopped, texts = stop_rows(rollouts.tokens.cpu(), rollouts.mask.cpu(), decode, stops)
    mask = kept.to(rollouts.mask.device)

    def cut(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0)

    return replace(
        rollouts,
        tokens=cut(rollouts.tokens),
        mask=mask,
        finished=rollouts.finished | stopped.to(rollouts.finished.device),
        log_probs=cut(rollouts.log_probs),
        sampling_log_probs=cut(rollouts.sampling_log_probs),
        texts=tuple(texts),
        records={name: cut(values) for name, values in rollouts.records.items()},
    )
