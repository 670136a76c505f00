"""Model folders to policies: the configuration says which family it is."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from esrl.models import seq2seq
from esrl.models.adapters import ADAPTER_CONFIG, base_of, load_adapter
from esrl.models.causal import CausalPolicy
from esrl.models.causal_support import TESTED
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
    # a model type with images or audio may stand in the mapping with a class that takes them
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "vision_config"):
        raise ValueError(
            f"{path}: model_type is {config.model_type!r}; supported here: {', '.join(seq2seq.SUPPORTED)}, and causal "
            f"language models such as {', '.join(TESTED)}. Other families are refused rather than trained wrongly."
        )
    model = read_weights(path, AutoModelForCausalLM, dtype, _KIND)
    tokenizer = read_tokenizer(path, model.config.vocab_size, _KIND)
    try:
        return CausalPolicy(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
