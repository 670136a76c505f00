"""Alarms: what often goes wrong in reinforcement learning of language models, said when the figures show it.

Pure functions over a JSON-able state: a step's figures go in, the new state and the lines to say come out. An alarm is
said once; once its condition no longer holds it may be said again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmConfig:
    """When to raise an alarm; means are over ``window`` steps."""

    window: int = 20
    """Steps over which length, KL and the share of equal rewards are averaged; also those that a run's length at its
    start is taken from."""
    evaluations: int = 3
    """So many evaluations in a row below the best one, while the reward is above what it was then, are an alarm."""
    metric: str | None = None
    """The held-out metric that should rise with the reward; higher is better. Unset: `metric_for_best_model`."""
    length_factor: float = 2.0
    """The mean answer may be so many times longer or shorter than at the start."""
    max_kl: float = 20.0
    """Mean KL of an answer from the reference policy, in nats."""
    max_equal_share: float = 0.8
    """Share of prompts whose samples all have the same reward, which teach a comparing method nothing."""

    def __post_init__(self) -> None:
        for name in ("window", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if not 1 < self.length_factor < math.inf:
            raise ValueError(f"length_factor is {self.length_factor}; it must be above 1 and finite.")
        if not 0 < self.max_kl < math.inf:
            raise ValueError(f"max_kl is {self.max_kl}; it must be above 0 and finite.")
        if not 0 <= self.max_equal_share <= 1:
            raise ValueError(f"max_equal_share is {self.max_equal_share}; it must lie in [0, 1].")


def new_state() -> State:
    """Of a run that has not begun; JSON-able, as every later one."""
    return {"recent": {}, "start": {}, "reward": {"sum": 0.0, "steps": 0}, "evaluations": [], "raised": {}}


def observe_step(state: State, step: int, figures: Mapping[str, float], config: AlarmConfig) -> tuple[State, list[str]]:
    """Look at a step.

    Args:
        step: its number.
        figures: those of reward_mean, length_mean, kl_mean and equal_reward_share that the step has; others are
            ignored.

    Returns:
        the new state, the old one being left as it was, and a line for each alarm.
    """
    state = copy.deepcopy(state)
    if "reward_mean" in figures:
        state["reward"]["sum"] += figures["reward_mean"]
        state["reward"]["steps"] += 1
    lines = []
    for name, judge in (("length_mean", _length), ("kl_mean", _kl), ("equal_reward_share", _equal)):
        if name not in figures:
            continue
        recent = state["recent"].setdefault(name, [])
        recent.append([step, float(figures[name])])
        del recent[: max(0, len(recent) - config.window)]
        if len(recent) == config.window:
            mean = math.fsum(value for _, value in recent) / len(recent)
            start = state["start"].setdefault(name, mean)
            seen = f"over steps {recent[0][0]} to {recent[-1][0]}"
            lines += _once(state, name, judge(mean, start, seen, config))
    return state, lines


def observe_evaluation(
    state: State, step: int, scores: Mapping[str, float], config: AlarmConfig
) -> tuple[State, list[str]]:
    """Look at an evaluation: the metric beside the mean reward of the steps since the last one.

    Args:
        step: how many steps have been made.
        scores: ``dev_*``; without ``config.metric`` among them, or with none set, nothing is judged.

    Returns:
        as ``observe_step``.
    """
    state = copy.deepcopy(state)
    if config.metric is None or config.metric not in scores:
        return state, []
    total, steps = state["reward"]["sum"], state["reward"]["steps"]
    state["reward"] = {"sum": 0.0, "steps": 0}
    reward = total / steps if steps else None
    state["evaluations"].append([step, float(scores[config.metric]), reward])
    found = state["evaluations"]
    if found[0][2] is None:
        found[0][2] = reward  # before the first step there is none; the first known one is its nearest
    best = max(range(len(found)), key=lambda index: (found[index][1], index))
    later = found[best + 1 :]
    state["evaluations"] = found = [found[best], *later[-config.evaluations :]]
    return state, _once(state, "held_out", _held_out(found, config))


def _once(state: State, name: str, line: str | None) -> list[str]:
    was_raised = state["raised"].get(name, False)
    state["raised"][name] = line is not None
    return [line] if line is not None and not was_raised else []


def _length(mean: float, start: float, seen: str, config: AlarmConfig) -> str | None:
    factor = config.length_factor
    if start / factor <= mean <= start * factor:
        return None
    longer = mean > start
    return (
        f"length drift: answers have {mean:.1f} tokens {seen}, {start:.1f} at the start of the run: "
        f"{'more than ' if longer else 'less than 1/'}{factor:g}{' times' if longer else ''} as many. "
        + (
            "The reward may be one for length: compare at matched length, raise the KL penalty or lower the limit."
            if longer
            else "The reward may be one for brevity, or answers end at once: look at samples.jsonl."
        )
    )


def _kl(mean: float, start: float, seen: str, config: AlarmConfig) -> str | None:
    if mean <= config.max_kl:
        return None
    return (
        f"KL blow-up: the policy is {mean:.1f} nats an answer away from the reference {seen}, more than "
        f"max_kl = {config.max_kl:g}. Lower the learning rate, raise the KL penalty, or go back to a checkpoint before."
    )


def _equal(mean: float, start: float, seen: str, config: AlarmConfig) -> str | None:
    if mean <= config.max_equal_share:
        return None
    return (
        f"equal rewards: {mean:.0%} of the prompts have samples of one reward only {seen}, more than "
        f"max_equal_share = {config.max_equal_share:g}; they teach nothing. Take prompts that are neither solved nor "
        "hopeless, more samples, a higher temperature, or a reward with more grades."
    )


def _held_out(found: list[list[Any]], config: AlarmConfig) -> str | None:
    best, later = found[0], found[1:]
    if len(later) < config.evaluations:
        return None
    step, score, reward = later[-1]
    if best[2] is None or reward is None or reward <= best[2]:
        return None
    return (
        f"reward up, {config.metric} down: from step {best[0]} to {step} the mean reward rose from {best[2]:.4g} to "
        f"{reward:.4g}, while {config.metric} fell from {best[1]:.4g} to {score:.4g}, below its best in the last "
        f"{len(later)} evaluations. The policy may be exploiting the reward: take the model of step {best[0]}, raise "
        "the KL penalty, or mend the reward."
    )
