"""Where an answer ends: a causal model's end tokens, those of conversations too. Stop strings: ``sampling.stops``."""

from __future__ import annotations

from esrl.data.encoding import Encoder
from esrl.models.causal import CausalPolicy
from esrl.models.seq2seq import MarianPolicy


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
