"""The slow twin of the engine: Hugging Face's ``generate`` under the same rules.

It serves beam search, the tests and the benchmark. Its draws come from torch's generator, not from our streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from esrl.data.stops import stop_rows
from esrl.models.causal import CausalPolicy
from esrl.models.causal_plain import PlainCausalPolicy
from esrl.models.precision import in_precision
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.stops import decoder
from esrl.types import Prompts


@in_precision
def generate_tokens(
    policy: MarianPolicy | CausalPolicy, prompts: Prompts, max_new_tokens: int, **options: Any
) -> Tensor:
    """(P, length) new tokens, padded behind the first end-of-sequence; suppressed tokens as in the engine."""
    if not isinstance(policy, PlainCausalPolicy):
        return _generate(policy, prompts, max_new_tokens, options)
    # Recurrent layers may read padding as they read text, so prompts of one length go together, without any; and not
    # every cache gives what whole sequences do (RecurrentGemma's keeps the states of earlier calls).
    options["use_cache"] = False
    lengths = prompts.mask.sum(1)
    found: dict[int, Tensor] = {}
    for length in lengths.unique().tolist():
        members = (lengths == length).nonzero()[:, 0].tolist()
        rows = _generate(policy, prompts.select(members), max_new_tokens, options)
        found |= dict(zip(members, rows, strict=True))
    return pad_sequence([found[i] for i in range(len(prompts))], batch_first=True, padding_value=policy.pad_token)


def _generate(
    policy: MarianPolicy | CausalPolicy, prompts: Prompts, max_new_tokens: int, options: dict[str, Any]
) -> Tensor:
    model = policy.model
    tokens, mask, start = prompts.input_ids, prompts.mask, 1
    if isinstance(policy, CausalPolicy):
        tokens, mask = left_padded(prompts, policy.pad_token)
        start = tokens.shape[1]
    # forbidden sequences of several tokens belong to evaluation alone (method.md, section 4)
    longer = [words for words in model.generation_config.bad_words_ids or [] if len(words) > 1]
    with torch.no_grad():
        output: Tensor = model.generate(
            input_ids=tokens.to(policy.device),
            attention_mask=mask.to(policy.device),
            max_new_tokens=min(max_new_tokens, int(policy.room(prompts).min())),
            max_length=None,
            bad_words_ids=[[token] for token in policy.suppressed] + longer or None,
            pad_token_id=policy.pad_token,
            **options,
        )
    return output[:, start:]


def left_padded(prompts: Prompts, pad_token: int) -> tuple[Tensor, Tensor]:
    """(P, S) tokens and mask with the padding before each prompt, where Hugging Face's causal models want it."""
    width = prompts.mask.shape[1]
    shift = width - prompts.mask.sum(1, keepdim=True)
    source = torch.arange(width) - shift
    mask = source >= 0
    return prompts.input_ids.gather(1, source.clamp_min(0)).masked_fill(~mask, pad_token), mask


def generate_texts(
    policy: MarianPolicy | CausalPolicy,
    prompts: Prompts,
    max_new_tokens: int,
    beam_size: int,
    length_penalty: float,
    stops: Sequence[str] = (),
) -> list[str]:
    """Beam search, one text per prompt, cut at its stop string where it has one; the search itself knows of none."""
    tokens = generate_tokens(
        policy, prompts, max_new_tokens, do_sample=False, num_beams=beam_size, length_penalty=length_penalty
    ).cpu()
    # padding is a special token, which gives no text
    return stop_rows(tokens, torch.ones_like(tokens, dtype=torch.bool), decoder(policy.tokenizer), stops)[2]
