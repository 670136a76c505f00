"""What a step says of itself: its line in metrics.jsonl, and the lines of followed prompts in samples.jsonl."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from esrl.algorithm.advantages import equal_groups
from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.capability import CapabilityRecord
from esrl.algorithm.duplicates import num_unique
from esrl.algorithm.groups import Groups
from esrl.algorithm.objectives import ObjectiveConfig, mrt_prompts
from esrl.errors import RewardError
from esrl.training.planning import Planned, Rewards
from esrl.training.processes import Processes
from esrl.types import Prompts, Rollouts

# what the loop adds to a line of metrics.jsonl
_LOOP_METRICS = {
    *("step", "epoch", "kind", "loss", "grad_norm", "learning_rate", "seconds_total", "peak_memory_mb"),
    *("skipped", "reason"),
}
# and the learner
_LEARNER_METRICS = {
    *(
        "update",
        "ratio_mean",
        "clip_low_share",
        "clip_high_share",
        "approx_kl",
        "kl_mean",
        "kl_per_token",
        "kl_coefficient",
    ),
    *("value_loss", "explained_variance"),
}


class Stopwatch:
    """Seconds by stage. Kernels are only queued, so a device's are waited for: else whoever waits would be timed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._synchronize()
        started = time.monotonic()
        try:
            yield
        finally:
            self._synchronize()
            self.seconds[stage] += time.monotonic() - started

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All of a step that is logged."""

    prompts: Prompts
    planned: Planned
    drawn: Rollouts
    """As sampled."""
    rollouts: Rollouts
    """What is left of them once duplicates were handled; the rewards are theirs."""
    rewards: Rewards
    records: list[CapabilityRecord | None]
    seconds: Mapping[str, float]


def step_metrics(
    outcome: Outcome, allocation: AllocationConfig, objective: ObjectiveConfig, processes: Processes
) -> dict[str, Any]:
    """The step's figures over all processes.

    Raises:
        RewardError: a reward function logged under a name that is taken.
    """
    plan, rewards, gather = outcome.planned.plan, outcome.rewards, processes.gather
    values = torch.tensor(gather(rewards.values.repeat_interleave(rewards.counts).tolist()), dtype=torch.float64)
    num_samples = gather(plan.num_samples.tolist())
    temperature = [tau for tau, k in zip(gather(plan.temperature.tolist()), num_samples, strict=True) if k > 0]
    scores = gather([record.score for record in outcome.records if record is not None])
    sums = _sums(outcome, objective, processes)
    everyone, total = len(num_samples), sum(num_samples)
    # a greedy first estimate is drawn, too, even where its reward abstains
    spent = total + (everyone - sums["memory"] if allocation.needs_capability else 0)
    own = {
        "reward_mean": float(values.mean()) if len(values) else 0.0,
        "reward_std": float(values.std(correction=0)) if len(values) else 0.0,
        "num_samples_mean": total / everyone,
        "num_samples_histogram": {str(k): count for k, count in sorted(Counter(num_samples).items())},
        "temperature_mean": sum(temperature) / max(1, len(temperature)),
        "budget_used": spent / (everyone * allocation.max_samples),
        "planned_from_memory": sums["memory"] / everyone,
        "capability_mean": sum(scores) / max(1, len(scores)),
        "unique_share": sums["unique"] / max(1, total),
        "truncated_share": sums["truncated"] / max(1, total),
        "mrt_prompts": sums["mrt"],
        "reinforce_prompts": sums["reinforce"],
        "abstained_rows": sums["abstained"],
        "tokens_sampled": sums["tokens"],
        "length_mean": sums["sample_tokens"] / max(1, total),
        "equal_reward_share": sums["equal"] / max(1, sums["several"]),
        **{f"seconds_{name}": outcome.seconds.get(name, 0.0) for name in ("sample", "reward", "score")},
    }
    logged = _averaged(rewards, processes)
    for name in logged.keys() & (own.keys() | _LOOP_METRICS | _LEARNER_METRICS):
        raise RewardError(f"a reward function logged {name!r}, a name metrics.jsonl has; choose another one.")
    return own | logged


def sample_lines(outcome: Outcome, logged: Collection[str], epoch: int) -> list[dict[str, Any]]:
    """samples.jsonl: the followed prompts of this step; ``logged`` has their example ids."""
    prompts, plan = outcome.prompts, outcome.planned.plan
    lines = []
    for i, example in enumerate(prompts.example_ids):
        if example not in logged:
            continue
        rows = (outcome.rollouts.prompt_index == i).nonzero()[:, 0].tolist()
        capability = float(outcome.planned.capability[i])
        lines.append(
            {
                "epoch": epoch,
                "example_id": example,
                "prompt": prompts.columns["source"][i],
                "reference": prompts.columns.get("reference", [""] * len(prompts))[i],
                "num_samples": int(plan.num_samples[i]),
                "temperature": float(plan.temperature[i]),
                "capability": None if math.isnan(capability) else capability,
                "samples": [_sample(outcome, row) for row in rows],
            }
        )
    return lines


def _sample(outcome: Outcome, row: int) -> dict[str, Any]:
    rewards = outcome.rewards
    sample: dict[str, Any] = {
        "text": outcome.rollouts.texts[row],
        "reward": float(rewards.values[row]),
        "count": int(rewards.counts[row]),
    }
    if rewards.extra:
        sample["extra"] = {name: _plain(values[row]) for name, values in rewards.extra.items()}
    return sample


def _plain(value: Any) -> str | int | float | None:
    """What a reward function logged, in a form JSON has."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy's, a 0-D tensor
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _sums(outcome: Outcome, objective: ObjectiveConfig, processes: Processes) -> dict[str, int]:
    """Counts of this step, added up over all processes."""
    planned, drawn, num_samples = outcome.planned, outcome.drawn, outcome.planned.plan.num_samples
    uses_mrt = mrt_prompts(num_samples, objective) & (num_samples > 0)
    rewards, groups = outcome.rewards, Groups(outcome.rollouts.prompt_index, len(num_samples))
    number = int(drawn.mask.sum())
    own = {
        "unique": num_unique(drawn),
        "truncated": int((~drawn.finished).sum()),
        "tokens": number + planned.first_tokens,
        "sample_tokens": number,
        "equal": int(equal_groups(rewards.signal, groups, rewards.counts).sum()),
        "several": int((groups.sum(rewards.counts) > 1).sum()),
        "mrt": int(uses_mrt.sum()),
        "reinforce": 0 if objective.is_clipped else int((~uses_mrt & (num_samples > 0)).sum()),
        "abstained": int((outcome.rewards.counts == 0).sum()),
        "memory": planned.from_memory,
    }
    parts = processes.gather([own])
    return {name: sum(part[name] for part in parts) for name in own}


def _averaged(rewards: Rewards, processes: Processes) -> dict[str, float]:
    """What reward functions logged: the mean over the processes that did, each weighing as much as it has rows."""
    parts: list[tuple[int, dict[str, float]]] = processes.gather([(len(rewards.values), rewards.metrics)])
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for _, metrics in parts for name in metrics):
        having = [(rows, metrics[name]) for rows, metrics in parts if name in metrics]
        total = sum(rows for rows, _ in having)
        result[name] = math.fsum(rows / total * value for rows, value in having)
    return result
