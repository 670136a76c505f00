"""What a step is made of: the parts of a method, and which of them do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.capability import CapabilityConfig
from esrl.algorithm.duplicates import DuplicateRule
from esrl.algorithm.objectives import ObjectiveConfig
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

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be 1 or more.")
        if self.duplicates not in ("merge", "keep", "drop"):
            raise ValueError(f"duplicates is {self.duplicates!r}; choose merge, keep or drop.")
        if self.max_source_tokens < 1 or self.logged_prompts < 0:
            raise ValueError("max_source_tokens must be 1 or more and logged_prompts 0 or more.")


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


def check_parts(method: Method, step: StepConfig, gradient: GradientConfig, weights: Sequence[float]) -> None:
    """Refuse parts that do not go together.

    Args:
        method: resolved.
        weights: of the reward functions.

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
    mapped = capability.capability_map != "identity" or capability.contrast != "none"
    if method.allocation.needs_capability and capability.estimator == "metric" and not mapped and min(weights) < 0:
        raise ValueError(
            f"reward.weights holds {min(weights)}, so that capabilities may be negative, and eq. 8 takes none; "
            'set capability.capability_map = "sigmoid_z" or "rank".'
        )
