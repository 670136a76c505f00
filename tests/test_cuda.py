"""What holds on the CPU holds on CUDA; skipped where there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from esrl.algorithm.groups import Groups
from esrl.algorithm.objectives import ObjectiveConfig, RewardedSamples, coefficients, objective_loss
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.graph import sample_with_graph
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.types import Prompts, Rollouts, SamplingPlan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 24


@pytest.fixture
def policies(random64: MarianPolicy) -> tuple[MarianPolicy, MarianPolicy]:
    """The same weights on the CPU and on CUDA."""
    here, there = copy.deepcopy(random64), copy.deepcopy(random64)
    there.model.cuda()
    return here, there


def sampler(policy: MarianPolicy, **config: Any) -> EngineSampler:
    return EngineSampler(policy, SamplingConfig(max_new_tokens=STEPS, **config), seed=3)


def rewarded(rollouts: Rollouts, plan: SamplingPlan) -> RewardedSamples:
    rows = rollouts.num_rows
    return RewardedSamples(
        mask=rollouts.mask.cpu(),
        groups=Groups(rollouts.prompt_index, len(plan.num_samples)),
        counts=torch.ones(rows, dtype=torch.int64),
        rewards=torch.linspace(0, 1, rows, dtype=torch.float64),
        baseline=torch.full((rows,), 0.4, dtype=torch.float64),
        sampling_log_probs=rollouts.sampling_log_probs.cpu(),
        planned=plan.num_samples,
    )


@pytest.mark.parametrize("config", [{}, {"max_cache_tokens": 16 * STEPS}, {"top_p": 0.9, "top_k": 50}])
def test_the_draws_are_the_same(policies, prompts: Prompts, uneven_plan: SamplingPlan, config):
    """All rows at once, waves side by side, a part of the vocabulary."""
    here, there = (sampler(policy, **config).sample(prompts, uneven_plan, records=("entropy",)) for policy in policies)
    assert torch.equal(there.tokens.cpu(), here.tokens)
    assert torch.equal(there.mask.cpu(), here.mask)
    assert there.texts == here.texts
    torch.testing.assert_close(there.log_probs.cpu(), here.log_probs, rtol=0, atol=1e-10)
    torch.testing.assert_close(there.records["entropy"].cpu(), here.records["entropy"], rtol=0, atol=1e-10)


def test_both_kinds_of_gradient_are_the_same(policies, prompts: Prompts, uneven_plan: SamplingPlan):
    objective = ObjectiveConfig(kind="fused")
    found = []
    for policy in policies:
        rollouts = sampler(policy).sample(prompts, uneven_plan)
        _, weights = coefficients(rollouts.log_probs.cpu(), rewarded(rollouts, uneven_plan), objective)
        StageTwo(policy, GradientConfig(micro_batch_tokens=60)).backward(prompts, rollouts, weights, None, 0)
        found.append([p.grad.cpu() for p in policy.model.parameters() if p.grad is not None])
        policy.model.zero_grad(set_to_none=True)
        rollouts, graph = sample_with_graph(policy, prompts, uneven_plan, sampler(policy), 0)
        objective_loss(graph.cpu(), rewarded(rollouts, uneven_plan), objective).backward()
        found.append([p.grad.cpu() for p in policy.model.parameters() if p.grad is not None])
        policy.model.zero_grad(set_to_none=True)
    for other in found[1:]:
        for expected, gradient in zip(found[0], other, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_half_precision_scores_what_it_sampled(random64: MarianPolicy, prompts: Prompts, uneven_plan: SamplingPlan):
    """bfloat16 keeps 8 bits of the mantissa: sums of a few dozen products differ by some per cent, no more."""
    policy = copy.deepcopy(random64)
    policy.model.cuda().to(torch.bfloat16)
    rollouts = sampler(policy).sample(prompts, uneven_plan)
    assert rollouts.log_probs.dtype == torch.float32
    again = StageTwo(policy, GradientConfig(micro_batch_tokens=60)).log_probs(prompts, rollouts, None, 0)
    assert float((again - rollouts.log_probs).abs().mean()) < 0.05
