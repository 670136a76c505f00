"""The policy that the trained one is held close to: a frozen copy, or the same model with its adapters off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from esrl.models.policy import Policy
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.types import Prompts, Rollouts

Reference = Callable[[Prompts, Rollouts, Tensor | None], Tensor]
"""(R, T) log-probabilities of the samples, 0 outside the mask, without a graph; at (R,) temperatures, None for 1."""


def frozen_reference(policy: Policy, config: GradientConfig) -> Reference:
    """The policy as it is now, in a second copy of its weights; scored in stage two's micro-batches."""
    frozen = copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})
    frozen.model.requires_grad_(False)
    frozen.set_dropout(0.0)
    scorer = StageTwo(frozen, replace(config, kind="two_stage", dropout=0.0))

    def score(prompts: Prompts, rollouts: Rollouts, temperature: Tensor | None) -> Tensor:
        return scorer.log_probs(prompts, rollouts, temperature, 0)

    return score


def switched_reference(
    policy: Policy, config: GradientConfig, off: Callable[[], AbstractContextManager[object]]
) -> Reference:
    """The trained model itself while ``off()`` is entered, which takes its adapters away: no second copy."""
    scorer = StageTwo(policy, replace(config, kind="two_stage", dropout=0.0))

    def score(prompts: Prompts, rollouts: Rollouts, temperature: Tensor | None) -> Tensor:
        training = policy.model.training
        policy.model.eval()
        try:
            with off():
                return scorer.log_probs(prompts, rollouts, temperature, 0)
        finally:
            policy.model.train(training)

    return score
