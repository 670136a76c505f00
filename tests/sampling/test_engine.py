"""Stage one: what is drawn depends on (seed, epoch, example, sample) alone, and follows the model's distribution."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from enumeration import LONGEST, assert_follow, enumerate_sequences, said
from hypothesis import given, settings
from hypothesis import strategies as st

from esrl.algorithm.streams import sample_uniforms
from esrl.errors import NumericsError
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.decoding import _survivors, batch_size, survivors
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.types import Prompts, Rollouts, SamplingPlan

SEED = 11
STEPS = 24
RECORDS = ("entropy", "max_prob")


def sample(policy: MarianPolicy, prompts: Prompts, plan: SamplingPlan, epoch: int = 0, **config: Any) -> Rollouts:
    settings = SamplingConfig(**({"max_new_tokens": STEPS} | config))
    return EngineSampler(policy, settings, SEED).sample(prompts, plan, epoch, RECORDS)


def rows_by_name(rollouts: Rollouts, ids: tuple[str, ...]) -> dict[tuple[str, int], dict[str, Any]]:
    """Everything about a sample under (example id, sample number), without padding."""
    found = {}
    for row in range(rollouts.num_rows):
        length = int(rollouts.mask[row].sum())
        assert rollouts.mask[row].tolist() == [True] * length + [False] * (rollouts.mask.shape[1] - length)
        values = {
            "log_probs": rollouts.log_probs,
            "sampling_log_probs": rollouts.sampling_log_probs,
            **rollouts.records,
        }
        for name, value in values.items():
            assert bool((value[row, length:] == 0).all()), name
        found[ids[int(rollouts.prompt_index[row])], int(rollouts.sample_index[row])] = {
            "tokens": rollouts.tokens[row, :length].tolist(),
            "finished": bool(rollouts.finished[row]),
            "text": rollouts.texts[row],
            "values": torch.stack([value[row, :length] for value in values.values()]),
        }
    return found


def assert_same(found: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert found[name]["tokens"] == row["tokens"], name
        assert (found[name]["finished"], found[name]["text"]) == (row["finished"], row["text"])
        torch.testing.assert_close(found[name]["values"], row["values"], rtol=0, atol=tolerance)


def test_rollouts_are_what_the_types_say(random64, prompts, uneven_plan, tokenizer):
    rollouts = sample(random64, prompts, uneven_plan)
    counts = uneven_plan.num_samples.tolist()
    assert rollouts.prompt_index.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
    assert rollouts.sample_index.tolist() == [j for count in counts for j in range(count)]
    lengths, eos = rollouts.lengths.tolist(), random64.eos_tokens[0]
    assert min(lengths) < 4 and max(lengths) == STEPS  # ragged, and some were cut
    assert rollouts.mask.shape[1] == max(lengths)
    for row, length in enumerate(lengths):
        ids = rollouts.tokens[row, :length].tolist()
        # the mask ends with the first EOS, or at the limit without one
        assert eos not in ids[:-1]
        assert bool(rollouts.finished[row]) == (ids[-1] == eos)
        assert length == STEPS or ids[-1] == eos
        assert rollouts.texts[row] == tokenizer.decode(ids, skip_special_tokens=True)
        assert random64.pad_token not in ids
    assert 0 < int(rollouts.finished.sum()) < rollouts.num_rows


def test_trained_model_ends_by_itself_and_repeats_itself(trained64, prompts, make_plan):
    rollouts = sample(trained64, prompts, make_plan([8] * 10, 0.6))
    assert float(rollouts.finished.double().mean()) > 0.8
    # the first prompt was learnt by heart
    assert rollouts.texts[:8].count("A dog runs across the meadow.") >= 6


@pytest.mark.parametrize(
    "config",
    [
        {"compaction_share": 0.0},
        {"compaction_share": 1.0},
        {"max_cache_tokens": 1},  # a wave for each row
        {"max_cache_tokens": 5 * STEPS},
        {"max_cache_tokens": 20 * STEPS},  # waves side by side
        {"max_cache_tokens": 16 * STEPS, "compaction_share": 0.5},
        {"max_cache_tokens": 12 * STEPS, "max_prompt_tokens": 45, "compaction_share": 0.0},
        {"max_cache_tokens": 10**9},
        {"max_prompt_tokens": 1},  # each prompt encoded alone
        {"max_prompt_tokens": 45},
        {"max_prompt_tokens": 45, "max_cache_tokens": 2 * STEPS, "compaction_share": 0.5, "max_logits": 330},
        {"max_logits": 1},  # logits of one row at a time
        {"max_logits": 500},
    ],
)
@pytest.mark.parametrize("model", ["random64", "trained64"])
def test_limits_change_nothing_in_float64(model, config, prompts, uneven_plan, request):
    policy = request.getfixturevalue(model)
    expected = rows_by_name(sample(policy, prompts, uneven_plan), prompts.example_ids)
    assert_same(rows_by_name(sample(policy, prompts, uneven_plan, **config), prompts.example_ids), expected)


@pytest.mark.parametrize(
    "common", [{"max_length_ratio": 0.7}, {"top_k": 20, "min_p": 0.01}, {"top_p": 0.8, "max_length_ratio": 1.0}]
)
@pytest.mark.parametrize("few_looks", [False, True])
def test_waves_side_by_side_change_nothing_in_float64(random64, prompts, make_plan, common, few_looks, monkeypatch):
    """80 rows in 16 places; some prompts greedily, rows with limits of their own, and as on a GPU, where what has ended
    is looked at every 8 steps."""
    plan = make_plan([8] * 10, [1.0, 0.0, 0.6, 1.0, 1.3, 0.0, 0.7, 1.0, 0.9, 1.0])
    expected = rows_by_name(sample(random64, prompts, plan, **common), prompts.example_ids)
    assert len({len(row["tokens"]) for row in expected.values()}) > 5
    if few_looks:
        pace = EngineSampler._pace
        monkeypatch.setattr(EngineSampler, "_pace", lambda self, frozen: replace(pace(self, frozen), check_steps=8))
    found = sample(random64, prompts, plan, max_cache_tokens=16 * STEPS, **common)
    assert_same(rows_by_name(found, prompts.example_ids), expected)


def permuted(prompts: Prompts, plan: SamplingPlan, order: list[int]) -> tuple[Prompts, SamplingPlan]:
    return prompts.select(order), SamplingPlan(num_samples=plan.num_samples[order], temperature=plan.temperature[order])


@pytest.mark.parametrize("size", [1, 3, 10])
def test_batch_and_order_change_nothing_in_float64(random64, prompts, uneven_plan, size):
    expected = rows_by_name(sample(random64, prompts, uneven_plan), prompts.example_ids)
    order = [7, 2, 9, 0, 5, 1, 8, 3, 6, 4]
    found: dict = {}
    for start in range(0, 10, size):
        part, plan = permuted(prompts, uneven_plan, order[start : start + size])
        found |= rows_by_name(sample(random64, part, plan), part.example_ids)
    assert_same(found, expected)


def test_a_sample_does_not_depend_on_how_many_there_are(random64, prompts, make_plan):
    few = rows_by_name(sample(random64, prompts, make_plan([3] * 10, 0.9)), prompts.example_ids)
    many = rows_by_name(sample(random64, prompts, make_plan([10] * 10, 0.9)), prompts.example_ids)
    assert len(many) == 100
    assert_same({name: many[name] for name in few}, few)


def test_longer_limit_only_goes_on(random64, prompts, make_plan):
    short = rows_by_name(sample(random64, prompts, make_plan([4] * 10, 1.0), max_new_tokens=6), prompts.example_ids)
    long = rows_by_name(sample(random64, prompts, make_plan([4] * 10, 1.0)), prompts.example_ids)
    for name, row in short.items():
        assert long[name]["tokens"][:6] == row["tokens"]
        assert row["finished"] == (long[name]["finished"] and len(long[name]["tokens"]) <= 6)
    assert not all(row["finished"] for row in short.values())


def test_other_names_draw_other_samples(random64, prompts, make_plan):
    plan = make_plan([4] * 10, 1.0)
    base = sample(random64, prompts, plan)
    assert sample(random64, prompts, plan).texts == base.texts
    assert sample(random64, prompts, plan, epoch=1).texts != base.texts
    other_seed = EngineSampler(random64, SamplingConfig(max_new_tokens=STEPS), SEED + 1).sample(prompts, plan)
    assert other_seed.texts != base.texts
    renamed = replace(prompts, example_ids=tuple(f"{example}x" for example in prompts.example_ids))
    assert sample(random64, renamed, plan).texts != base.texts
    # the samples of a prompt differ among themselves, too
    assert len(set(base.texts[:4])) > 1


def test_draws_neither_use_nor_move_torchs_generator(random64, prompts, uneven_plan):
    torch.manual_seed(1)
    first, after = sample(random64, prompts, uneven_plan), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    assert torch.equal(sample(random64, prompts, uneven_plan).tokens, first.tokens)


def test_dropout_of_training_stays_out_of_stage_one(make_policy, prompts, uneven_plan):
    """A policy set up for dropout is in train mode; the draws must still depend on nothing but their names."""
    policy = make_policy()
    expected = rows_by_name(sample(policy, prompts, uneven_plan), prompts.example_ids)
    policy.set_dropout(0.3)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert_same(rows_by_name(sample(policy, prompts, uneven_plan), prompts.example_ids), expected)
        assert policy.model.training  # stage two goes on with dropout


@pytest.mark.parametrize("counts", [[0] * 10, [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]])
def test_prompts_without_samples_are_left_out(random64, prompts, make_plan, counts):
    rollouts = sample(random64, prompts, make_plan(counts, 1.0))
    assert rollouts.prompt_index.tolist() == [3] * sum(counts)
    assert rollouts.tokens.shape[0] == rollouts.mask.shape[0] == len(rollouts.texts) == sum(counts)
    assert rollouts.tokens.dtype == rollouts.prompt_index.dtype == torch.int64
    assert rollouts.mask.dtype == rollouts.finished.dtype == torch.bool
    assert set(rollouts.records) == set(RECORDS)
    assert int(rollouts.mask.sum()) == sum(rollouts.lengths.tolist())


def test_no_prompts_at_all(random64, prompts):
    """What a process without a share of the last batch samples."""
    rollouts = sample(random64, prompts.select([]), SamplingPlan.greedy(0))
    assert rollouts.num_rows == len(rollouts.texts) == len(rollouts.prompt_index) == 0


def test_half_precision_records_in_float32(make_policy, prompts, uneven_plan):
    policy = make_policy(torch.bfloat16)
    rollouts = sample(policy, prompts, uneven_plan)
    for values in (rollouts.log_probs, rollouts.sampling_log_probs, *rollouts.records.values()):
        assert values.dtype == torch.float32
    assert set(rows_by_name(rollouts, prompts.example_ids)) == set(
        rows_by_name(sample(make_policy(torch.float32), prompts, uneven_plan), prompts.example_ids)
    )
    assert not bool(((rollouts.tokens == policy.pad_token) & rollouts.mask).any())
    assert bool((rollouts.log_probs[rollouts.mask] <= 0).all())
    # bfloat16 has 8 bits: the decoder with a cache and the parallel one differ by that much
    again = StageTwo(policy, GradientConfig()).log_probs(prompts, rollouts, None, 0)
    difference = (again - rollouts.log_probs)[rollouts.mask].abs()
    assert 0 < float(difference.mean()) < 0.1


def test_length_ratio_by_hand(make_policy, prompts, make_plan):
    """A model that never ends is cut at ceil(1.5 * source tokens) + 10, or at the overall limit."""
    policy = make_policy(eos_bias=-1000.0)
    rollouts = sample(policy, prompts, make_plan([2] * 10, 1.0), max_new_tokens=30, max_length_ratio=1.5)
    sources = prompts.mask.sum(1).tolist()
    expected = [min(30, -(-3 * length // 2) + 10) for length in sources]
    assert rollouts.lengths.tolist() == [length for length in expected for _ in range(2)]
    assert min(expected) < 30 and expected.count(30) > 1
    assert not bool(rollouts.finished.any())
    # the cut changes nothing before it
    full = sample(policy, prompts, make_plan([2] * 10, 1.0), max_new_tokens=30)
    assert torch.equal(full.tokens * rollouts.mask, rollouts.tokens)


def test_a_model_that_wants_to_say_pad(make_policy, prompts, make_plan):
    policy = make_policy()
    policy.model.final_logits_bias[0, policy.pad_token] += 60
    rollouts = sample(policy, prompts, make_plan([5] * 10, [1.0, 0.0] * 5))
    assert not bool(((rollouts.tokens == policy.pad_token) & rollouts.mask).any())
    assert bool(torch.isfinite(rollouts.log_probs).all())


def test_every_end_token_ends(random64, prompts, make_plan):
    model = copy.deepcopy(random64.model)
    model.generation_config.eos_token_id = [1, 20, 21, 22]
    with torch.no_grad():
        model.final_logits_bias[0, 20:23] += 5
    policy = MarianPolicy(model, random64.tokenizer)
    rollouts = sample(policy, prompts, make_plan([10] * 10, 1.0))
    ends = {int(row[length - 1]) for row, length in zip(rollouts.tokens, rollouts.lengths.tolist(), strict=True)}
    assert {1, 20, 21, 22} <= ends
    for row, length, finished in zip(rollouts.tokens, rollouts.lengths, rollouts.finished, strict=True):
        assert not set(row[: length - 1].tolist()) & {1, 20, 21, 22}
        assert bool(finished) == (int(row[length - 1]) in (1, 20, 21, 22))


@pytest.mark.parametrize("model", ["random64", "trained64"])
def test_records_equal_those_of_the_full_logits(model, prompts, uneven_plan, reference_logits, request):
    policy = request.getfixturevalue(model)
    rollouts = sample(policy, prompts, uneven_plan)
    with torch.no_grad():
        logits = reference_logits(policy, prompts, rollouts)
    mask = rollouts.mask
    plain = torch.log_softmax(logits, -1)
    tau = uneven_plan.temperature[rollouts.prompt_index][:, None, None]
    heated = torch.log_softmax(logits / tau, -1)
    expected = {
        "entropy": -torch.where(plain.exp() > 0, plain.exp() * plain, 0.0).sum(-1),
        "max_prob": plain.exp().amax(-1),
        "log_probs": plain.gather(-1, rollouts.tokens[..., None])[..., 0],
        "sampling_log_probs": heated.gather(-1, rollouts.tokens[..., None])[..., 0],
    }
    found = {**rollouts.records, "log_probs": rollouts.log_probs, "sampling_log_probs": rollouts.sampling_log_probs}
    for name, values in expected.items():
        torch.testing.assert_close(found[name][mask], values[mask], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("model", "tolerance"), [("random64", 1e-10), ("trained64", 1e-10), ("random32", 1e-5), ("trained32", 1e-5)]
)
def test_stage_two_scores_what_stage_one_recorded(model, tolerance, prompts, uneven_plan, request):
    policy = request.getfixturevalue(model)
    rollouts = sample(policy, prompts, uneven_plan)
    stage_two = StageTwo(policy, GradientConfig(micro_batch_tokens=60, max_prompt_tokens=50, max_logits=1000))
    plain = stage_two.log_probs(prompts, rollouts, None, 0)
    heated = stage_two.log_probs(prompts, rollouts, uneven_plan.temperature[rollouts.prompt_index], 0)
    assert float((plain - heated).abs().max()) > 0.1
    torch.testing.assert_close(plain, rollouts.log_probs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(heated, rollouts.sampling_log_probs, rtol=tolerance, atol=tolerance)


def test_greedy_rows_among_sampled_ones(random64, prompts, make_plan):
    """Temperature 0 and others in one batch give each row what it gets on its own."""
    mixed = make_plan([2] * 10, [0.0, 1.0, 0.7, 0.0, 1.3, 0.0, 1.0, 1.0, 0.0, 0.5])
    found = rows_by_name(sample(random64, prompts, mixed), prompts.example_ids)
    for i in range(10):
        part, plan = permuted(prompts, mixed, [i])
        alone = rows_by_name(sample(random64, part, plan), part.example_ids)
        assert_same({name: found[name] for name in alone}, alone)
        if mixed.temperature[i] == 0:
            first, second = alone.values()
            assert first["tokens"] == second["tokens"]
            assert bool((first["values"][1] == 0).all())  # a greedy choice has probability 1


def boundary_distance(policy: MarianPolicy, prompts: Prompts, prompt: int, prefix: list[int], tau: float, u: float):
    """How far u lies from the nearest boundary of the cumulative distribution behind ``prefix``, in float64."""
    inputs = torch.tensor([[policy.start_token, *prefix]])
    with torch.no_grad():
        state = policy.encode(prompts.select([prompt]))
        logits = policy.projection().logits(policy.hidden_states(state, torch.zeros(1, dtype=torch.int64), inputs)[0])
    cumulative = torch.softmax(logits[-1] / tau, 0).cumsum(0)
    return float((cumulative - u).abs().min())


def test_float32_differs_at_boundaries_alone(random32, random64, prompts, make_plan):
    """600 samples in float32 under other limits: where a row first differs, its uniform lies on a boundary."""
    plan = make_plan([60] * 10, [1.0, 0.8, 0.6, 1.0, 1.3, 1.0, 0.7, 1.0, 0.9, 1.0])
    exact = copy.deepcopy(random32.model).double()
    judge = MarianPolicy(exact, random32.tokenizer)
    variants = [
        sample(random32, prompts, plan),
        sample(random32, prompts, plan, max_cache_tokens=7 * STEPS, compaction_share=0.0),
        sample(random32, prompts, plan, max_prompt_tokens=30, compaction_share=1.0, max_cache_tokens=100 * STEPS),
        sample(judge, prompts, plan),
    ]
    assert variants[0].log_probs.dtype == torch.float32
    draws = int(variants[0].mask.sum())
    differing = 0
    for other in variants[1:]:
        for row in range(other.num_rows):
            base = variants[0]
            a = base.tokens[row, : int(base.mask[row].sum())].tolist()
            b = other.tokens[row, : int(other.mask[row].sum())].tolist()
            if a == b:
                continue
            differing += 1
            at = next(i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y)
            prompt, number = int(base.prompt_index[row]), int(base.sample_index[row])
            u = float(sample_uniforms(SEED, 0, [prompts.example_ids[prompt]], [number], STEPS)[0, at])
            tau = float(plan.temperature[prompt])
            assert boundary_distance(judge, prompts, prompt, a[:at], tau, u) < 1e-5, (row, at)
    # a draw is such a case with probability 2e-5 per boundary near u at the very most, and V = 160: far less than .3 %
    assert draws > 5_000
    assert differing < 0.003 * 3 * draws


@pytest.mark.parametrize("tau", [0.6, 1.0, 1.3])
def test_drawn_frequencies_follow_the_enumerated_distribution(toy_policy, tau):
    """156 sequences of at most 3 tokens: EOS, 5 x EOS, 25 x (EOS or 5 others); 20,000 draws, chi-square."""
    source = Prompts(
        example_ids=("toy",), input_ids=torch.tensor([[3, 5, 4, 1]]), mask=torch.ones(1, 4, dtype=torch.bool)
    )
    plan = SamplingPlan(num_samples=torch.tensor([20_000]), temperature=torch.tensor([tau], dtype=torch.float64))
    rollouts = EngineSampler(toy_policy, SamplingConfig(max_new_tokens=LONGEST), SEED).sample(source, plan)

    def logits_after(prefix: tuple[int, ...]) -> torch.Tensor:
        inputs = torch.tensor([[toy_policy.start_token, *prefix]])
        return toy_policy.model(input_ids=source.input_ids, decoder_input_ids=inputs).logits[0, -1]

    # the test sees a wrong temperature: a tenth more is out of the question
    right, wrong = (
        enumerate_sequences(logits_after, toy_policy.pad_token, toy_policy.eos_tokens, heat)
        for heat in (tau, tau * 1.1)
    )
    assert len(right) == 156
    assert_follow(said(rollouts), right, wrong)


def test_diverged_weights_are_reported_with_the_example(make_policy, prompts, make_plan):
    policy = make_policy()
    with torch.no_grad():
        policy.model.model.decoder.layers[1].fc1.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=prompts.example_ids[0]):
        sample(policy, prompts, make_plan([2] * 10, 1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_cache_tokens": 0}, "max_cache_tokens is 0"),
        ({"max_prompt_tokens": -1}, "max_prompt_tokens is -1"),
        ({"max_logits": 0}, "max_logits is 0"),
        ({"max_length_ratio": 0.0}, "max_length_ratio is 0.0"),
        ({"max_length_ratio": float("nan")}, "max_length_ratio is nan"),
        ({"compaction_share": 1.1}, "compaction_share is 1.1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": float("nan")}, "min_p is nan"),
    ],
)
def test_limits_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**values)


def test_more_tokens_than_positions_are_refused(random64):
    with pytest.raises(ValueError, match="max_new_tokens is 41, but the model has 40 positions"):
        EngineSampler(random64, SamplingConfig(max_new_tokens=41), 0)


@given(
    st.lists(st.booleans(), min_size=1, max_size=200).filter(lambda done: not all(done)),
    st.sampled_from(["few", "any"]),
)
@settings(max_examples=200, deadline=None)
def test_rows_that_have_ended_are_overwritten_by_the_last_ones(ended, sizes):
    """All rows that go on are kept, once each; of them only those behind the new end change place."""
    done = torch.tensor(ended)
    size = min(batch_size(int((~done).sum()), sizes), len(done))
    order = _survivors(done.tolist(), size)
    assert len(order) == len(set(order)) == size
    going_on = {row for row, end in enumerate(ended) if not end}
    assert going_on <= set(order)
    assert all(order[row] == row for row in going_on if row < size)


@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=1, max_size=30), st.booleans()), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_rows_of_every_wave_that_go_on_are_kept(waves):
    """And no row of a wave that is over; the batch has the size that was asked for, where enough others have ended."""
    done = [[end or over for end in ended] for ended, over in waves]
    sizes, over = [len(wave) for wave in done], [over for _, over in waves]
    going_on = sum(not end for wave in done for end in wave)
    size = batch_size(going_on, "few")
    kept = survivors(list(itertools.chain(*done)), sizes, over, size)
    for wave, rows in zip(done, kept, strict=True):
        assert len(set(rows)) == len(rows)
        assert {row for row, end in enumerate(wave) if not end} <= set(rows)
        assert rows == [] or not all(wave)
    usable = sum(len(wave) for wave in done if not all(wave))
    assert sum(map(len, kept)) == min(size, usable)


def test_rows_take_the_places_of_those_that_have_ended(random64, prompts, make_plan):
    """160 rows in 20 places: never more at a time, and far fewer steps than eight waves one after the other take."""
    seen: list[int] = []

    class Counting(MarianPolicy):
        def frozen_decoder(self) -> Any:
            frozen = super().frozen_decoder()
            logits = frozen.projection.logits
            frozen.projection.logits = lambda hidden: seen.append(len(hidden)) or logits(hidden)
            return frozen

    plan = make_plan([16] * 10, 1.0)
    policy = Counting(random64.model, random64.tokenizer)
    rollouts = sample(policy, prompts, plan, max_cache_tokens=20 * STEPS, compaction_share=0.0)
    expected = rows_by_name(sample(random64, prompts, plan), prompts.example_ids)
    assert_same(rows_by_name(rollouts, prompts.example_ids), expected)
    lengths = rollouts.lengths.view(8, 20)
    assert max(seen) == 20
    assert len(seen) < 0.8 * int(lengths.max(1).values.sum())
    assert sum(seen) < 1.5 * int(lengths.sum())  # few places are taken by rows that have ended


def test_batch_sizes_are_few():
    assert [batch_size(rows, "few") for rows in (1, 8, 9, 64, 65, 96, 97)] == [8, 8, 16, 64, 96, 96, 128]
    assert len({batch_size(rows, "few") for rows in range(1, 321)}) == 16


def test_compiled_kernels_take_any_batch_size():
    assert [batch_size(rows, "any") for rows in (1, 9, 65)] == [1, 9, 65]


def test_records_of_other_names_are_refused(random64, prompts, make_plan):
    sampler = EngineSampler(random64, SamplingConfig(max_new_tokens=LONGEST), seed=5)
    with pytest.raises(ValueError, match="records are entropy, max_prob; there is no 'perplexity'"):
        sampler.sample(prompts, make_plan([1] * 10, 1.0), records=("perplexity",))
