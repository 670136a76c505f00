"""The compiled loop of stage one against the one in Python, its slow twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compiled_models import make

from esrl.kernels import kernels, operations, why_not
from esrl.models import compiled_decoder
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling import engine
from esrl.sampling.decoding import Decoding
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.types import Prompts, Rollouts, SamplingPlan

RECORDS = ("entropy", "max_prob")


@pytest.fixture
def policy(tokenizer) -> MarianPolicy:
    if kernels() is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    return make(tokenizer)


def both(
    sampler: EngineSampler, prompts: Prompts, plan: SamplingPlan, monkeypatch, records: tuple[str, ...] = RECORDS
) -> tuple[Rollouts, Rollouts]:
    """By the compiled loop, which leaves no step to Python, and by the twin."""
    with monkeypatch.context() as patched:
        patched.setattr(Decoding, "run", lambda self: pytest.fail("not the compiled loop"))
        fast = sampler.sample(prompts, plan, 0, records)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "decode", lambda *args: Decoding(*args).run())
        patched.setattr(compiled_decoder.CompiledDecoder, "sample", lambda *args: pytest.fail("not the twin"))
        slow = sampler.sample(prompts, plan, 0, records)
    return fast, slow


def assert_same(fast: Rollouts, slow: Rollouts) -> None:
    for name in ("tokens", "mask", "finished", "log_probs", "sampling_log_probs", "prompt_index", "sample_index"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    assert fast.texts == slow.texts and fast.records.keys() == slow.records.keys()
    for name, values in slow.records.items():
        assert torch.equal(fast.records[name], values), name


@pytest.mark.parametrize("temperature", ["one", "zero", "some of each"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_cache_tokens": 30 * 3, "max_logits": 400},
        {"max_length_ratio": 0.5, "max_prompt_tokens": 45},  # several encoded parts
    ],
)
def test_the_compiled_loop_draws_what_the_twin_does_to_the_bit(
    policy, prompts, uneven_plan, monkeypatch, temperature, settings
):
    """At every kind of temperature, few rows at a time and few logits, samples with limits of their own."""
    count = len(prompts)
    values = {"one": torch.ones(count), "zero": torch.zeros(count), "some of each": torch.arange(count) % 4 / 2}
    plan = replace(uneven_plan, temperature=values[temperature].double())
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=30, **settings), seed=5)
    fast, slow = both(sampler, prompts, plan, monkeypatch)
    assert_same(fast, slow)
    lengths = fast.mask.sum(1)
    if temperature != "zero" or settings.get("max_length_ratio"):  # the model's most probable token is never an end
        assert lengths.min() < lengths.max()  # rows have left at different steps


def test_any_end_token_ends_and_nothing_need_be_recorded(policy, prompts, uneven_plan, monkeypatch):
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=30), seed=5)
    alone, _ = both(sampler, prompts, uneven_plan, monkeypatch, ())
    often = int(alone.tokens[alone.mask].mode().values)
    policy.eos_tokens = (often, *policy.eos_tokens)
    fast, slow = both(sampler, prompts, uneven_plan, monkeypatch, ())
    assert_same(fast, slow)
    ends = fast.tokens[torch.arange(len(fast.mask)), fast.mask.sum(1) - 1]
    assert fast.finished.sum() > alone.finished.sum() and set(ends[fast.finished].tolist()) <= set(policy.eos_tokens)
    assert not bool((fast.tokens == often)[:, :-1][fast.mask[:, 1:]].any())  # nothing behind one


def test_the_same_operations_are_counted(policy, prompts, uneven_plan, monkeypatch):
    """But for rows that have ended and have not left yet, which the twin decodes along."""
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=30, compaction_share=0.0), seed=5)
    counts: list[int] = []
    monkeypatch.setattr(Decoding, "run", _counting(Decoding.run, counts))
    monkeypatch.setattr(engine, "decode", _counting(engine.decode, counts))
    both(sampler, prompts, uneven_plan, monkeypatch)
    compiled_before, compiled_after, twin_before, twin_after = counts
    assert compiled_after - compiled_before == twin_after - twin_before > 0


def _counting(run, counts: list[int]):
    def counted(*args):
        counts.append(operations())
        result = run(*args)
        counts.append(operations())
        return result

    return counted


def test_a_signal_waits_for_a_few_steps_alone(policy, prompts, make_plan, monkeypatch):
    """The compiled loop comes back to Python every few steps."""
    calls = []
    library = kernels().library
    sample = library.esrl_sample
    monkeypatch.setattr(library, "esrl_sample", lambda *args: calls.append(args[3]) or sample(*args))
    EngineSampler(policy, SamplingConfig(max_new_tokens=30, max_cache_tokens=30 * 2), seed=5).sample(
        prompts, make_plan([3] * len(prompts), 1.0)
    )
    assert len(calls) > 3 and set(calls) == {compiled_decoder._STEPS}


def test_no_memory_is_said(policy, prompts, uneven_plan, monkeypatch):
    monkeypatch.setattr(kernels().library, "esrl_sample", lambda *args: -1)
    with pytest.raises(MemoryError, match=r"sampling\.max_cache_tokens"):
        EngineSampler(policy, SamplingConfig(max_new_tokens=30), seed=5).sample(prompts, uneven_plan)
