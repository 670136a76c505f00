"""The slow twin of the engine: Hugging Face's ``generate`` under the same rules.

It serves beam search, the tests and the benchmark. Its draws come from torch's generator, not from our streams.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esrl.models.seq2seq import MarianPolicy
from esrl.types import Prompts


def generate_tokens(policy: MarianPolicy, prompts: Prompts, max_new_tokens: int, **options: Any) -> Tensor:
    """(rows, length) new tokens, padded behind the first end-of-sequence; suppressed tokens as in the engine."""
    model = policy.model
    # forbidden sequences of several tokens belong to evaluation alone (method.md, section 4)
    longer = [words for words in model.generation_config.bad_words_ids or [] if len(words) > 1]
    with torch.no_grad():
        output: Tensor = model.generate(
            input_ids=prompts.input_ids.to(policy.device),
            attention_mask=prompts.mask.to(policy.device),
            max_new_tokens=min(max_new_tokens, policy.max_length),
            max_length=None,
            bad_words_ids=[[token] for token in policy.suppressed] + longer,
            **options,
        )
    return output[:, 1:]


def generate_texts(
    policy: MarianPolicy, prompts: Prompts, max_new_tokens: int, beam_size: int, length_penalty: float
) -> list[str]:
    """Beam search, one text per prompt."""
    tokens = generate_tokens(
        policy, prompts, max_new_tokens, do_sample=False, num_beams=beam_size, length_penalty=length_penalty
    )
    texts: list[str] = policy.tokenizer.batch_decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts
