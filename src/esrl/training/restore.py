"""What a checkpoint and a run that goes on from it must have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esrl.training.checkpoint import Checkpoint, unpack_tensors


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on as another run.

    Raises:
        ValueError: a setting or the data differ, by name.
    """
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            raise ValueError(
                f"{key} was {saved.get(key)!r} when this run began and is {now.get(key)!r} now; "
                "a resumed run must be the same run. Restore the value, name the key in --accept-changes, or start "
                "anew with --overwrite."
            )


def frozen_digest(model: nn.Module, trained: Collection[str]) -> str | None:
    """sha256 of the weights that are not trained, which checkpoints do not hold, and of what belongs to them (an output
    bias that is a buffer, a quantized weight's scales); None where all are trained.

    Args:
        trained: names of the parameters that are.
    """
    weights = {name: value.detach() for name, value in model.named_parameters() if name not in trained}
    if not weights:
        return None
    others = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = {name: value for name, value in model.state_dict().items() if name not in others}
    weights |= {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def restore_parameters(
    model: nn.Module, trained: Mapping[str, nn.Parameter], frozen: str | None, checkpoint: Checkpoint, state: Any
) -> None:
    """Set the trained parameters to those of a checkpoint.

    Args:
        trained: the parameters that the run trains.
        frozen: ``frozen_digest`` of the others.
        state: the checkpoint's ``state.json``.

    Raises:
        ValueError: the checkpoint is another architecture's, or was trained over other frozen weights.
    """
    saved = unpack_tensors(checkpoint.files["model.safetensors"])
    if {name: value.shape for name, value in saved.items()} != {n: p.shape for n, p in trained.items()}:
        raise ValueError(f"{checkpoint.path} was saved from another architecture; start anew with --overwrite.")
    before = state["frozen"]
    if before != frozen:
        held = state["fingerprint"]
        model_then = held.get("model") or held.get("model.path") or "a new model"
        raise ValueError(
            f"{checkpoint.path} was trained on top of weights of {model_then} (sha256 {str(before)[:12]}), which it "
            f"does not hold; those read from {_source(model)} now are others (sha256 {str(frozen)[:12]}). "
            "Restore the model that the run began with, or start anew with --overwrite."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def _source(model: nn.Module) -> str:
    """The folder or hub name that a model was loaded from."""
    names = (getattr(getattr(part, "config", None), "name_or_path", None) for part in model.modules())
    return next((str(name) for name in names if name), "the new model")
