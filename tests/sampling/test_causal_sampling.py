"""The engine on causal models: against ``generate``, the plain forward, itself in other batches, and the kept graph."""

from __future__ import annotations

import pytest
import torch
from causal_models import (
    FAMILIES,
    LENGTHS,
    PLAIN,
    POSITIONS,
    configs,
    kind_of,
    make_causal,
    make_ending,
    make_model,
    make_plain,
    make_prompts,
    plain_logits,
    tolerance,
)
from enumeration import LONGEST, assert_follow, enumerate_sequences, said

from esrl.models.causal import CausalPolicy
from esrl.models.causal_attention import CausalRows, CausalWaves
from esrl.models.causal_plain import PlainCausalPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.generate import generate_texts, generate_tokens, left_padded
from esrl.sampling.graph import sample_with_graph
from esrl.types import Prompts, Rollouts, SamplingPlan

# Gemma 2: where all is masked, Hugging Face adds the least float64, of which its softmax in float32 makes NaN
PADDABLE = [family for family in (*FAMILIES, *PLAIN) if family != "gemma2"]
COUNTS, HEAT = [5, 1, 0, 3, 8, 2], [1.0, 0.7, 1.0, 0.9, 1.2, 1.0]


def plan() -> SamplingPlan:
    return SamplingPlan(num_samples=torch.tensor(COUNTS), temperature=torch.tensor(HEAT, dtype=torch.float64))


def sampler(policy: CausalPolicy, **config: object) -> EngineSampler:
    return EngineSampler(policy, SamplingConfig(**{"max_new_tokens": 25, **config}), 11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [*FAMILIES, *PLAIN])
def test_what_is_recorded_is_the_plain_forwards(family, dtype, tokenizer):
    policy, prompts = make_ending(family, tokenizer, dtype), make_prompts(LENGTHS)
    rollouts = sampler(policy, compaction_share=0.0).sample(prompts, plan())
    assert rollouts.prompt_index.tolist() == [i for i, count in enumerate(COUNTS) for _ in range(count)]
    assert len(set(rollouts.lengths.tolist())) >= 5
    tau = plan().temperature[rollouts.prompt_index].to(dtype)
    with torch.no_grad():
        logits = plain_logits(policy.model, prompts, rollouts.prompt_index, rollouts.tokens)
    logits[..., policy.suppressed] = -torch.inf
    for heated, recorded in ((logits, rollouts.log_probs), (logits / tau[:, None, None], rollouts.sampling_log_probs)):
        expected = torch.log_softmax(heated, -1).gather(-1, rollouts.tokens[..., None])[..., 0]
        expected = torch.where(rollouts.mask, expected, 0.0)
        torch.testing.assert_close(recorded, expected, rtol=0, atol=tolerance(family, dtype))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float64) for family in PADDABLE] + [(family, torch.float32) for family in (*FAMILIES, *PLAIN)],
)
def test_greedy_equals_generate(family, dtype, tokenizer):
    """Prompt by prompt, and in one batch (padded on the left where that changes nothing): token for token."""
    prompts = make_prompts(LENGTHS)
    said = sampler(make_causal(family, tokenizer, dtype)).sample(prompts, SamplingPlan.greedy(len(prompts))).tokens
    model = make_model(family, dtype)
    model.generation_config.eos_token_id = [1, int(said[0, 3]), int(said[1, 9]), int(said[3, 6])]
    policy = kind_of(family)(model, tokenizer)
    rollouts = sampler(policy).sample(prompts, SamplingPlan.greedy(len(prompts)))
    together = generate_tokens(policy, prompts, 25, do_sample=False)
    lengths = rollouts.lengths.tolist()
    assert len(set(lengths)) >= 2
    for row, length in enumerate(lengths):
        alone = generate_tokens(policy, prompts.select([row]), 25, do_sample=False)[0]
        assert rollouts.tokens[row, :length].tolist() == alone.tolist() == together[row, :length].tolist()
        assert bool(rollouts.finished[row]) == (int(alone[-1]) in policy.eos_tokens)
    assert list(rollouts.texts) == generate_texts(policy, prompts, 25, 1, 1.0)


def by_id(rollouts: Rollouts, prompts: Prompts) -> dict[tuple[str, int], list[int]]:
    rows = zip(rollouts.prompt_index.tolist(), rollouts.sample_index.tolist(), range(rollouts.num_rows), strict=True)
    return {
        (prompts.example_ids[prompt], sample): rollouts.tokens[row, : int(rollouts.lengths[row])].tolist()
        for prompt, sample, row in rows
    }


