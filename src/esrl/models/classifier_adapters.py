"""LoRA for sequence classifiers: adapters and the head are trained, and what is saved is a plain classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from esrl.models.adapters import LoraSettings, adapted

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
    whole = {name for name in HEADS if hasattr(model, name)}
    whole |= {name for name in (*new_modules, *settings.modules_to_save) if name.split(".")[0] not in whole}
    result = adapted(model, settings, "SEQ_CLS", sorted(whole))
    for module in result.modules():  # a new head's first weights are random, never used, and would have to be kept
        for unused in getattr(module, "original_module", torch.nn.Module()).parameters():
            torch.nn.init.zeros_(unused)
    return result


def save_merged(model: Any, folder: Path) -> None:
    """Write a plain classifier's folder, the adapters added to a copy of its weights; the model stays as it is."""
    device = model.device
    model.to("cpu")  # a copy might find no room where it is
    try:
        copy.deepcopy(model).merge_and_unload(safe_merge=True).save_pretrained(folder)
    finally:
        model.to(device)
