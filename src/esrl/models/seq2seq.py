"""The vanilla Transformer of Marian type: Hugging Face's weights and encoder, our decoder.

The decoder's mathematics (post-norm layers, sinusoidal positions, Vaswani et al. 2017) is written out here once, for
a whole sequence (stage two) and for one token with a cache (stage one). The tests hold both against Hugging Face's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MarianConfig, MarianMTModel

from esrl.algorithm.log_probs import Projection
from esrl.kernels import Native
from esrl.models.attention import Attention, PackedAttention, PaddedAttention, packing_kernels, split_heads
from esrl.models.cached_decoder import FrozenMarianDecoder
from esrl.models.compiled import fitting_kernels
from esrl.models.compiled_decoder import CompiledMarianDecoder
from esrl.models.compiled_encoder import CompiledMarianEncoder
from esrl.models.folders import read_config, read_tokenizer, read_weights
from esrl.models.frozen import merged_linear, twin
from esrl.models.policy import FrozenDecoder, PromptState
from esrl.models.precision import Precision, in_precision
from esrl.types import Prompts

SUPPORTED = ("marian",)
_ENCODED_TOKENS = 4096
_COMPILED_TOKENS = 1024
"""Source tokens from which on laying out an encoder's weights takes less time than it saves; for tiles none is."""


