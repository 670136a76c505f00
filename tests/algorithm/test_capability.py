"""Eq. 6, eq. 7 and their variants by hand; maps; the memory (method.md, section 3)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from esrl.algorithm.allocation import AllocationConfig, allocate
from esrl.algorithm.capability import (
    CapabilityConfig,
    CapabilityMemory,
    CapabilityRecord,
    contrast,
    entropy_capability,
    map_capability,
    metric_capability,
)
from esrl.algorithm.groups import Groups

ONE = torch.ones(1, dtype=torch.int64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def groups(*index: int, size: int | None = None) -> Groups:
    return Groups(torch.tensor(index, dtype=torch.int64), size or max(index) + 1)


def settings(form: str = "paper", average: str = "tokens") -> CapabilityConfig:
    return CapabilityConfig(estimator="entropy", entropy_form=form, average=average)


def test_eq_6_is_the_mean_reward_of_a_prompts_samples():
    # (.2 + .4) / 2; a row drawn three times: (.1 * 3 + .5) / 4 = .2; an abstained row (count 0) takes no part: .7
    rewards = vector(0.2, 0.4, 0.1, 0.5, 0.7, 0.0)
    counts = torch.tensor([1, 1, 3, 1, 1, 0])
    result = metric_capability(rewards, groups(0, 0, 1, 1, 2, 2), counts)
    assert result.tolist() == pytest.approx([0.3, 0.2, 0.7], abs=1e-15)
    # 0 for a prompt without a valid sample, instead of 0 / 0
    assert metric_capability(vector(0.3), groups(1, size=3), torch.tensor([0])).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("probability", "expected"), [(0.9, 0.905), (1 / math.e, 0.632), (0.01, 0.954), (1.0, 1.0)])
def test_eq_7_of_one_probability(probability: float, expected: float):
    # 1 + .9 ln .9 = .9052; 1 - 1/e = .6321, the least there is; 1 + .01 ln .01 = .9539: not monotone
    log_probs = torch.full((1, 4), math.log(probability), dtype=torch.float64)
    result = entropy_capability(log_probs, torch.ones(1, 4, dtype=torch.bool), groups(0), ONE, settings(), 10)
    assert float(result) == pytest.approx(expected, abs=5e-4)
    assert float(result) == pytest.approx(1 + probability * math.log(probability), abs=1e-15)


def test_eq_7_averages_over_tokens_or_sequences():
    # p ln p: a = .5 ln .5 = -.34657, b = .25 ln .25 = -.34657 too, so take e: .9 ln .9 = -.094824
    short, long = math.log(0.5), math.log(0.9)
    log_probs = torch.tensor([[short, 9.0, 9.0], [long, long, long]], dtype=torch.float64)  # 9.0: beyond EOS
    mask = torch.tensor([[True, False, False], [True, True, True]])
    a, e = 0.5 * math.log(0.5), 0.9 * math.log(0.9)
    both = groups(0, 0)
    ones = torch.ones(2, dtype=torch.int64)
    tokens = entropy_capability(log_probs, mask, both, ones, settings(), 10)
    assert float(tokens) == pytest.approx(1 + (a + 3 * e) / 4, abs=1e-15)
    sequences = entropy_capability(log_probs, mask, both, ones, settings(average="sequences"), 10)
    assert float(sequences) == pytest.approx(1 + (a + e) / 2, abs=1e-15)
    # the first was drawn twice: two of five tokens, two of three sequences
    counts = torch.tensor([2, 1])
    tokens = entropy_capability(log_probs, mask, both, counts, settings(), 10)
    assert float(tokens) == pytest.approx(1 + (2 * a + 3 * e) / 5, abs=1e-15)
    sequences = entropy_capability(log_probs, mask, both, counts, settings(average="sequences"), 10)
    assert float(sequences) == pytest.approx(1 + (2 * a + e) / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("form", "values", "expected"),
    [
        # entropies 0 and ln 16 over V = 16: 1 - (0 + 1) / 2
        ("full_normalised", [0.0, math.log(16)], 0.5),
        # the geometric mean of .9 and .4 is .6
        ("sampled_logp", [math.log(0.9), math.log(0.4)], 0.6),
        ("max_prob", [0.9, 0.4], 0.65),
    ],
)
def test_variants_of_eq_7(form: str, values: list[float], expected: float):
    mask = torch.tensor([[True, True, False]])
    padded = torch.tensor([[*values, 0.5]], dtype=torch.float64)
    assert float(entropy_capability(padded, mask, groups(0), ONE, settings(form), 16)) == pytest.approx(expected)


def test_eq_7_of_extreme_log_probabilities():
    # p ln p -> 0 as p -> 0, and exp(-1e4) is 0 in float64: 1 + 0, not NaN
    log_probs = torch.full((1, 2), -1e4)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert float(entropy_capability(log_probs, mask, groups(0), ONE, settings(), 10)) == 1
    assert float(entropy_capability(log_probs, mask, groups(0), ONE, settings("sampled_logp"), 10)) == 0


@pytest.mark.parametrize("vocabulary", [7, 1000, 50_000, 250_002])
def test_an_even_distribution_has_capability_zero_and_not_less(vocabulary: int):
    # the sampler's float32 entropy of an even distribution is ln V rounded, for V = 1000 upwards
    even = torch.special.entr(torch.full((vocabulary,), 1 / vocabulary)).sum()
    for entropy in (even, torch.tensor(math.log(vocabulary)), torch.tensor(math.log(vocabulary) * (1 + 1e-6))):
        values, mask = entropy.expand(1, 3), torch.ones(1, 3, dtype=torch.bool)
        result = entropy_capability(values, mask, groups(0), ONE, settings("full_normalised"), vocabulary)
        assert 0 <= float(result) < 1e-3
        allocate(result, AllocationConfig())  # which refuses negative ones


def test_what_the_sampler_must_record():
    assert [settings(form).records for form in ("paper", "sampled_logp", "full_normalised", "max_prob")] == [
        (),
        (),
        ("entropy",),
        ("max_prob",),
    ]
    assert CapabilityConfig(estimator="metric", entropy_form="max_prob").records == ()


def test_sigmoid_z():
    # (3 - 1) / 2 = 1 standard deviation above the queue: 1 / (1 + e^-1) = .7310586
    result = map_capability(vector(3.0, 1.0, -1.0), "sigmoid_z", 1.0, 2.0)
    assert result.tolist() == pytest.approx([0.7310585786300049, 0.5, 0.2689414213699951], abs=1e-15)
    # a queue of equal rewards has no spread: z is the plain difference
    assert map_capability(vector(2.0), "sigmoid_z", 1.0, 0.0).tolist() == pytest.approx([0.7310585786300049])
    assert map_capability(vector(-1e300, 1e300), "sigmoid_z", 0.0, 1e-300).tolist() == [0, 1]


def test_minmax_and_contrast():
    # (-1 + 2) / 4 = .25
    assert map_capability(vector(-2, -1, 2), "minmax").tolist() == [0, 0.25, 1]
    assert map_capability(vector(7, 7), "minmax").tolist() == [0.5, 0.5]
    assert map_capability(vector(0.0, 5e-324), "minmax").tolist() == [0, 1]
    assert contrast(vector(0.63, 0.68, 0.83), "minmax").tolist() == pytest.approx([0, 0.25, 1], abs=1e-12)
    assert contrast(vector(0.63, 0.68), "none").tolist() == [0.63, 0.68]
    assert contrast(torch.zeros(0), "minmax").tolist() == []


def test_rank_with_ties():
    # smaller scores, out of the 4 others: ties share a rank
    assert map_capability(vector(3, -1, 3, 8, 0), "rank").tolist() == [0.5, 0, 0.5, 1, 0.25]
    assert map_capability(vector(4), "rank").tolist() == [0]


@pytest.mark.parametrize("how", ["sigmoid_z", "minmax", "rank"])
def test_maps_keep_the_order_and_land_in_the_unit_interval(how: str):
    scores = vector(-1e300, -2, -1, -0.5, -0.1, 0, 5e-324, 3, 1e300)
    mapped = map_capability(scores, how, 0.3, 1.7)
    assert bool((mapped[1:] >= mapped[:-1]).all()) and 0 <= float(mapped[0]) < float(mapped[-1]) <= 1
    num_samples = allocate(mapped, AllocationConfig()).num_samples
    assert bool((num_samples[1:] <= num_samples[:-1]).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["identity", "sigmoid_z", "minmax", "rank"])
def test_no_map_hides_a_score_that_is_not_finite(how: str, bad: float):
    scores = vector(0.1, bad, 0.3)
    with pytest.raises(ValueError, match=rf"capability\[1\] is {bad}"):
        allocate(map_capability(scores, how), AllocationConfig())
    with pytest.raises(ValueError, match=rf"capability\[1\] is {bad}"):
        allocate(contrast(scores, "minmax"), AllocationConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"estimator": "bleu"},
        {"entropy_form": "x"},
        {"average": "x"},
        {"contrast": "x"},
        {"capability_map": "x"},
        {"scope": "x"},
    ],
)
def test_settings_are_checked(wrong: dict[str, str]):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}'; choose one of"):
        CapabilityConfig(**wrong)


def test_memory():
    memory = CapabilityMemory()
    assert (len(memory), memory.missing(["a", "b"], 0)) == (0, [0, 1])
    first = CapabilityRecord(0.25, greedy=True, epoch=0, num_rewards=1)
    memory.write(["a", "b"], [first, CapabilityRecord(0.5, False, 0, 4, 0.125)])
    assert memory.missing(["c", "b", "a", "d"], 1) == [0, 3]
    assert [memory.records[name].score for name in ("b", "a")] == [0.5, 0.25]
    spread = memory.reward_std(["a", "b", "never seen"]).tolist()
    assert math.isnan(spread[0]) and spread[1] == 0.125 and math.isnan(spread[2])
    # None leaves what is known, a new record replaces it
    memory.write(["a", "b"], [CapabilityRecord(0.75, False, 1, 3, 0.5), None])
    assert [memory.records[name].score for name in ("a", "b")] == [0.75, 0.5]
    assert (memory.records["a"].greedy, memory.records["b"].epoch, len(memory)) == (False, 0, 2)
    with pytest.raises(ValueError, match="zip"):
        memory.write(["a"], [])


@pytest.mark.parametrize(("epoch", "missing"), [(0, []), (1, []), (2, [0]), (3, [0]), (4, [0, 1])])
def test_a_record_older_than_the_epoch_before_counts_as_missing(epoch: int, missing: list[int]):
    memory = CapabilityMemory()
    memory.write(["a", "b"], [CapabilityRecord(0.5, False, 0), CapabilityRecord(0.5, False, 2)])
    assert memory.missing(["a", "b"], epoch) == missing


def test_memory_survives_json_bit_by_bit():
    memory = CapabilityMemory()
    memory.write(
        ["a", "ü:2", "z"],
        [
            CapabilityRecord(0.1 + 0.2, False, 3, 14, 1 / 3),
            CapabilityRecord(5e-324, True, 0, 1),
            CapabilityRecord(-1e300, False, 1),
        ],
    )
    state = memory.state_dict()
    other = CapabilityMemory()
    other.load_state_dict(json.loads(json.dumps(state)))
    assert other.records == memory.records
    assert list(other.records) == ["a", "ü:2", "z"]
    # the state is a copy: what is recorded later does not reach back
    memory.write(["a"], [CapabilityRecord(0.9, False, 4)])
    assert state["a"][0] == 0.1 + 0.2 == other.records["a"].score
