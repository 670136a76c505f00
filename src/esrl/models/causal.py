"""Decoder-only models: any Hugging Face causal model whose attention goes through the attention interface.

The prompt but for its last token is run once; its keys and values are what samples share in both stages, as an
encoder-decoder's samples share the encoder's. The prompt's last token is each row's start token: it predicts the
first token of the answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from esrl.algorithm.log_probs import Projection
from esrl.models.causal_attention import RecordedKeys, SharedPrefix, attending
from esrl.models.causal_decoder import FrozenCausalDecoder
from esrl.models.causal_llama import FrozenLlamaDecoder, fits
from esrl.models.causal_support import (
    TESTED,
    CannotShareError,
    check_sharing,
    check_supported,
    fault_of,
    logit_cap,
    longest_shared,
)
from esrl.models.policy import FrozenDecoder, PromptState
from esrl.models.precision import Precision, in_precision
from esrl.models.seq2seq import Preset
from esrl.types import Prompts


class CausalPolicy:
    """A causal language model and its tokenizer as a policy.

    Args:
        model: Hugging Face's model with its vocabulary projection, or one with PEFT's adapters around it.

    Raises:
        CannotShareError: a model whose prompts cannot be shared exactly, by name; ``PlainCausalPolicy`` takes it.
        ValueError: a model that is not supported, or a tokenizer that does not fit.
    """

    notice: str | None = None
    """What a user should be told about how this model is run."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.precision: Precision = "float32"
        plain = self.plain
        check_supported(plain)
        config, generation = plain.config, plain.generation_config
        if tokenizer.pad_token_id is None:  # masks tell padding from text, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has neither a PAD nor an EOS token; give it one: tokenizer.eos_token = ...")
        self.eos_tokens = _end_tokens(generation.eos_token_id, config.eos_token_id, tokenizer.eos_token_id)
        self.pad_token = int(tokenizer.pad_token_id)
        self.suppressed = sorted({self.pad_token} - set(self.eos_tokens))
        self.vocabulary = int(plain.lm_head.weight.shape[0])
        self.max_length = self._positions()
        if self.vocabulary <= max(*self.eos_tokens, self.pad_token):
            raise ValueError(
                f"the tokenizer's special tokens go up to {max(*self.eos_tokens, self.pad_token)}, but the model's "
                f"vocabulary has {self.vocabulary} tokens; they do not belong together."
            )
        embedding = plain.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            # as in MarianPolicy: no matrix (V, D) for each micro-batch where the projection has one anyway
            embedding.sparse = embedding.weight is plain.lm_head.weight
        self.set_dropout(0.0)
        self._compare()

    @property
    def plain(self) -> Any:
        """Hugging Face's model, adapters injected but not wrapped."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def body(self) -> Any:
        """The model without its vocabulary projection."""
        plain = self.plain
        return getattr(plain, plain.base_model_prefix)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.plain.lm_head.weight.device
        return device

    def start_tokens(self, prompts: Prompts) -> Tensor:
        """(P,) the last token of each prompt."""
        lengths = prompts.mask.sum(1)
        if bool((lengths == 0).any()):
            empty = prompts.example_ids[int((lengths == 0).nonzero()[0])]
            raise ValueError(
                f"the prompt of example {empty} has no token, and a causal model needs one to begin with; give it "
                "text, or a tokenizer that adds a token at the beginning."
            )
        return prompts.input_ids.gather(1, lengths[:, None] - 1)[:, 0]

    def room(self, prompts: Prompts) -> Tensor:
        """(P,) how many tokens a sample of each prompt can have before the model's positions end."""
        room = self.max_length - prompts.mask.sum(1)
        if bool((room < 1).any()):
            i = int((room < 1).nonzero()[0])
            raise ValueError(
                f"the prompt of example {prompts.example_ids[i]} has {int(prompts.mask[i].sum())} tokens and leaves no "
                f"room for an answer: the model has {self.max_length} positions. Shorten it (max_source_tokens)."
            )
        return room

    @in_precision
    def encode(self, prompts: Prompts) -> PromptState:
        """Keys and values of each prompt but for its last token."""
        refuse_checkpointing(self.body)
        tokens, there = self._but_last(prompts)
        recorded = RecordedKeys()
        positions = torch.arange(tokens.shape[1], device=self.device).expand(len(tokens), -1)
        with attending(self.body.config):
            self.body(input_ids=tokens, position_ids=positions, past_key_values=recorded, use_cache=True)
        # contiguous, and of one type (rotary positions are float32 under autocast): batched products at every step
        # would otherwise copy them each time
        pairs = zip(recorded.keys, recorded.values, strict=True)
        keys = tuple(key.to(value.dtype).contiguous() for key, value in pairs)
        return PromptState(keys, tuple(value.contiguous() for value in recorded.values), there)

    def frozen_decoder(self) -> FrozenDecoder:
        kind = FrozenLlamaDecoder if fits(self.body) else FrozenCausalDecoder
        return kind(self.body, self.projection(), self.max_length)

    @in_precision
    def hidden_states(self, state: PromptState, prompt_index: Tensor, inputs: Tensor) -> Tensor:
        prefix = SharedPrefix(state, prompt_index.to(self.device), inputs.shape[1])
        positions = prefix.start[:, None] + torch.arange(inputs.shape[1], device=self.device)
        # what lies behind the last position is another row's length: samples end in time (``room``)
        positions = positions.clamp_max(self.max_length - 1)
        refuse_checkpointing(self.body)
        with attending(self.body.config, prefix):
            output = self.body(input_ids=inputs, position_ids=positions, past_key_values=RecordedKeys(), use_cache=True)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @property
    def packs(self) -> bool:
        return False

    def token_states(self, state: PromptState, prompt_index: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.hidden_states(state, prompt_index, inputs)[mask]

    def _but_last(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """(P, S) tokens of each prompt but its last, padded on the right, and their mask."""
        mask = prompts.mask.to(self.device)
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("a prompt is padded on its left side; prompts are padded behind their last token.")
        # one column at least, masked where there is nothing: models take no sequence of length 0
        tokens = prompts.input_ids[:, : max(1, mask.shape[1] - 1)].to(self.device)
        return tokens, mask[:, 1:] if mask.shape[1] > 1 else torch.zeros_like(mask)

    def _positions(self) -> int:
        """The longest sequence, where prompts can be shared."""
        check_sharing(self.plain)
        return longest_shared(self.plain.config)

    def _compare(self) -> None:
        """Hold the model against its plain forward, where no test does or its configuration may mean nothing to it."""
        config = self.plain.config
        if config.model_type in TESTED and logit_cap(config) is None:
            return
        if (fault := fault_of(self)) is not None:
            raise CannotShareError(config, fault)

    def projection(self) -> Projection:
        head = self.plain.lm_head
        bias = head.bias
        if self.suppressed:
            bias = head.weight.new_zeros(self.vocabulary) if bias is None else bias.clone()
            bias[self.suppressed] = -torch.inf
        return Projection(head.weight, bias, logit_cap(self.plain.config))

    def set_dropout(self, rate: float) -> None:
        found = False
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0 if _on_attention_weights(name) else rate
                found |= module.p > 0
            for field, value in list(vars(module).items()):
                if field.endswith("dropout") and isinstance(value, float | int):
                    here = _on_attention_weights(field) or (field == "dropout" and hasattr(module, "q_proj"))
                    setattr(module, field, 0.0 if here else rate)
                    found |= rate > 0 and not here
                elif field == "layerdrop":
                    module.layerdrop = 0.0
        if rate and not found:
            raise ValueError(
                f"dropout is {rate}, but model_type {self.plain.config.model_type!r} has no dropout outside its "
                "attention weights; set dropout = 0."
            )
        self.model.train(rate > 0)

    def save(self, folder: Path) -> None:
        """Write a folder that ``from_pretrained`` loads: the model, or its adapters alone where it has some."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


CAUSAL_PRESETS = {
    "llama-tiny": Preset(width=256, layers=4, heads=4, inner_width=768),
    "llama-small": Preset(width=384, layers=6, heads=6, inner_width=1152),
}


def new_causal(preset: Preset, tokenizer: Any, max_length: int, seed: int) -> CausalPolicy:
    """A randomly initialised Llama with tied embeddings; the same weights for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.width,
        intermediate_size=preset.inner_width,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return CausalPolicy(model, tokenizer)


def refuse_checkpointing(body: Any) -> None:
    """Hugging Face's layers then drop the cache with a mere warning, and answers would be scored without prompts."""
    if body.training and any(getattr(module, "gradient_checkpointing", False) for module in body.modules()):
        raise ValueError(
            "the model has gradient checkpointing switched on, with which Hugging Face's layers leave out the prompt's "
            "keys and values. Call model.gradient_checkpointing_disable(); micro-batches bound the memory instead."
        )


def _on_attention_weights(name: str) -> bool:
    """Where the encoder-decoder policies have no dropout either."""
    return "attn_dropout" in name or "attention_dropout" in name


def _end_tokens(*candidates: Any) -> tuple[int, ...]:
    for value in candidates:
        if value is not None:
            return tuple(value) if isinstance(value, list | tuple) else (int(value),)
    raise ValueError("neither the model's configuration nor its tokenizer names an end-of-sequence token.")
