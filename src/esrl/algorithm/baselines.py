"""What a reward is compared with (paper, "FIFO-based Baseline Reward"; method.md, section 6)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from esrl.algorithm.groups import Groups

BaselineKind = Literal["fifo", "moving_average", "prompt_mean", "leave_one_out", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineConfig:
    """The baseline that REINFORCE subtracts from rewards; in MRT a constant cancels exactly."""

    kind: BaselineKind = "fifo"
    """`fifo` (paper), `moving_average` (the paper's REINFORCE row), `prompt_mean`, `leave_one_out` or `none`."""
    queue_size: int = 1000
    """Q_size in rewards; not in the paper. One step is several hundred samples."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(BaselineKind):
            raise ValueError(f"baseline is {self.kind!r}; choose one of {', '.join(get_args(BaselineKind))}.")
        if self.queue_size < 1:
            raise ValueError(f"queue_size is {self.queue_size}; it must be 1 or more.")


class RewardQueue:
    """The first-in-first-out queue Q and the running mean of all rewards."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: deque[float] = deque(maxlen=size)
        self.total_sum = 0.0
        self.total_count = 0

    def push(self, rewards: Sequence[float]) -> None:
        """Append this step's rewards, oldest out beyond ``size``."""
        self.values.extend(rewards)
        self.total_sum += math.fsum(rewards)
        self.total_count += len(rewards)

    def mean(self) -> float:
        """b: the mean of the queue; 0 while it is empty."""
        return math.fsum(self.values) / len(self.values) if self.values else 0.0

    def std(self) -> float:
        """Population standard deviation of the queue; 0 below two values."""
        if len(self.values) < 2:
            return 0.0
        mean = self.mean()
        # the root of a sum of squares that neither overflows nor underflows on the way
        return math.hypot(*(value - mean for value in self.values)) / math.sqrt(len(self.values))

    def running_mean(self) -> float:
        """The mean of every reward ever pushed."""
        return self.total_sum / self.total_count if self.total_count else 0.0

    def copy(self) -> RewardQueue:
        """An independent copy: a step works on it and commits it once it has succeeded."""
        other = RewardQueue(self.size)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values), "total_sum": self.total_sum, "total_count": self.total_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = deque(state["values"], maxlen=self.size)
        self.total_sum = state["total_sum"]
        self.total_count = state["total_count"]


def baseline_values(
    kind: BaselineKind, rewards: Tensor, groups: Groups, counts: Tensor, queue: RewardQueue, shift: float = 0.0
) -> Tensor:
    """(R,) the baseline of each row; ``queue`` already holds this step's rewards.

    Args:
        shift: what is added to the queue's means, where ``rewards`` are not what was pushed: the queue holds rewards as
            they were scored, a KL penalty comes off afterwards.

    ``leave_one_out`` of a prompt with a single sample falls back to the queue's mean, and so does ``prompt_mean``:
    a sample compared with itself would never teach anything.
    """
    if kind == "none":
        return torch.zeros_like(rewards)
    if kind == "moving_average":
        return torch.full_like(rewards, queue.running_mean() + shift)
    if kind == "fifo":
        return torch.full_like(rewards, queue.mean() + shift)
    counts = counts.to(rewards.dtype)
    number = groups.spread(groups.sum(counts))
    total = groups.spread(groups.sum(counts * rewards))
    leave_one_out = (total - rewards) / (number - 1).clamp_min(1)
    own = total / number.clamp_min(1) if kind == "prompt_mean" else leave_one_out
    return torch.where(number > 1, own, queue.mean() + shift)
