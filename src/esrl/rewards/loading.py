"""A reward model's folder: what it must be, and a refusal by name of what it must not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, SafetensorError)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def load_reward_model(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, str]:
    """Load a sequence-classification model with one label, frozen, and its tokenizer.

    Safetensors only, and no code from the folder.

    Returns:
        model, tokenizer, and a fingerprint of the folder's files.

    Raises:
        ValueError: no such folder, adapters only, another head or another number of labels than one, weights that do
            not fill the model, no tokenizer, or one that does not fit.
    """
    from transformers import AutoConfig, AutoTokenizer  # here, since only runs with a reward model need them

    _check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise _unreadable(folder, "configuration", error) from error
    heads = [name for name in config.architectures or () if not name.endswith("ForSequenceClassification")]
    if heads or not config.architectures:
        raise ValueError(
            f"{folder}: the model is a {', '.join(heads) or config.model_type} model, which gives no score; a reward "
            "model has a sequence-classification head with one label. `esrl reward-model` trains one."
        )
    if config.num_labels != 1:
        raise ValueError(
            f"{folder}: the model has {config.num_labels} labels, and which of them is the reward cannot be known; a "
            "reward model has one. Train one with `esrl reward-model`, or write a reward function that says."
        )
    model = _load_weights(folder, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise _unreadable(folder, "tokenizer", error) from error
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {size}; they do not belong together. "
            "Save both from one run."
        )
    return model.to(device).eval().requires_grad_(False), tokenizer, _fingerprint(folder)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder. Give the folder of a reward model, as `esrl reward-model` writes it."
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: this holds adapters, no whole model; join them with their base: `esrl merge`.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json here; give a model folder as save_pretrained writes it.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(
            f"{folder}: there is no tokenizer ({_TOKENIZER_FILES[0]}); copy it from the run that trained the model: "
            "tokenizer.save_pretrained(folder)."
        )


def _load_weights(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except _LOAD_ERRORS as error:
        raise _unreadable(folder, "safetensors weights", error) from error
    # Hugging Face would go on with random weights, a random head above all
    wrong = {str(key) for key in report["missing_keys"]} | {str(key[0]) for key in report["mismatched_keys"]}
    if wrong:
        raise ValueError(
            f"{folder}: config.json and the weights do not belong together: {len(wrong)} tensors are missing or of "
            f"another size, the first is {min(wrong)}. Take both from the same save_pretrained."
        )
    return model


def _unreadable(folder: Path, what: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{folder}: the {what} cannot be read: {type(error).__name__}: {reason}")


def _fingerprint(folder: Path) -> str:
    """A digest of the files that scores come from."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model") and file.is_file():
            with file.open("rb") as stream:
                digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
