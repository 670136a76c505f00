"""Stage two on causal models: whatever the micro-batches, the gradient of the plain forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_models import (
    FAMILIES,
    LENGTHS,
    PLAIN,
    make_causal,
    make_plain,
    make_prompts,
    norms_in_float64,
    plain_logits,
    tolerance,
)

from esrl.models.adapters import LoraSettings, add_adapter
from esrl.models.causal import CausalPolicy
from esrl.models.causal_plain import PlainCausalPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.types import Prompts, Rollouts, SamplingPlan

MEMORY = [
    {"micro_batch_tokens": 1},
    {"micro_batch_tokens": 40, "max_prompt_tokens": 13, "max_logits": 700},
    {"micro_batch_tokens": 10**9, "max_prompt_tokens": 10**9},
]


def sampled(policy: CausalPolicy) -> tuple[Prompts, Rollouts, torch.Tensor]:
    """Ragged groups (one prompt without samples, two with one) and a coefficient for each token."""
    prompts = make_prompts(LENGTHS)
    plan = SamplingPlan(num_samples=torch.tensor([4, 1, 0, 3, 6, 1]), temperature=torch.ones(6, dtype=torch.float64))
    rollouts = EngineSampler(policy, SamplingConfig(max_new_tokens=12), 5).sample(prompts, plan)
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(rollouts.tokens.shape, generator=generator, dtype=torch.float64) * rollouts.mask
    return prompts, rollouts, coefficients


def assert_the_plain_gradient(policy: CausalPolicy, gradients: Any, limit: float = 1e-9) -> None:
    norms_in_float64(policy.model)
    prompts, rollouts, coefficients = sampled(policy)

    def plain() -> None:
        logits = plain_logits(policy.model, prompts, rollouts.prompt_index, rollouts.tokens)
        suppressed = torch.zeros(policy.vocabulary, dtype=torch.bool)
        suppressed[policy.suppressed] = True
        log_probs = torch.log_softmax(logits.masked_fill(suppressed, -torch.inf), -1)
        chosen = torch.where(rollouts.mask, log_probs.gather(-1, rollouts.tokens[..., None])[..., 0], 0.0)
        (coefficients * chosen).sum().backward()

    expected = gradients(policy.model, plain)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    for memory in MEMORY:
        stage_two = StageTwo(policy, GradientConfig(**memory))
        log_probs = stage_two.log_probs(prompts, rollouts, None, 0)
        torch.testing.assert_close(log_probs, rollouts.log_probs, rtol=0, atol=limit)
        found = gradients(
            policy.model, lambda stage_two=stage_two: stage_two.backward(prompts, rollouts, coefficients, None, 0)
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].to_dense(), value, rtol=limit, atol=limit, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_give_the_gradient_of_the_plain_forward(family, tokenizer, gradients):
    assert_the_plain_gradient(make_causal(family, tokenizer), gradients, tolerance(family))


@pytest.mark.parametrize("target_modules", [(), ("o_proj",), ("k_proj",)])
def test_the_gradient_of_adapters(target_modules, tokenizer, gradients):
    """Where only some layers have adapters, some of the prompts' keys and values need no gradient."""
    policy = add_adapter(make_causal("llama", tokenizer), LoraSettings(rank=2, target_modules=target_modules))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    assert_the_plain_gradient(policy, gradients)


@pytest.mark.parametrize("family", ["llama", "gpt2", *PLAIN])
def test_prompts_that_are_not_shared_give_it_too(family, tokenizer, gradients):
    assert_the_plain_gradient(make_plain(family, tokenizer), gradients, tolerance(family))


@pytest.mark.parametrize(("family", "module"), [("mamba", "in_proj"), ("gpt_oss", "v_proj")])
def test_adapters_where_prompts_are_not_shared(family, module, tokenizer, gradients):
    policy = add_adapter(make_plain(family, tokenizer), LoraSettings(rank=2, target_modules=(module,)))
    assert type(policy) is PlainCausalPolicy
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    assert_the_plain_gradient(policy, gradients, tolerance(family))
