"""What a training step is: the contract between the loop and its tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from esrl.training.run_folder import read_folder


@dataclass(slots=True)
class Update:
    """What a task's step hands to the loop; gradients are already in the parameters' ``grad``, summed."""

    loss: float  # sum, this process
    denominator: float  # what the sum is divided by, this process
    metrics: dict[str, Any]
    commit: Callable[[], list[dict[str, Any]]]
    """Makes the step's changes to the task's state; returns the lines for samples.jsonl. It must not fail."""


class Task(Protocol):
    """What a training step is."""

    model: nn.Module

    def num_batches(self, epoch: int) -> int:
        """Steps in an epoch."""
        ...

    def compute(self, epoch: int, batch: int) -> Update:
        """Compute one step's gradients without changing any state."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Scores on the development set, ``dev_*``; empty when there is none."""
        ...

    def export(self) -> dict[str, bytes]:
        """The model folder's files."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def export_folder(save: Callable[[Path], None]) -> dict[str, bytes]:
    """Run a ``save_pretrained``-like function in a scratch folder and return the files it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        save(Path(scratch))
        return read_folder(Path(scratch))
