"""LoRA for sequence classifiers: adapters and the head are trained, and what is saved is a plain classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from esrl.models.adapters import LoraSettings, _peft

HEADS = ("score", "classifier")
"""What Hugging Face calls a classifier's head."""


def adapt_classifier(model: Any, settings: LoraSettings, new_modules: Iterable[str] = ()) -> Any:
    """A PEFT model around a sequence classifier, whose adapters and head alone are trained; it adds no dropout.

    The classifier that was given is used up: its layers now carry the adapters.

    Args:
        new_modules: dotted names of modules with random weights, which are trained whole as the head is.

    Raises:
        ValueError: PEFT is missing, or a module that the settings name is not there.
    """
    peft, known = _peft(), [name for name, _ in model.named_modules()]
    for name in (*settings.target_modules, *settings.modules_to_save):
        if not any(module == name or module.endswith(f".{name}") for module in known):
            raise ValueError(f"lora names {name!r}, and this {model.config.model_type} model has no such module.")
    whole = {name for name in HEADS if hasattr(model, name)}
    whole |= {name for name in (*new_modules, *settings.modules_to_save) if name.split(".")[0] not in whole}
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules) or "all-linear",
        modules_to_save=sorted(whole),
        task_type="SEQ_CLS",
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def save_merged(model: Any, folder: Path) -> None:
    """Write a plain classifier's folder, the adapters added to a copy of its weights; the model stays as it is."""
    copy.deepcopy(model).merge_and_unload(safe_merge=True).save_pretrained(folder)
