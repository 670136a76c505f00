"""Where answers end: a conversation's end of turn, stop strings, and a step of a causal model made with both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from language_helpers import causal_model, examples, tokenizer
from tokenizer_helpers import CHATML

from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.capability import CapabilityConfig
from esrl.algorithm.objectives import ObjectiveConfig
from esrl.data.encoding import Encoder, PromptConfig, make_causal_prompts
from esrl.evaluation.decode import DecodingConfig
from esrl.evaluation.development import Development
from esrl.models.causal import CausalPolicy
from esrl.rewards.calling import RewardConfig, build_reward
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.stops import cut_at_stops
from esrl.training.ends import take_ends
from esrl.training.gradient import GradientConfig
from esrl.training.method import Method, StepConfig
from esrl.training.rl import RLTask
from esrl.types import Prompts, Rollouts, SamplingPlan

EOS, PAD, END_OF_TURN = 0, 1, 3  # of the byte-level tokenizer


def parts(**options: Any) -> tuple[CausalPolicy, Encoder]:
    policy = CausalPolicy(causal_model(), tokenizer(chat=CHATML, **options))
    return policy, Encoder(policy.tokenizer, PromptConfig(as_chat=True))


def sampled(policy: CausalPolicy, prompts: Prompts) -> Rollouts:
    number = len(prompts)
    plan = SamplingPlan(num_samples=torch.full((number,), 4), temperature=torch.full((number,), 0.8).double())
    return EngineSampler(policy, SamplingConfig(max_new_tokens=12), 1).sample(prompts, plan, 0, ("entropy",))


def row_of(rollouts: Rollouts, row: int) -> list[int]:
    return rollouts.tokens[row][rollouts.mask[row]].tolist()


def text_of(policy: CausalPolicy, ids: list[int]) -> str:
    return policy.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def frequent(texts: Sequence[str]) -> str:
    """The most frequent letter; random bytes make little else that is text."""
    letters = [letter for text in texts for letter in text[1:] if letter.isascii() and letter.isalpha()]
    return Counter(letters).most_common(1)[0][0]


def make_task(policy: Any, encoder: Encoder | None, *, gradient: Any = None, **step: Any) -> RLTask:
    return RLTask(
        policy,
        examples(),
        Method(
            allocation=AllocationConfig(max_samples=4),
            capability=CapabilityConfig(),
            objective=ObjectiveConfig(kl_coefficient=0.1),
            baseline=BaselineConfig(),
        ),
        StepConfig(batch_size=8, **step),
        SamplingConfig(max_new_tokens=12),
        gradient or GradientConfig(micro_batch_tokens=40),
        build_reward(RewardConfig(names=("chrf",))),
        Development([], (), DecodingConfig()),
        seed=3,
        encoder=encoder,
    )


def test_the_end_of_turn_ends_samples_beam_search_and_the_exported_model():
    policy, encoder = parts()
    assert (policy.eos_tokens, policy.suppressed) == ((EOS,), [PAD])
    take_ends(policy, encoder)
    assert (policy.eos_tokens, policy.suppressed) == ((EOS, END_OF_TURN), [PAD])
    assert policy.model.generation_config.eos_token_id == [EOS, END_OF_TURN]


def test_an_end_token_that_stands_for_padding_is_no_longer_suppressed():
    model = causal_model()
    model.generation_config.eos_token_id = [2]
    policy = CausalPolicy(model, tokenizer(chat=CHATML, pad=False))  # so that PAD is EOS, 0, and 2 the end of turn
    assert (policy.eos_tokens, policy.suppressed) == ((2,), [EOS])
    take_ends(policy, Encoder(policy.tokenizer, PromptConfig()))
    assert (policy.eos_tokens, policy.suppressed) == ((2, EOS), [])


def test_each_family_of_models_has_its_way_to_prompts(random64):
    policy, encoder = parts()
    with pytest.raises(ValueError, match=r"encoder is None, but a causal model's prompts need one"):
        make_task(policy, None)
    with pytest.raises(ValueError, match="leave encoder out"):
        make_task(random64, encoder)


def test_samples_end_with_an_added_end_token():
    """The same draws as without it, up to the first such token; the most frequent one is taken."""
    policy, encoder = parts()
    prompts = make_causal_prompts(examples(), encoder)
    before = sampled(policy, prompts)
    end = encoder.chat_end_token = int(before.tokens[before.mask].mode().values)
    take_ends(policy, encoder)
    after = sampled(policy, prompts)
    cut = 0
    for row in range(before.num_rows):
        drawn = row_of(before, row)
        expected = drawn[: drawn.index(end) + 1] if end in drawn else drawn
        assert row_of(after, row) == expected
        assert bool(after.finished[row]) == (expected[-1] in (EOS, end))
        cut += len(expected) < len(drawn)
    assert cut > 0


def test_stop_strings_cut_samples():
    """Against a walk over each sample's beginnings; the most frequent letter is the stop string."""
    policy, encoder = parts()
    rollouts = sampled(policy, make_causal_prompts(examples(), encoder))
    stop = frequent(rollouts.texts)
    found = cut_at_stops(rollouts, policy.tokenizer, (stop,))
    cut = 0
    for row in range(rollouts.num_rows):
        ids = row_of(rollouts, row)
        lengths = [n for n in range(1, len(ids) + 1) if stop in text_of(policy, ids[:n])]
        expected = ids[: lengths[0]] if lengths else ids
        assert row_of(found, row) == expected
        assert found.texts[row] == text_of(policy, expected).partition(stop)[0]
        assert bool(found.finished[row]) == (bool(lengths) or bool(rollouts.finished[row]))
        cut += len(expected) < len(ids)
    assert cut > 0
    for name in ("tokens", "log_probs", "sampling_log_probs"):
        old, new = getattr(rollouts, name), getattr(found, name)
        assert torch.equal(new[found.mask], old[found.mask]) and not bool(new[~found.mask].any())
        assert new.dtype == old.dtype
    assert not bool(found.records["entropy"][~found.mask].any()) and bool(found.records["entropy"].any())
    assert cut_at_stops(rollouts, policy.tokenizer, ()) is rollouts