@pytest.mark.parametrize("family", [*FAMILIES, *PLAIN])
def test_draws_do_not_depend_on_the_batch(family, tokenizer):
    """Prompts in another order, alone, in waves of a few rows, with and without compaction, encoded one by one."""
    policy, prompts = make_ending(family, tokenizer), make_prompts(LENGTHS)
    expected = by_id(sampler(policy).sample(prompts, plan()), prompts)
    for config in (
        {"compaction_share": 0.0},
        {"compaction_share": 1.0},
        {"max_cache_tokens": 75},
        {"max_cache_tokens": 400},  # 16 rows at a time: waves side by side
        {"max_prompt_tokens": 1},
    ):
        assert by_id(sampler(policy, **config).sample(prompts, plan()), prompts) == expected, config
    found: dict[tuple[str, int], list[int]] = {}
    for part in ([4], [5, 0], [3, 1, 2]):
        some = prompts.select(part)
        mine = SamplingPlan(num_samples=plan().num_samples[part], temperature=plan().temperature[part])
        found |= by_id(sampler(policy).sample(some, mine), some)
    assert found == expected


@pytest.mark.parametrize("cut", [{}, {"top_k": 30, "top_p": 0.9}])
@pytest.mark.parametrize("family", PADDABLE)
def test_the_conventional_way_draws_the_same(family, cut, tokenizer, gradients):
    """Hugging Face's own attention and cache with the graph kept: same tokens, log-probabilities and gradient."""
    policy, prompts = make_ending(family, tokenizer), make_prompts(LENGTHS)
    engine = sampler(policy, **cut)
    rollouts = engine.sample(prompts, plan())
    again, log_probs = sample_with_graph(policy, prompts, plan(), engine, 0)
    assert torch.equal(again.tokens, rollouts.tokens) and torch.equal(again.mask, rollouts.mask)
    torch.testing.assert_close(again.log_probs, rollouts.log_probs, rtol=0, atol=tolerance(family))
    torch.testing.assert_close(again.sampling_log_probs, rollouts.sampling_log_probs, rtol=0, atol=tolerance(family))
    assert log_probs.requires_grad
    found = gradients(policy.model, lambda: sample_with_graph(policy, prompts, plan(), engine, 0)[1].sum().backward())

    def plain() -> None:
        logits = plain_logits(policy.model, prompts, rollouts.prompt_index, rollouts.tokens)
        logits[..., policy.suppressed] = -torch.inf
        values = torch.log_softmax(logits, -1).gather(-1, rollouts.tokens[..., None])[..., 0]
        torch.where(rollouts.mask, values, 0.0).sum().backward()

    expected = gradients(policy.model, plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # RMSNorm goes through float32
        torch.testing.assert_close(found[name].to_dense(), value.to_dense(), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", [CausalPolicy, PlainCausalPolicy])
def test_an_answer_ends_where_the_models_positions_do(kind, tokenizer):
    """A prompt of n tokens has room for POSITIONS - n; the last token drawn is fed no more."""
    model = make_model("gpt2")
    model.generation_config.eos_token_id = 1
    policy, prompts = kind(model, tokenizer), make_prompts([POSITIONS - 3, 1, POSITIONS - 1])
    plan = SamplingPlan(num_samples=torch.tensor([4, 2, 4]), temperature=torch.ones(3, dtype=torch.float64))
    rollouts = sampler(policy, max_new_tokens=30).sample(prompts, plan)
    assert (
        rollouts.lengths[:4].max() == 3 and rollouts.lengths[4:6].max() > 3 and rollouts.lengths[6:].tolist() == [1] * 4
    )
    with pytest.raises(ValueError, match="leaves no room for an answer"):
        sampler(policy).sample(make_prompts([POSITIONS]), SamplingPlan.greedy(1))


def test_prompts_are_padded_on_the_left_for_hugging_face():
    prompts = make_prompts([3, 1])
    tokens, mask = left_padded(prompts, 9)
    first = prompts.input_ids
    assert tokens.tolist() == [first[0].tolist(), [9, 9, int(first[1, 0])]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]


def test_nothing_to_sample(tokenizer):
    policy, prompts = make_causal("llama", tokenizer), make_prompts([3, 1])
    nothing = SamplingPlan(num_samples=torch.tensor([0, 0]), temperature=torch.ones(2, dtype=torch.float64))
    assert sampler(policy).sample(prompts, nothing).num_rows == 0
    assert sample_with_graph(policy, prompts, nothing, sampler(policy), 0)[0].num_rows == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_shared_prompts_draw_what_plain_ones_do(family, tokenizer):
    prompts = make_prompts(LENGTHS)
    shared = sampler(make_causal(family, tokenizer)).sample(prompts, plan())
    alone = sampler(make_plain(family, tokenizer), max_cache_tokens=150).sample(prompts, plan())
    assert torch.equal(alone.tokens, shared.tokens) and torch.equal(alone.mask, shared.mask)
    torch.testing.assert_close(alone.log_probs, shared.log_probs, rtol=0, atol=1e-9)
    torch.testing.assert_close(alone.sampling_log_probs, shared.sampling_log_probs, rtol=0, atol=1e-9)


def test_length_ratio_by_hand(tokenizer):
    """A model that never ends is cut at ceil(1.5 * prompt tokens) + 10, at the overall limit, or where its positions
    end: all three occur."""
    model = make_model("phi")
    with torch.no_grad():
        model.lm_head.bias[1] = -1000
    policy, prompts = CausalPolicy(model, tokenizer), make_prompts([7, 1, 4, 12, 40, 2])
    two = SamplingPlan(num_samples=torch.full((6,), 2), temperature=torch.ones(6, dtype=torch.float64))
    rollouts = sampler(policy, max_length_ratio=1.5).sample(prompts, two)
    expected = [21, 12, 16, 25, POSITIONS - 40, 13]
    assert rollouts.lengths.tolist() == [length for length in expected for _ in range(2)]
    assert not bool(rollouts.finished.any())
    full = sampler(policy).sample(prompts, two)  # the cut changes nothing before it
    assert torch.equal(full.tokens * rollouts.mask, rollouts.tokens)


@pytest.mark.parametrize("rows", [10**6, 500])
@pytest.mark.parametrize(("family", "spread"), [("llama", 1.5), ("gpt2", 0.6), ("gemma3", 0.5)])
def test_drawn_frequencies_follow_the_enumerated_distribution(family, spread, rows, toy_vocabulary, monkeypatch):
    """Two prompts at two temperatures, 20,000 draws each, chi-square; all together, and 500 at a time, where most begin
    beside others that are further on. 66 sequences of at most 3 tokens: 3 ends, 3 x 3 ends, 9 x (3 ends or 3 others).
    """
    config = configs()[family]
    config.vocab_size = 7
    model = make_model(config)
    model.generation_config.eos_token_id = [1, 2, 3]
    with torch.no_grad():
        model.lm_head.weight *= spread  # no sequence is too rare to be seen
    policy = CausalPolicy(model, toy_vocabulary)
    mask = torch.tensor([[True] * 4, [True] + [False] * 3])
    prompts = Prompts(example_ids=("long", "short"), input_ids=torch.tensor([[3, 5, 4, 6], [5, 0, 0, 0]]), mask=mask)
    heat = [0.7, 1.1]
    plan = SamplingPlan(num_samples=torch.tensor([20_000] * 2), temperature=torch.tensor(heat, dtype=torch.float64))
    beside = []
    add = CausalWaves.add

    def watched(waves: CausalWaves, wave: CausalRows) -> None:
        beside.append(sum(other.cache.position > 0 for other in waves.waves))
        add(waves, wave)

    monkeypatch.setattr(CausalWaves, "add", watched)
    rollouts = sampler(policy, max_new_tokens=LONGEST, max_cache_tokens=rows * LONGEST).sample(prompts, plan)
    if rows == 500:
        assert sum(count > 0 for count in beside) > len(beside) / 2 > 40
    else:
        assert beside == [0]
    for prompt, tau in enumerate(heat):
        tokens = prompts.input_ids[prompt][mask[prompt]].tolist()

        def logits_after(prefix: tuple[int, ...], tokens: list[int] = tokens) -> torch.Tensor:
            return model(input_ids=torch.tensor([[*tokens, *prefix]]), use_cache=False).logits[0, -1]

        right, wrong = (enumerate_sequences(logits_after, 0, (1, 2, 3), each) for each in (tau, tau * 1.3))
        assert len(right) == 66
        assert_follow(said(rollouts, prompt), right, wrong)
