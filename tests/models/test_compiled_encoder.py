"""The compiled encoder against Hugging Face's, its slow twin."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from compiled_models import make, with_adapter
from torch import nn

from esrl.errors import NumericsError
from esrl.kernels import kernels, operations, why_not
from esrl.models import attention, seq2seq
from esrl.models.compiled_encoder import CompiledMarianEncoder
from esrl.models.policy import PromptState
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.types import Prompts


@pytest.fixture(autouse=True, params=["vectors", "tiles"])
def calls(request, monkeypatch) -> Iterator[list[int]]:
    """Short prompts are encoded by it, too; counts its calls, so that a test cannot pass by the slow way."""
    native, tiles = kernels(), request.param == "tiles"
    if native is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    if native.use_tiles(tiles) != tiles:
        pytest.skip("this processor has no matrix unit for bfloat16")
    counted: list[int] = []
    plain = CompiledMarianEncoder.__call__

    def counting(self: CompiledMarianEncoder, prompts: Prompts) -> PromptState:
        counted.append(len(prompts))
        return plain(self, prompts)

    monkeypatch.setattr(seq2seq, "_COMPILED_TOKENS", 1)
    monkeypatch.setattr(CompiledMarianEncoder, "__call__", counting)
    yield counted
    native.use_tiles(True)


@torch.no_grad()
def encode(policy: MarianPolicy, prompts: Prompts) -> PromptState:
    return policy.encode(prompts)


def exact(policy: MarianPolicy, prompts: Prompts) -> PromptState:
    """By Hugging Face's encoder in float64."""
    return encode(MarianPolicy(copy.deepcopy(policy.model).double(), policy.tokenizer), prompts)


def check_equal(found: PromptState, expected: PromptState, tolerance: float = 2e-5) -> None:
    assert torch.equal(found.mask, expected.mask)
    real = expected.mask[:, None, :, None]
    for own, other in zip(found.tensors, expected.tensors, strict=True):
        assert own.shape == other.shape and float(other.abs().max()) > 0.3
        torch.testing.assert_close(own.double(), other.masked_fill(~real, 0), rtol=0, atol=tolerance)


# heads of one, two, four and eight vectors of 16 numbers, twice as many of 8 where there is no AVX-512
@pytest.mark.parametrize(("width", "heads"), [(64, 4), (64, 2), (128, 2), (256, 2)])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_keys_and_values_are_the_twins(tokenizer, prompts, width, heads, activation, calls):
    policy = make(tokenizer, width, heads, activation=activation)
    found = encode(policy, prompts)
    assert calls == [len(prompts)] and not bool(prompts.mask.all())
    check_equal(found, exact(policy, prompts))
    assert len(calls) == 1


def batch(ids: torch.Tensor, mask: torch.Tensor) -> Prompts:
    return Prompts(example_ids=tuple(map(str, range(len(ids)))), input_ids=ids, mask=mask)


def long_prompts(lengths: list[int], vocabulary: int) -> Prompts:
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, vocabulary, mask.shape, generator=generator).masked_fill(~mask, 0)
    return batch(ids, mask)


def test_long_prompts_in_several_parts(tokenizer, calls):
    """Over 1,024 tokens; prompts with more queries than are scored at a time, and with 1."""
    policy = make(tokenizer, positions=700)
    prompts = long_prompts([700, 1, 300, 30, 24, 25, 48, 500], policy.vocabulary)
    check_equal(encode(policy, prompts), exact(policy, prompts))
    assert calls == [8]


def test_a_prompt_does_not_depend_on_the_others_to_the_bit(tokenizer):
    policy = make(tokenizer, positions=700)
    lengths = [700, 1, 300, 30, 24, 500]
    prompts = long_prompts(lengths, policy.vocabulary)
    together = encode(policy, prompts)
    for i, length in enumerate(lengths):
        alone = encode(policy, batch(prompts.input_ids[i : i + 1, :length], prompts.mask[i : i + 1, :length]))
        for own, other in zip(alone.tensors, together.tensors, strict=True):
            assert torch.equal(own[0], other[i, :, :length])