class MarianPolicy:
    """A ``MarianMTModel`` and its tokenizer as a policy."""

    notice: str | None = None

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.precision: Precision = "float32"
        plain = self.plain
        config, generation = plain.config, plain.generation_config
        self.start_token = int(_first_set(generation.decoder_start_token_id, config.decoder_start_token_id))
        eos = _first_set(generation.eos_token_id, config.eos_token_id)
        self.eos_tokens: tuple[int, ...] = tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
        self.max_length = int(config.max_position_embeddings)
        self.vocabulary = int(plain.lm_head.weight.shape[0])
        # a Marian policy never says PAD (its generation config forbids it); several-token bad words are evaluation's,
        # and EOS can always be said, whatever the list holds: both as in `generate`
        bad_words = generation.bad_words_ids or []
        suppressed = {config.pad_token_id} | {words[0] for words in bad_words if len(words) == 1}
        self.suppressed = sorted(suppressed - set(self.eos_tokens))
        for side in (plain.get_encoder(), plain.model.decoder):
            # fixed sinusoids, though Hugging Face makes them parameters
            side.embed_positions.weight.requires_grad_(False)
            for layer in side.layers:
                if isinstance(layer.activation_fn, nn.ReLU):
                    layer.activation_fn.inplace = True
            # Where the projection is tied to it, an embedding's gradient comes as the rows of its tokens and is added
            # to the projection's: a matrix of its own, (V, D), would be made for each micro-batch.
            side.embed_tokens.sparse = side.embed_tokens.weight is plain.lm_head.weight
        self.set_dropout(0.0)

    @property
    def plain(self) -> Any:
        """Hugging Face's model, adapters injected but not wrapped."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        device: torch.device = self.plain.lm_head.weight.device
        return device

    @property
    def pad_token(self) -> int:
        return int(self.plain.config.pad_token_id)

    def start_tokens(self, prompts: Prompts) -> Tensor:
        return torch.full((len(prompts),), self.start_token)

    def room(self, prompts: Prompts) -> Tensor:
        return torch.full((len(prompts),), self.max_length)

    @in_precision
    def encode(self, prompts: Prompts) -> PromptState:
        """Encode each prompt once; keys and values of all cross-attentions are computed here and shared."""
        attentions = [layer.encoder_attn for layer in self._layers]
        projections = [(attention.k_proj, attention.v_proj) for attention in attentions]
        # in parts, dropout would draw other masks than the pass with a graph that replays them
        fixed = torch.is_grad_enabled() or self.model.training or self.device.type != "cpu"
        if not fixed:
            encoder, readers = self.plain.get_encoder(), attentions
            native = fitting_kernels(encoder)
            if native is not None and (native.tiles or int(prompts.mask.sum()) >= _COMPILED_TOKENS):
                if self.plain is not self.model:
                    encoder, readers = (twin(part, merged_linear) for part in (encoder, nn.ModuleList(attentions)))
                return CompiledMarianEncoder(native, encoder, list(readers))(prompts)
        if fixed or prompts.mask.numel() <= _ENCODED_TOKENS:
            return self._encode(prompts, projections)
        # what a part makes fits into memory that is used again and again; fresh pages cost a tenth of the time
        size = max(1, _ENCODED_TOKENS // prompts.mask.shape[1])
        parts = [list(range(start, min(start + size, len(prompts)))) for start in range(0, len(prompts), size)]
        return PromptState.join([self._encode(prompts.select(part), projections) for part in parts])

    def _encode(self, prompts: Prompts, projections: list[tuple[Any, Any]]) -> PromptState:
        """By each layer's projections to keys and values."""
        mask, heads = prompts.mask.to(self.device), self._layers[0].encoder_attn.num_heads
        encoder = self.plain.get_encoder()
        states = encoder(input_ids=prompts.input_ids.to(self.device), attention_mask=mask).last_hidden_state
        return PromptState(
            keys=tuple(_laid_out(project(states), heads) for project, _ in projections),
            values=tuple(_laid_out(project(states), heads) for _, project in projections),
            mask=mask,
        )

    def frozen_decoder(self) -> FrozenDecoder:
        decoder = self.plain.model.decoder
        native = fitting_kernels(decoder)
        if self.plain is not self.model:
            decoder = twin(decoder, merged_linear)
        if native is not None:
            return CompiledMarianDecoder(native, decoder, self.projection())
        return FrozenMarianDecoder(decoder, self.projection())

    @in_precision
    def hidden_states(self, state: PromptState, prompt_index: Tensor, inputs: Tensor) -> Tensor:
        positions = torch.arange(inputs.shape[1], device=self.device)
        attention = PaddedAttention(state, prompt_index.to(self.device), inputs.shape[1])
        return self._decode(inputs, positions, attention)

    @property
    def packs(self) -> bool:
        return self._packing_kernels() is not None

    def _packing_kernels(self) -> Native | None:
        return packing_kernels(self.plain.model.decoder) if self.precision == "float32" else None

    @in_precision
    def token_states(self, state: PromptState, prompt_index: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
        native = self._packing_kernels()
        if native is None:
            return self.hidden_states(state, prompt_index, inputs)[mask]
        attention = PackedAttention(native, state, prompt_index, mask.sum(1))
        return self._decode(inputs[mask], mask.nonzero()[:, 1], attention)

    def _decode(self, inputs: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """(..., D) states of inputs (...) at these positions."""
        decoder = self.plain.model.decoder
        hidden = decoder.embed_tokens(inputs) * decoder.embed_scale + decoder.embed_positions.weight[positions]
        hidden = self._drop(hidden, decoder.dropout)
        for i, layer in enumerate(self._layers):
            own, other = layer.self_attn, layer.encoder_attn
            mixed = attention.own(own.q_proj(hidden), own.k_proj(hidden), own.v_proj(hidden))
            hidden = self._add(layer, hidden, own.out_proj(mixed), layer.self_attn_layer_norm)
            mixed = attention.prompts(i, other.q_proj(hidden))
            hidden = self._add(layer, hidden, other.out_proj(mixed), layer.encoder_attn_layer_norm)
            inner = self._drop(layer.activation_fn(layer.fc1(hidden)), layer.activation_dropout)
            hidden = self._add(layer, hidden, layer.fc2(inner), layer.final_layer_norm)
        return hidden

    def projection(self) -> Projection:
        bias = self.plain.final_logits_bias[0].clone()
        bias[self.suppressed] = -torch.inf
        return Projection(self.plain.lm_head.weight, bias)

    def set_dropout(self, rate: float) -> None:
        for module in self.model.modules():
            if isinstance(getattr(module, "dropout", None), float | int):
                module.dropout = 0.0 if hasattr(module, "q_proj") else rate  # none on attention weights
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.0
            if isinstance(module, nn.Dropout):  # of adapters
                module.p = rate
        self.model.train(rate > 0)

    def save(self, folder: Path) -> None:
        """Write a folder that ``from_pretrained`` loads."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def _layers(self) -> Any:
        return self.plain.model.decoder.layers

    def _drop(self, hidden: Tensor, rate: float) -> Tensor:
        return functional.dropout(hidden, rate) if self.model.training and rate else hidden

    def _add(self, layer: Any, residual: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        # in place, as is the activation: what a linear layer gave is needed for no gradient
        result: Tensor = norm(self._drop(update, layer.dropout).add_(residual))
        return result


def _laid_out(states: Tensor, heads: int) -> Tensor:
    """As ``split_heads``, contiguous: batched products at every step would otherwise copy it each time."""
    return split_heads(states, heads).contiguous()


def load_policy(path: str | Path, dtype: torch.dtype = torch.float32) -> MarianPolicy:
    """Load a Marian-type folder (or hub name) with its tokenizer; safetensors only, no code from the folder.

    Raises:
        ValueError: no such folder, another architecture, weights that are not safetensors, damaged or do not fill the
            architecture, or no tokenizer that fits.
    """
    kind = "a Marian-type model"
    config = read_config(path, kind)
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{path}: model_type is {config.model_type!r}; supported here: {', '.join(SUPPORTED)}. "
            "Other families are refused rather than trained wrongly."
        )
    model = read_weights(path, MarianMTModel, dtype, kind)
    return MarianPolicy(model, read_tokenizer(path, model.config.vocab_size, kind))


def _first_set(*values: Any) -> Any:
    for value in values:
        if value is not None:
            return value
    raise ValueError("the model's configuration names no end-of-sequence or decoder start token.")


@dataclass(frozen=True, slots=True)
class Preset:
    """The sizes of a vanilla Transformer (Vaswani et al. 2017, table 3)."""

    width: int
    layers: int  # in the encoder, and again in the decoder
    heads: int
    inner_width: int


PRESETS = {
    "tiny": Preset(width=256, layers=3, heads=4, inner_width=512),
    "small": Preset(width=256, layers=3, heads=4, inner_width=1024),
    "iwslt": Preset(width=512, layers=6, heads=4, inner_width=1024),
    "base": Preset(width=512, layers=6, heads=8, inner_width=2048),
    "demo": Preset(width=128, layers=2, heads=4, inner_width=256),
}


def new_policy(preset: Preset, tokenizer: Any, max_length: int, seed: int) -> MarianPolicy:
    """A randomly initialised model: tied embeddings, ReLU, post-norm; the same weights for the same seed.

    Embeddings start with a spread of width ** -0.5 and matrices after Glorot and Bengio (2010), as fairseq does it:
    with Hugging Face's 0.02 throughout, the post-norm Transformer learns markedly slower.
    """
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=preset.width,
        encoder_layers=preset.layers,
        decoder_layers=preset.layers,
        encoder_attention_heads=preset.heads,
        decoder_attention_heads=preset.heads,
        encoder_ffn_dim=preset.inner_width,
        decoder_ffn_dim=preset.inner_width,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MarianMTModel(config)
        for name, parameter in model.named_parameters():
            if "embed_positions" in name:
                continue
            if "embed_tokens" in name or "shared" in name:
                nn.init.normal_(parameter, std=preset.width**-0.5)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
    model.generation_config.max_length = max_length
    model.generation_config.bad_words_ids = [[tokenizer.pad_token_id]]
    return MarianPolicy(model, tokenizer)
