"""The settings of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from esrl.training.alarms import AlarmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How long to train and how often to look, save and log."""

    max_steps: int | None = None
    """Optimizer steps; unset: as many as `num_epochs` has."""
    num_epochs: int | None = None
    """Passes over the training data; the run ends at whichever of the limits comes first."""
    max_seconds: float | None = None
    """Training time, evaluation and saving not counted; the step that passes it is the last."""
    max_sampled_tokens: int | None = None
    """Tokens that `esrl rl` draws, greedy first estimates included; the step that reaches it is the last."""
    eval_steps: int | None = None
    """Evaluate on the development set every so many steps; unset: at the end of each epoch."""
    eval_on_start: bool = True
    """Evaluate before the first step, so that the best model can be the one training started from."""
    metric_for_best_model: str = "dev_bleu"
    """The evaluation value by which `model/` is chosen; higher is better."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better one."""
    save_steps: int = 50
    """Save every so many steps."""
    save_seconds: float = 300.0
    """Save also when the last checkpoint is older than this; it changes nothing but what a kill can cost."""
    save_total_limit: int | None = 2
    """Checkpoints kept."""
    skip_nonfinite: int = 0
    """Steps in a row that are skipped, nothing updated, when a number in them is not finite; one more ends the run."""
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    """When to say that something looks wrong; a run goes on all the same."""

    def __post_init__(self) -> None:
        limits = ("max_steps", "num_epochs", "max_seconds", "max_sampled_tokens")
        for name in (*limits, "eval_steps", "patience", "save_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be above 0 and finite.")
        if not self.save_seconds >= 0:
            raise ValueError(f"save_seconds is {self.save_seconds}; it must be 0 or more.")
        if self.skip_nonfinite < 0:
            raise ValueError(f"skip_nonfinite is {self.skip_nonfinite}; it must be 0 or more.")
        if all(getattr(self, name) is None for name in limits):
            raise ValueError(f"set one of {', '.join(limits)}: without any of them a run never ends.")
