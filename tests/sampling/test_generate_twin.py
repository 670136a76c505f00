"""Fast against slow: the engine, greedy, and Hugging Face's ``generate`` under the same rules."""

from __future__ import annotations

import copy

import pytest
import torch

from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.generate import generate_texts, generate_tokens
from esrl.types import Prompts, SamplingPlan


def assert_greedy_equals_generate(policy: MarianPolicy, prompts: Prompts, max_new_tokens: int) -> list[int]:
    """Token for token, PAD behind the end; returns the lengths."""
    config = SamplingConfig(max_new_tokens=max_new_tokens, compaction_share=0.0)
    rollouts = EngineSampler(policy, config, 0).sample(prompts, SamplingPlan.greedy(len(prompts)))
    theirs = generate_tokens(policy, prompts, max_new_tokens, do_sample=False, num_beams=1)
    assert theirs.shape[0] == rollouts.num_rows == len(prompts)
    lengths = rollouts.lengths.tolist()
    for row, length in enumerate(lengths):
        assert rollouts.tokens[row, :length].tolist() == theirs[row, :length].tolist(), row
        assert set(theirs[row, length:].tolist()) <= {policy.pad_token}, row
        assert bool(rollouts.finished[row]) == (int(theirs[row, length - 1]) in policy.eos_tokens)
    assert bool((rollouts.sampling_log_probs == 0).all())
    return lengths


@pytest.mark.parametrize("model", ["random64", "random32", "trained64", "trained32"])
@pytest.mark.parametrize("max_new_tokens", [1, 7, 38])
def test_greedy_equals_generate(model, max_new_tokens, prompts, request):
    """38 and the start token fill 39 of the model's 40 positions."""
    lengths = assert_greedy_equals_generate(request.getfixturevalue(model), prompts, max_new_tokens)
    if max_new_tokens == 38:
        assert len(set(lengths)) >= 3  # ragged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_never_end(make_policy, prompts, dtype):
    policy = make_policy(dtype, eos_bias=-1000.0)
    assert assert_greedy_equals_generate(policy, prompts, 30) == [30] * 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_that_wants_to_say_pad(make_policy, prompts, dtype):
    policy = make_policy(dtype)
    policy.model.final_logits_bias[0, policy.pad_token] += 60
    assert_greedy_equals_generate(policy, prompts, 30)


def changed(policy: MarianPolicy, **generation: object) -> MarianPolicy:
    """The same weights under another generation config."""
    model = copy.deepcopy(policy.model)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    return MarianPolicy(model, policy.tokenizer)


def often_said(policy: MarianPolicy, prompts: Prompts) -> int:
    tokens = generate_tokens(policy, prompts, 30, do_sample=False, num_beams=1)
    return int(torch.bincount(tokens[tokens > 2]).argmax())


@pytest.mark.parametrize("model", ["trained64", "trained32"])
def test_other_forbidden_words(model, prompts, request):
    """EOS among the bad words stays sayable, there and here."""
    policy = request.getfixturevalue(model)
    word = often_said(policy, prompts)
    forbidden = changed(policy, bad_words_ids=[[0], [word], [1]])
    lengths = assert_greedy_equals_generate(forbidden, prompts, 30)
    now = generate_tokens(forbidden, prompts, 30, do_sample=False, num_beams=1)
    assert word not in now and min(lengths) < 30


@pytest.mark.parametrize("model", ["trained64", "trained32"])
def test_several_end_tokens(model, prompts, request):
    policy = request.getfixturevalue(model)
    several = changed(policy, eos_token_id=[1, often_said(policy, prompts)])
    before = assert_greedy_equals_generate(policy, prompts, 30)
    after = assert_greedy_equals_generate(several, prompts, 30)
    assert sum(after) < sum(before)


@pytest.mark.parametrize("model", ["trained64", "trained32"])
def test_decoding_that_starts_with_the_end_token(model, prompts, request):
    """As in BART: the start token is EOS, and it ends nothing."""
    policy = request.getfixturevalue(model)
    started = changed(policy, decoder_start_token_id=1)
    assert started.start_token in started.eos_tokens
    lengths = assert_greedy_equals_generate(started, prompts, 30)
    assert max(lengths) > 1
    before = generate_tokens(policy, prompts, 30, do_sample=False, num_beams=1)
    now = generate_tokens(started, prompts, 30, do_sample=False, num_beams=1)
    assert before.shape != now.shape or not torch.equal(before, now)  # the start token matters


def test_generate_returns_texts_for_beams(trained64, prompts):
    """The prompts learnt by heart come out as they were learnt, with one beam as with four."""
    for beams in (1, 4):
        texts = generate_texts(trained64, prompts, 30, beams, 1.0)
        assert len(texts) == 10
        assert texts[0] == "A dog runs across the meadow."
        assert texts[7] == "A boy throws the ball."
    greedy = EngineSampler(trained64, SamplingConfig(max_new_tokens=30), 0).sample(prompts, SamplingPlan.greedy(10))
    assert list(greedy.texts) == generate_texts(trained64, prompts, 30, 1, 1.0)


def test_twelve_beams_sum_higher_than_greedy(trained64, prompts):
    """With length penalty 0 a beam is ranked by its summed log-probability; greedy looks no further than a step."""

    def score(beams: int) -> torch.Tensor:
        options = {"length_penalty": 0.0} if beams > 1 else {}
        tokens = generate_tokens(trained64, prompts, 38, do_sample=False, num_beams=beams, **options)
        ends = tokens == trained64.eos_tokens[0]
        real = ends.cumsum(1) - ends.long() == 0  # up to the first EOS
        start = torch.full_like(tokens[:, :1], trained64.start_token)
        with torch.no_grad():
            inputs = torch.cat([start, tokens[:, :-1]], 1)
            hidden = trained64.hidden_states(trained64.encode(prompts), torch.arange(10), inputs)
            log_probs = torch.log_softmax(trained64.projection().logits(hidden), -1)
        return torch.where(real, log_probs.gather(-1, tokens[..., None])[..., 0], 0.0).sum(1)

    greedy, beam = score(1), score(12)
    assert bool((beam >= greedy - 1e-9).all())
    assert bool((beam > greedy + 1).any())
