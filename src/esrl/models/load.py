"""Model folders to policies: the configuration says which family it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from esrl.models import seq2seq
from esrl.models.adapters import ADAPTER_CONFIG, base_of, load_adapter
from esrl.models.causal import CausalPolicy
from esrl.models.causal_plain import PlainCausalPolicy
from esrl.models.causal_support import TESTED, CannotShareError
from esrl.models.folders import read_config, read_tokenizer, read_weights
from esrl.models.seq2seq import MarianPolicy

_KIND = "a Marian-type or causal language model"


def load_policy(path: str | Path, dtype: torch.dtype = torch.float32) -> MarianPolicy | CausalPolicy:
    """Load a folder (or hub name) with its tokenizer: an encoder-decoder, a causal model, or adapters of either.

    Safetensors only, no code from the folder. A folder of adapters names its base model, which is loaded too.

    Raises:
        ValueError: no such folder, an architecture that is not supported, weights that are not safetensors, damaged or
            do not fill the architecture, or no tokenizer that fits.
    """
    if (Path(path) / ADAPTER_CONFIG).is_file():
        return load_adapter(path, load_policy(base_of(path), dtype))
    config = read_config(path, _KIND)
    if config.model_type in seq2seq.SUPPORTED:
        return seq2seq.load_policy(path, dtype)
    if not is_causal(config):
        raise ValueError(
            f"{path}: model_type is {config.model_type!r}; supported here: {', '.join(seq2seq.SUPPORTED)}, and causal "
            f"language models such as {', '.join(TESTED)}. Other families are refused rather than trained wrongly."
        )
    return causal_policy(path, read_weights(path, AutoModelForCausalLM, dtype, _KIND))


def is_causal(config: Any) -> bool:
    """Whether a configuration is a decoder-only language model's, of text alone."""
    # a model type with images or audio may stand in the mapping with a class that takes them
    plain = not config.is_encoder_decoder and not hasattr(config, "vision_config")
    return plain and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def causal_policy(path: str | Path, model: Any) -> CausalPolicy:
    """A folder's causal model with its tokenizer: prompts shared where they can be, run anew for each sample otherwise.

    Raises:
        ValueError: no tokenizer that fits, or a model that is not supported.
    """
    tokenizer = read_tokenizer(path, model.config.vocab_size, _KIND)
    try:
        return _shared_or_plain(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _shared_or_plain(model: Any, tokenizer: Any) -> CausalPolicy:
    try:
        return CausalPolicy(model, tokenizer)
    except CannotShareError as error:
        return PlainCausalPolicy(model, tokenizer, error)
