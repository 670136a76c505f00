"""A policy's products in the compiled kernels and in oneDNN: those of PyTorch, gradients too, for both families."""

from __future__ import annotations

import pytest
import torch
from causal_models import LENGTHS, make_causal, make_ending, make_prompts

from esrl.algorithm import products
from esrl.kernels import kernels, why_not
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.training.gradient import GradientConfig, StageTwo


@pytest.fixture(autouse=True)
def _on_any_processor(monkeypatch):
    """Also where MKL is the faster one."""
    monkeypatch.setattr(products, "faster_here", lambda: True)
    yield
    if (native := kernels()) is not None:
        native.use_tiles(True)


@pytest.mark.parametrize("way", ["vectors", "tiles", "onednn"])
@pytest.mark.parametrize("family", ["marian", "llama", "gemma2", "qwen2"])
def test_stage_two_is_the_same_by_each_way(
    family, way, tokenizer, make_policy, prompts, make_plan, gradients, monkeypatch
):
    if way == "onednn":
        monkeypatch.setattr(products, "kernels", lambda: None)
    elif (native := kernels()) is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    elif native.use_tiles(way == "tiles") != (way == "tiles"):
        pytest.skip("this processor has no matrix unit for bfloat16")
    if family == "marian":
        policy = make_policy(torch.float32, layers=2)
    else:
        policy, prompts = make_ending(family, tokenizer, torch.float32), make_prompts(LENGTHS)
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=9), seed=1)
    rollouts = sampler.sample(prompts, make_plan([3] * len(prompts), 1.0))
    weights = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(2)) * rollouts.mask
    stage_two = StageTwo(policy, GradientConfig())
    shapes = set()
    plain = products._product

    def counting(hidden, weight, bias, *, transposed=False, room=None):
        shapes.add(tuple(weight.shape)[:: -1 if transposed else 1])
        return plain(hidden, weight, bias, transposed=transposed, room=room)

    monkeypatch.setattr(products, "_product", counting)

    def work() -> None:
        stage_two.backward(prompts, rollouts, weights, None, 0)

    with monkeypatch.context() as plainly:
        plainly.setattr(products, "faster_here", lambda: False)
        plainly.setattr(products, "other_layers", lambda: False)  # PyTorch's own gradients, too
        scores = stage_two.log_probs(prompts, rollouts, None, 0)
        expected = gradients(policy.model, work)
    assert not shapes
    monkeypatch.setattr(products, "MIN_WEIGHTS", 1)
    torch.testing.assert_close(stage_two.log_probs(prompts, rollouts, None, 0), scores, rtol=0, atol=1e-4)
    found = gradients(policy.model, work)
    # every linear layer has been through it, there and back
    layers = {tuple(p.shape) for name, p in policy.model.named_parameters() if name.endswith("proj.weight")}
    assert layers and layers <= shapes and {shape[::-1] for shape in layers} <= shapes
    assert tuple(policy.projection().weight.shape) in shapes
    assert found.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-1
    if way != "tiles":
        for name, value in expected.items():
            torch.testing.assert_close(found[name].to_dense(), value.to_dense(), rtol=1e-3, atol=1e-3, msg=name)
        return
    # sums in another order than PyTorch's, which is itself as far from float64
    with monkeypatch.context() as plainly:
        plainly.setattr(products, "faster_here", lambda: False)
        plainly.setattr(products, "other_layers", lambda: False)
        policy.model.double()
        exact = gradients(policy.model, work)
    for name, value in exact.items():
        errors = [float((side[name].to_dense() - value.to_dense()).abs().max()) for side in (found, expected)]
        assert errors[0] <= 5 * errors[1] + 1e-5 * (1 + float(value.to_dense().abs().max())), name


def test_afterwards_linear_layers_are_pytorchs_again(tokenizer, monkeypatch):
    policy = make_causal("llama", tokenizer, torch.float32)
    monkeypatch.setattr(products, "MIN_WEIGHTS", 1)
    policy.encode(make_prompts(LENGTHS))
    monkeypatch.setattr(products, "_product", None)  # would fail
    policy.model(input_ids=torch.ones(1, 3, dtype=torch.int64))