def test_padding_on_the_left(tokenizer):
    policy = make(tokenizer)
    right = long_prompts([9, 4], policy.vocabulary)
    ids, mask = right.input_ids.clone(), right.mask.clone()
    ids[1], mask[1] = ids[1].roll(3), mask[1].roll(3)
    left = batch(ids, mask)
    check_equal(encode(policy, left), exact(policy, left))


def test_samples_do_not_depend_on_the_batch_to_the_bit(tokenizer, prompts, make_plan, calls):
    """Ragged prompts, encoded together and in parts: with Hugging Face's encoder padding would make a difference."""
    policy = make(tokenizer)

    def draw(**config) -> tuple[torch.Tensor, torch.Tensor]:
        settings = SamplingConfig(max_new_tokens=30, **config)
        rollouts = EngineSampler(policy, settings, seed=5).sample(prompts, make_plan([4] * len(prompts), 1.0))
        return rollouts.tokens, rollouts.log_probs

    expected, found = draw(), draw(max_prompt_tokens=2 * prompts.mask.shape[1], max_cache_tokens=30 * 5)
    assert calls == [10, 2, 2, 2, 2, 2]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_adapters_count(tokenizer, prompts, calls):
    adapted = with_adapter(make(tokenizer))
    found = encode(adapted, prompts)
    assert calls
    check_equal(found, exact(adapted, prompts), 1e-4)
    plain = encode(make(tokenizer), prompts)
    assert float((found.keys[0] - plain.keys[0]).abs().max()) > 0.1


@pytest.mark.parametrize("change", ["gradient", "training", "float64", "gelu", "width", "bfloat16", "off", "short"])
def test_others_take_hugging_faces(tokenizer, prompts, change, calls, monkeypatch):
    policy = make(tokenizer, width=36 if change == "width" else 64)
    if change == "training":
        policy.set_dropout(0.1)
    if change == "float64":
        policy.model.double()
    if change == "gelu":
        for layer in policy.model.model.encoder.layers:
            layer.activation_fn = nn.GELU()
    if change == "bfloat16":
        policy.precision = "bfloat16"
    if change == "off":
        monkeypatch.setattr(attention, "kernels", lambda: None)
    if change == "short":
        monkeypatch.setattr(seq2seq, "_COMPILED_TOKENS", int(prompts.mask.sum()) + 1)
    with torch.set_grad_enabled(change == "gradient"):
        assert policy.encode(prompts).keys[0].requires_grad == (change == "gradient")
    native = kernels()
    assert native is not None
    assert bool(calls) == (change == "short" and native.tiles)  # without weights to be laid out short ones are worth it


@pytest.mark.parametrize("name", ["self_attn.q_proj", "fc2", "final_layer_norm"])
def test_weights_that_are_not_numbers_are_found(tokenizer, prompts, make_plan, name):
    policy = make(tokenizer)
    with torch.no_grad():
        policy.model.get_parameter(f"model.encoder.layers.0.{name}.weight").view(-1)[3] = torch.nan
    with pytest.raises(NumericsError, match="is nan"):
        EngineSampler(policy, SamplingConfig(max_new_tokens=30), seed=5).sample(prompts, make_plan([2] * 10, 1.0))


def test_operations_are_counted(tokenizer):
    policy = make(tokenizer, width=64, inner=72)
    prompts, before = long_prompts([7, 3], policy.vocabulary), operations()
    encode(policy, prompts)
    # a token: in each of two layers four 64 x 64 products and two 64 x 72 ones, and two 64 x 64 ones for each reader;
    # attention: scores and sums of every pair of a prompt's tokens, 64 wide
    token = 2 * (4 * 64 * 64 + 2 * 64 * 72) + 2 * 2 * 64 * 64
    assert operations() - before == 2 * (10 * token + 2 * 2 * 64 * (7 * 7 + 3 * 3))
