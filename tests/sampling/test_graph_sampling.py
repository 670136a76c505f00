"""The conventional way of sampling draws what the engine draws, with a graph."""

from __future__ import annotations

import pytest
import torch

from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.graph import sample_with_graph


@pytest.mark.parametrize("ratio", [None, 0.4])
@pytest.mark.parametrize("model", ["random64", "trained64"])
def test_same_samples_as_the_engine(model, ratio, prompts, uneven_plan, request):
    policy = request.getfixturevalue(model)
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=20, max_length_ratio=ratio), 3)
    expected = sampler.sample(prompts, uneven_plan, 2)
    found, at_one = sample_with_graph(policy, prompts, uneven_plan, sampler, 2)
    assert not bool(expected.finished.all())  # some are cut at the limit, and are not finished here either
    for name in ("prompt_index", "sample_index", "tokens", "mask", "finished"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.texts == expected.texts
    for name in ("log_probs", "sampling_log_probs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-10)
    assert at_one.requires_grad
    torch.testing.assert_close(at_one.detach(), expected.log_probs, rtol=0, atol=1e-10)
    _, at_tau = sample_with_graph(policy, prompts, uneven_plan, sampler, 2, at_sampling_temperature=True)
    torch.testing.assert_close(at_tau.detach(), expected.sampling_log_probs, rtol=0, atol=1e-10)


def test_a_step_without_a_single_sample(random64, prompts, make_plan):
    """One of several processes may get only prompts that the plan leaves out."""
    sampler = EngineSampler(random64, SamplingConfig(max_new_tokens=6), 3)
    rollouts, log_probs = sample_with_graph(random64, prompts, make_plan([0] * 10, 1.0), sampler, 0)
    assert rollouts.num_rows == 0 and rollouts.texts == () and log_probs.shape[0] == 0
