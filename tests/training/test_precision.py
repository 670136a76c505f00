"""bfloat16 products over float32 weights: close to float32, and stage two scores what stage one has drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_models import LENGTHS, make_causal, make_prompts
from torch import Tensor

from esrl.models.adapters import LoraSettings, add_adapter
from esrl.models.frozen import linear_weight
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.graph import sample_with_graph
from esrl.training.critic import value_head
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.types import Prompts, Rollouts, SamplingPlan

# bfloat16 has 8 bits: logits of a few units are off by some hundredths
CLOSE = 0.1


def sampled(policy: Any, prompts: Prompts) -> Rollouts:
    plan = SamplingPlan(
        num_samples=torch.full((len(prompts),), 3), temperature=torch.ones(len(prompts), dtype=torch.float64)
    )
    return EngineSampler(policy, SamplingConfig(max_new_tokens=12), 5).sample(prompts, plan)


def gradient(policy: Any, prompts: Prompts, rollouts: Rollouts, **memory: Any) -> dict[str, Tensor]:
    coefficients = torch.where(rollouts.mask, torch.linspace(-1, 1, rollouts.num_rows)[:, None], 0.0)
    policy.model.zero_grad()
    StageTwo(policy, GradientConfig(**memory)).backward(prompts, rollouts, coefficients, None, 0)
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all parameters."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


@pytest.fixture(params=["marian", "llama", "qwen3", "gpt2", "gemma3"])
def case(request, make_policy, prompts, tokenizer) -> tuple[Any, Prompts]:
    if request.param == "marian":
        # not peaked: large random weights make of every rounding another distribution
        return make_policy(torch.float32, peaked=False), prompts
    return make_causal(request.param, tokenizer, torch.float32), make_prompts(LENGTHS)


def test_both_stages_agree_with_each_other_and_with_float32(case):
    policy, prompts = case
    exact = StageTwo(policy, GradientConfig())
    assert not exact.rescores
    policy.precision = "bfloat16"
    rollouts = sampled(policy, prompts)
    assert rollouts.log_probs.dtype == torch.float32 and int(rollouts.mask.sum()) > 50
    stage_two = StageTwo(policy, GradientConfig())
    assert stage_two.rescores
    again = stage_two.log_probs(prompts, rollouts, None, 0)
    assert float((again - rollouts.log_probs).abs().max()) < CLOSE
    policy.precision = "float32"
    wide = exact.log_probs(prompts, rollouts, None, 0)
    assert 1e-5 < float((again - wide).abs().max()) < 2 * CLOSE  # other products, the same model


def test_gradients_are_float32_and_close_however_the_rows_are_split(case):
    policy, prompts = case
    rollouts = sampled(policy, prompts)
    expected = gradient(policy, prompts, rollouts)
    policy.precision = "bfloat16"
    whole = gradient(policy, prompts, rollouts)
    parts = gradient(policy, prompts, rollouts, micro_batch_tokens=1, max_logits=1)
    assert all(value.dtype == torch.float32 for value in whole.values())
    assert 1e-5 < distance(whole, expected) < 0.05
    assert distance(parts, whole) < 0.02
    assert all(parameter.dtype == torch.float32 for parameter in policy.model.parameters())


def test_a_critics_values_are_float32s(case):
    policy, prompts = case
    critic = value_head(policy)
    torch.nn.init.constant_(critic.weight, 0.37)
    policy.precision = "bfloat16"
    rollouts = sampled(policy, prompts)
    _, values = StageTwo(policy, GradientConfig(), critic).scores(prompts, rollouts, None, 0)
    assert values is not None and values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_adapters_are_added_in_float32_before_stage_one_rounds_them(tokenizer):
    """Under autocast a product of the adapters would be bfloat16: here it is 1e-4 off."""
    policy, prompts = make_causal("llama", tokenizer, torch.float32), make_prompts(LENGTHS)
    adapted = add_adapter(policy, LoraSettings(rank=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05, generator=generator)
    layer = next(module for module in adapted.model.modules() if hasattr(module, "lora_A"))
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + layer.scaling["default"] * second @ first
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_weight(layer)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-7)
    coarse = layer.scaling["default"] * second.bfloat16() @ first.bfloat16()
    assert float((layer.base_layer.weight + coarse - expected).detach().abs().max()) > 1e-5
    adapted.precision = "bfloat16"
    rollouts = sampled(adapted, prompts)
    again = StageTwo(adapted, GradientConfig()).log_probs(prompts, rollouts, None, 0)
    assert float((again - rollouts.log_probs).abs().max()) < CLOSE


def test_the_conventional_step_scores_what_it_draws_in_the_same_precision(case):
    policy, prompts = case
    policy.precision = "bfloat16"
    plan = SamplingPlan(
        num_samples=torch.full((len(prompts),), 2), temperature=torch.ones(len(prompts), dtype=torch.float64)
    )
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=12), 5)
    rollouts, log_probs = sample_with_graph(policy, prompts, plan, sampler, 0)
    scored = StageTwo(policy, GradientConfig()).log_probs(prompts, rollouts, None, 0)
    assert float((scored - log_probs.detach()).abs().max()) < CLOSE
    log_probs.sum().backward()


def test_outside_nothing_is_cast(case):
    policy, prompts = case
    policy.precision = "bfloat16"
    sampled(policy, prompts)
    assert not torch.is_autocast_enabled("cpu")
    policy.precision = "float32"
    assert policy.encode(prompts).keys[0].dtype == torch.float32
