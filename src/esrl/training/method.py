"""What a step is made of: the parts of a method, and which of them do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.capability import CapabilityConfig
from esrl.algorithm.duplicates import DuplicateRule
from esrl.algorithm.objectives import ObjectiveConfig
from esrl.data.stops import check_stops
from esrl.training.gradient import GradientConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """One step of reinforcement learning, but for what the parts say of themselves."""

    batch_size: int = 64
    """n: prompts in a step, over all processes."""
    duplicates: DuplicateRule = "merge"
    """Identical samples of a prompt: `merge` (scored once, counted), `keep` or `drop`."""
    max_source_tokens: int = 256
    """Longer sources are left out, counted and reported."""
    logged_prompts: int = 20
    """samples.jsonl follows this many prompts through all epochs."""
    updates_per_batch: int = 1
    """Passes over a batch of samples before the next is drawn; each ends in an optimizer update, or in several."""
    minibatches: int = 1
    """Parts of a pass, each with an optimizer update of its own. A step of `max_steps` is one such update."""
    minibatch_of: Literal["prompts", "samples"] = "prompts"
    """Whether a pass is split by prompts, with all their samples, or by samples."""
    stop_strings: tuple[str, ...] = ()
    """An answer also ends with the token that completes one of these texts, which are no part of it; on the
    development set, too, unless `development.decoding` has stop strings of its own. It is sampled on to its end token,
    so its time is not saved."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be 1 or more.")
        if self.duplicates not in ("merge", "keep", "drop"):
            raise ValueError(f"duplicates is {self.duplicates!r}; choose merge, keep or drop.")
        if self.max_source_tokens < 1 or self.logged_prompts < 0:
            raise ValueError("max_source_tokens must be 1 or more and logged_prompts 0 or more.")
        for name in ("updates_per_batch", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.minibatch_of not in ("prompts", "samples"):
            raise ValueError(f"minibatch_of is {self.minibatch_of!r}; choose prompts or samples.")
        check_stops(self.stop_strings)

    @property
    def num_updates(self) -> int:
        """Optimizer updates from one batch of samples."""
        return self.updates_per_batch * self.minibatches


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method is a plan, an objective and a baseline put together (principle 4)."""

    allocation: AllocationConfig
    capability: CapabilityConfig
    objective: ObjectiveConfig
    baseline: BaselineConfig

    def resolved(self) -> Method:
        """ESRL-Random is an allocator: there is no capability to estimate."""
        if self.capability.estimator != "random":
            return self
        return replace(self, allocation=replace(self.allocation, allocator="random"))


def check_parts(
    method: Method, step: StepConfig, gradient: GradientConfig, names: Sequence[str], weights: Sequence[float]
) -> None:
    """Refuse parts that do not go together.

    Args:
        method: resolved.
        names: of the reward functions.
        weights: theirs.

    Raises:
        ValueError: it names the two settings and the remedy.
    """
    capability = method.capability
    if gradient.kind == "graph" and capability.records:
        raise ValueError(
            f'gradient kind "graph" does not record what entropy_form {capability.entropy_form!r} needs; '
            'use kind "two_stage", or entropy_form "paper" or "sampled_logp".'
        )
    if gradient.kind == "graph" and step.duplicates == "drop":
        raise ValueError(
            'gradient kind "graph" scores every sample it has drawn, so duplicates cannot be "drop"; '
            'use kind "two_stage", or duplicates "merge".'
        )
    if gradient.kind == "graph" and step.stop_strings:
        raise ValueError(
            'gradient kind "graph" scores every token it has drawn, so stop_strings cannot end a sample; '
            'use kind "two_stage", or leave stop_strings out.'
        )
    _check_updates(method.objective, step, gradient)
    _check_baseline(method)
    _check_capability(method, names, weights)


def _check_updates(objective: ObjectiveConfig, step: StepConfig, gradient: GradientConfig) -> None:
    if step.num_updates == 1:
        return
    several = f"updates_per_batch is {step.updates_per_batch} and minibatches {step.minibatches}"
    if gradient.kind == "graph":
        raise ValueError(
            f'{several}, but gradient kind "graph" has the graph of one update; use kind "two_stage", or one update.'
        )
    if gradient.dropout:
        raise ValueError(
            f"{several}, and gradient.dropout is {gradient.dropout}: ratios to the sampling policy would be those of "
            "dropout masks. Set dropout to 0, or take one update."
        )
    if not objective.is_clipped and not objective.importance_weights:
        raise ValueError(
            f"{several}, but objective {objective.kind!r} takes samples for the policy's own, which they are not after "
            "the first update; set objective.importance_weights, use grpo, rloo or ppo, or take one update."
        )
    if not objective.is_clipped and step.minibatches > 1 and step.minibatch_of == "samples":
        raise ValueError(
            f'minibatch_of is "samples", but objective {objective.kind!r} couples the samples of a prompt; '
            'use "prompts".'
        )


def _check_capability(method: Method, names: Sequence[str], weights: Sequence[float]) -> None:
    """Eq. 8 takes no negative capability."""
    config = method.capability
    mapped = config.mapping != "identity" or config.contrast != "none"
    if mapped or not method.allocation.needs_capability or config.estimator not in ("metric", "reward"):
        return
    if config.estimator == "metric" and "model" in names:
        raise ValueError(
            'reward.names holds "model", whose scores may be negative, and eq. 8 takes no negative capability; set '
            'capability.estimator = "reward", or capability.capability_map = "sigmoid_z" or "rank".'
        )
    if min(weights) < 0:
        raise ValueError(
            f"reward.weights holds {min(weights)}, so that capabilities may be negative, and eq. 8 takes none; "
            'set capability.capability_map = "sigmoid_z" or "rank".'
        )


def _check_baseline(method: Method) -> None:
    """GRPO and RLOO are what their baseline makes them; PPO has its critic."""
    needed = {"grpo": "prompt_mean", "rloo": "leave_one_out", "ppo": "none"}.get(method.objective.kind)
    if needed is not None and method.baseline.kind != needed:
        raise ValueError(
            f"objective {method.objective.kind!r} needs baseline.kind {needed!r}, but it is {method.baseline.kind!r}; "
            f"method = {method.objective.kind!r} sets both."
        )
