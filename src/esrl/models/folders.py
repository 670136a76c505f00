"""Model folders in: safetensors only, no code from the folder, nothing missing and nothing left over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer


def read_config(path: str | Path, kind: str) -> Any:
    """The configuration of a folder or hub name.

    Args:
        kind: what the messages ask for, as "a Marian-type model".

    Raises:
        ValueError: no such folder, or no configuration in it.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{path}: no config.json here; give a model folder as save_pretrained writes it.")
    if not folder.exists() and str(path).count("/") != 1:
        raise ValueError(f"{path}: no such folder. Give the folder of {kind}, or a hub name owner/name.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, StrictDataclassError) as error:
        raise unreadable(path, "configuration", error, kind) from error


def read_weights(path: str | Path, model_class: Any, dtype: torch.dtype, kind: str, **options: Any) -> Any:
    """The model, filled completely.

    Args:
        options: of ``from_pretrained``.

    Raises:
        ValueError: weights that are not safetensors, damaged, or of another architecture.
    """
    try:
        model, report = model_class.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise unreadable(path, "safetensors weights", error, kind) from error
    # where config and weights disagree, Hugging Face would go on with random weights, or without a layer
    wrong = {str(key) for key in report["missing_keys"]} | {str(key[0]) for key in report["mismatched_keys"]}
    wrong |= {str(key) for key in report["unexpected_keys"] if re.search(r"\.\d+\.", str(key))}
    if wrong:
        raise ValueError(
            f"{path}: config.json and the weights do not belong together: {len(wrong)} tensors are missing, left over "
            f"or of another size, the first is {min(wrong)}. Take both from the same save_pretrained."
        )
    return model


def read_tokenizer(path: str | Path, vocab_size: int, kind: str) -> Any:
    """The tokenizer.

    Raises:
        ValueError: none that can be read, or one with more pieces than the model has.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, "tokenizer", error, kind) from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} pieces, the model's vocabulary {vocab_size}; "
            "they do not belong together."
        )
    return tokenizer


def unreadable(path: str | Path, what: str, error: Exception, kind: str) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"{path}: no readable {what} ({reason}). Give {kind} as save_pretrained writes it: config.json, "
        "model.safetensors and the tokenizer's files."
    )