def test_a_causal_models_step():
    """Its prompts are the encoder's; a first step's policy is its reference; samples and first estimates are cut."""
    policy, encoder = parts()
    texts = sampled(policy, make_causal_prompts(examples(), encoder)).texts
    stop = frequent(texts)
    task = make_task(policy, encoder, stop_strings=(stop,))
    assert policy.eos_tokens == (EOS, END_OF_TURN)
    prompts = task.prompts(0, 0)
    by_id = {example.id: example for example in examples()}
    expected = make_causal_prompts([by_id[i] for i in prompts.example_ids], encoder)
    assert torch.equal(prompts.input_ids, expected.input_ids) and torch.equal(prompts.mask, expected.mask)
    for epoch in (0, 1):
        task.model.zero_grad(set_to_none=True)
        update = task.compute(epoch, 0)
        lines = update.commit()
        answers = [sample["text"] for line in lines for sample in line["samples"]]
        assert answers and not any(stop in text for text in answers)
        assert math.isfinite(update.loss) and update.metrics["truncated_share"] < 1
        assert update.metrics["kl_mean"] == pytest.approx(0, abs=1e-4)  # nothing has stepped
        assert any(bool(p.grad.abs().sum() > 0) for p in task.model.parameters() if p.grad is not None)


def test_what_stop_strings_do_not_go_with():
    policy, encoder = parts()
    with pytest.raises(ValueError, match=r'gradient kind "graph" scores every token.*leave stop_strings out'):
        make_task(policy, encoder, stop_strings=("\n",), gradient=GradientConfig(kind="graph"))
    with pytest.raises(ValueError, match="none of them empty"):
        StepConfig(stop_strings=("",))
