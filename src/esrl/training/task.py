"""What a training step is: the contract between the loop and its tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


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
