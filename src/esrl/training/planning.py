"""What a step plans from: samples and rewards become records of Cap_x, records become what eq. 8 sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esrl.algorithm.baselines import RewardQueue
from esrl.algorithm.capability import (
    CapabilityConfig,
    CapabilityRecord,
    contrast,
    entropy_capability,
    map_capability,
    metric_capability,
)
from esrl.algorithm.groups import Groups
from esrl.errors import NumericsError, RewardError
from esrl.rewards.calling import RewardResult
from esrl.types import Rollouts, SamplingPlan

MAX_REWARD = 1e30
"""Larger rewards overflow float32 as soon as they are multiplied."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards of the kept rows; an abstained row counts 0."""

    values: Tensor  # (R,) float64 as scored, comparable from step to step; 0 where abstained
    counts: Tensor  # (R,) int64
    metrics: dict[str, float] = field(default_factory=dict)  # what reward functions logged by log_metric
    extra: dict[str, list[Any]] = field(default_factory=dict)  # and by log_extra, R values each
    normalised: Tensor | None = None  # (R,) z-scores over the step, where they are what is learnt from

    @property
    def signal(self) -> Tensor:
        """(R,) what is learnt from."""
        return self.values if self.normalised is None else self.normalised


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of a step and what it was made from."""

    plan: SamplingPlan
    capability: Tensor  # (P,) as eq. 8 saw it; NaN where the allocator needs none
    first: dict[int, CapabilityRecord]  # greedy first estimates, by prompt
    first_tokens: int
    from_memory: int


def rewards_of(result: RewardResult, counts: Tensor, texts: Sequence[str]) -> Rewards:
    """A call's rewards as scored, not normalised, if a step can be made of them.

    Args:
        counts: (R,) how many samples each row stands for.
        texts: what was scored, for the error.

    Raises:
        RewardError: a reward is beyond ``MAX_REWARD``, or a figure that a function logged is not finite.
    """
    large = result.raw.abs() > MAX_REWARD
    if bool(large.any()):
        row = int(large.nonzero()[0])
        raise RewardError(
            f"the reward of sample {texts[row][:60]!r} is {float(result.raw[row])}; beyond {MAX_REWARD:g} in size "
            "float32 overflows. Scale the reward."
        )
    for name, value in result.metrics.items():
        if not math.isfinite(value):
            raise RewardError(f"a reward function logged {name!r} as {value}; log finite numbers only.")
    return Rewards(result.raw, torch.where(result.abstained, 0, counts), dict(result.metrics), result.extra)


def capability_scores(
    rollouts: Rollouts, rewards: Rewards, groups: Groups, config: CapabilityConfig, vocabulary: int
) -> Tensor:
    """(P,) Cap_x of these samples before any mapping (eq. 6, eq. 7)."""
    if config.estimator != "entropy":
        return metric_capability(rewards.values, groups, rewards.counts)
    name = {"full_normalised": "entropy", "max_prob": "max_prob"}.get(config.entropy_form)
    values = rollouts.log_probs if name is None else rollouts.records[name]
    return entropy_capability(values.cpu(), rollouts.mask.cpu(), groups, rewards.counts, config, vocabulary)


def capability_records(
    example_ids: Sequence[str], scores: Tensor, rewards: Rewards, groups: Groups, epoch: int, *, greedy: bool = False
) -> list[CapabilityRecord | None]:
    """What is remembered of each prompt, for the next epoch; None for one without a valid sample.

    Raises:
        NumericsError: a score or the spread of a prompt's rewards is not finite.
    """
    weights = rewards.counts.to(torch.float64)
    number = groups.sum(weights)
    mean = groups.mean(rewards.values, weights)
    squares = groups.sum(weights * (rewards.values - groups.spread(mean)).square())
    std = (squares / (number - 1).clamp_min(1)).sqrt()
    bad = ~(torch.isfinite(scores) & torch.isfinite(std))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise NumericsError(
            f"the capability of example {example_ids[i]} is {float(scores[i])} with a spread of {float(std[i])}; "
            "nothing was updated. Look at its rewards and log-probabilities."
        )
    return [
        None
        if count == 0
        else CapabilityRecord(score, greedy, epoch, int(count), spread if count > 1 and not greedy else None)
        for score, count, spread in zip(scores.tolist(), number.tolist(), std.tolist(), strict=True)
    ]


def mapped_capability(
    scores: Tensor, example_ids: Sequence[str], config: CapabilityConfig, queue: RewardQueue
) -> Tensor:
    """(P,) Cap_x as eq. 8 sees it; a prompt whose score is NaN, not known, takes the mean of the known ones.

    Raises:
        RewardError: one is negative, which eq. 8 cannot take.
    """
    known = ~torch.isnan(scores)
    mapped = torch.zeros_like(scores)
    if bool(known.any()):
        # while the queue is empty the step's own scores say what is usual
        usual = queue if queue.values else _queue_of(scores[known])
        of_known = map_capability(scores[known], config.mapping, usual.mean(), usual.std())
        mapped[known] = of_known
        mapped[~known] = of_known.mean()
    mapped = contrast(mapped, config.contrast)
    if bool((mapped < 0).any()):
        i = int((mapped < 0).nonzero()[0])
        raise RewardError(
            f"the capability of example {example_ids[i]} is {float(mapped[i])}, and eq. 8 needs 0 or more: its rewards "
            'are negative. Map them: capability.capability_map = "sigmoid_z"; the run goes on with --resume '
            "--capability.capability-map sigmoid_z --accept-changes capability.capability_map."
        )
    return mapped


def _queue_of(scores: Tensor) -> RewardQueue:
    queue = RewardQueue(max(1, len(scores)))
    queue.push(scores.tolist())
    return queue
