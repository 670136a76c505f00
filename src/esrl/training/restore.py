"""What a checkpoint and a run that goes on from it must have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esrl.training.checkpoint import unpack_tensors


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


def load_parameters(model: nn.Module, data: bytes, checkpoint: Path) -> None:
    """Set the parameters to those of a checkpoint.

    Raises:
        ValueError: they are another architecture's.
    """
    parameters, saved = dict(model.named_parameters()), unpack_tensors(data)
    if {name: value.shape for name, value in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"{checkpoint} was saved from another architecture; start anew with --overwrite.")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
