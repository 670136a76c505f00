"""The benchmark measures what it says: the same model and the same law for all, real tokens, one JSON object."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from esrl.benchmark import BenchmarkConfig, run_command
from esrl.benchmark import language_model as language_module
from esrl.benchmark import measure as measure_module
from esrl.benchmark import run as run_module
from esrl.benchmark import step as step_module
from esrl.benchmark import worker as worker_module
from esrl.benchmark.contestants import CONTESTANTS, CTranslate2, Job, ctranslate2_pieces
from esrl.benchmark.limit import limit
from esrl.benchmark.measure import Meter, Result, lengths_agree
from esrl.benchmark.processes import ContestantFailure, ContestantProcess, Measured, take_turns
from esrl.benchmark.rewards import rewards
from esrl.benchmark.stage_one import _row as stage_one_row
from esrl.benchmark.step import _row as step_row
from esrl.benchmark.steps import STEPS, StepContestant, score_padded
from esrl.benchmark.worker import PeakMemory
from esrl.benchmark.workloads import (
    MODELS,
    BenchmarkModel,
    Workload,
    as_prompts,
    convert_to_ctranslate2,
    random_policy,
    whole_word_tokenizer,
)
from esrl.kernels import kernels
from esrl.models.seq2seq import MarianPolicy, Preset, new_policy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.types import Prompts, Rollouts, SamplingPlan

TINY = BenchmarkModel(
    sizes=Preset(width=32, layers=1, heads=2, inner_width=64),
    vocabulary=600,
    mean_length=8,
)
WORKLOAD = Workload(name="tiny", model=TINY, samples=40, prompts=8, source_tokens=10, max_new_tokens=12)
NUM_RUNS = 3


@pytest.fixture(scope="module")
def policy() -> MarianPolicy:
    return random_policy(WORKLOAD)


@pytest.fixture(scope="module")
def folders(policy: MarianPolicy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in every contestant's format."""
    root = tmp_path_factory.mktemp("benchmark")
    policy.save(root / "model")
    for quantization in ("float32", "int8"):
        convert_to_ctranslate2(root / "model", root / quantization, quantization)
    return {name: root / (name.partition("-")[2] or "model") for name in CONTESTANTS}


@pytest.fixture(scope="module")
def lengths(folders: dict[str, Path]) -> dict[str, list[int]]:
    """What every contestant drew in three runs."""
    drawn = {}
    for name, build in CONTESTANTS.items():
        contestant = build(job(name, folders[name]))
        drawn[name] = [length for seed in range(NUM_RUNS) for length in contestant.run(seed)()]
    return drawn


def job(name: str, folder: Path, kind: str = "sample") -> Job:
    return Job(
        contestant=name,
        kind=kind,
        folder=str(folder),
        source=WORKLOAD.source(),
        samples=WORKLOAD.samples,
        max_new_tokens=WORKLOAD.max_new_tokens,
        threads=1,
    )


def test_expected_length_worked_by_hand():
    # 8 * (1 - (7 / 8) ** 12) = 8 * (1 - 0.2014) = 6.389
    assert WORKLOAD.expected_length == pytest.approx(6.389, abs=5e-4)


@pytest.mark.parametrize(("name", "millions"), [("small", 8), ("base", 50)])
def test_models_have_the_size_they_are_named_for(name: str, millions: int):
    model = MODELS[name]
    with torch.device("meta"):
        built = new_policy(model.sizes, whole_word_tokenizer(model.vocabulary, 61), 61, 0).model
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(millions * 1e6, rel=0.03)


def test_the_model_ends_a_sample_at_the_rate_it_promises(policy: MarianPolicy):
    # p(EOS) = 1/8 on average along the model's own samples, and nearly so at each position: with 600 other tokens
    # their sum of exponentials varies by 7 % or so
    prompts = as_prompts(WORKLOAD.source())
    plan = SamplingPlan(num_samples=torch.full((8,), 40), temperature=torch.ones(8))
    rollouts = EngineSampler(policy, SamplingConfig(max_new_tokens=12), 1).sample(prompts, plan)
    start = torch.full((rollouts.num_rows, 1), policy.start_token)
    with torch.no_grad():
        inputs = torch.cat([start, rollouts.tokens[:, :-1]], 1)
        hidden = policy.hidden_states(policy.encode(prompts), rollouts.prompt_index, inputs)[rollouts.mask]
        probabilities = policy.projection().logits(hidden).softmax(1)
    ends = probabilities[:, policy.eos_tokens[0]]
    assert float(ends.mean()) == pytest.approx(1 / 8, rel=0.05)
    assert float(ends.std() / ends.mean()) < 0.25
    assert float(probabilities[:, policy.pad_token].max()) == 0


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_draws_the_same_lengths(name: str, lengths: dict[str, list[int]]):
    # 3 runs x 8 prompts x 40 samples = 960 lengths with a standard deviation of 4.0: standard error 0.13 around 6.39;
    # 12 tokens, the last of them EOS or not, are what (7 / 8) ** 11 = 0.230 of the samples have, standard error 0.014
    drawn = lengths[name]
    assert len(drawn) == 960
    assert statistics.fmean(drawn) == pytest.approx(6.389, abs=0.6)
    assert min(drawn) == 1
    assert max(drawn) == 12
    assert drawn.count(12) / 960 == pytest.approx(0.230, abs=0.06)
    assert lengths_agree(drawn, lengths["esrl"])


def test_another_seed_draws_other_samples_and_the_same_seed_the_same(folders: dict[str, Path]):
    for name in ("esrl", "generate"):  # CTranslate2 is seeded once in a process
        contestant = CONTESTANTS[name](job(name, folders[name]))
        first, again, other = (contestant.run(seed, num_prompts=2)() for seed in (1, 1, 2))
        assert first == again
        assert first != other
        assert len(first) == 2 * WORKLOAD.samples


def test_lengths_that_follow_another_law_are_told_apart():
    # means 10 and 11, standard deviation 1, 200 of each: standard error of the difference 0.1, ten of them
    assert not lengths_agree([9, 11] * 100, [10, 12] * 100)
    # means 10 and 10.2: two
    assert lengths_agree([9, 11] * 100, [9, 11] * 80 + [10, 12] * 20)


@pytest.fixture(scope="module")
def converted(make_policy: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[MarianPolicy, Path]:
    """A model whose biases are all other than 0, and its conversion."""
    root = tmp_path_factory.mktemp("converted")
    policy = make_policy(torch.float32)
    policy.model.final_logits_bias[0, policy.pad_token] = -1e9
    policy.save(root / "model")
    convert_to_ctranslate2(root / "model", root / "float32", "float32")
    return policy, root / "float32"


def ragged(prompts: Prompts, folder: Path) -> CTranslate2:
    """CTranslate2 with the prompts' real tokens, which differ in number."""
    source = [row[keep].tolist() for row, keep in zip(prompts.input_ids, prompts.mask, strict=True)]
    return CTranslate2(
        Job(
            contestant="ctranslate2-float32",
            kind="sample",
            folder=str(folder),
            source=source,
            samples=1,
            max_new_tokens=20,
            threads=1,
        )
    )


def as_pieces(rollouts: Rollouts, folder: Path) -> list[list[str]]:
    pieces = ctranslate2_pieces(folder)
    rows = zip(rollouts.tokens.tolist(), rollouts.lengths.tolist(), strict=True)
    return [[pieces[token] for token in row[:length]] for row, length in rows]


def test_ctranslate2_decodes_greedily_what_the_engine_does(converted: tuple[MarianPolicy, Path], prompts: Prompts):
    policy, folder = converted
    contestant = ragged(prompts, folder)
    theirs = [result.hypotheses[0] for result in contestant.translate(contestant.source, sampling_topk=1)]
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=20), 1)
    ours = as_pieces(sampler.sample(prompts, SamplingPlan.greedy(len(prompts))), folder)
    assert theirs == ours
    assert ["</s>"] in ours  # a sample may end at once, which CTranslate2 forbids by default
    assert 20 in {len(row) for row in ours}


def test_ctranslate2_scores_the_engines_samples_as_the_engine_does(
    converted: tuple[MarianPolicy, Path], prompts: Prompts
):
    # Random models decode greedily in circles, so the distribution itself is compared, along varied samples.
    policy, folder = converted
    contestant = ragged(prompts, folder)
    plan = SamplingPlan(
        num_samples=torch.full((len(prompts),), 4), temperature=torch.full((len(prompts),), 2.0, dtype=torch.float64)
    )
    rollouts = EngineSampler(policy, SamplingConfig(max_new_tokens=20), 1).sample(prompts, plan)
    ended = rollouts.finished.nonzero()[:, 0].tolist()  # score_batch adds EOS itself
    samples = as_pieces(rollouts, folder)
    sources = [contestant.source[i] for i in rollouts.prompt_index.tolist()]
    scores = contestant.translator.score_batch([sources[i] for i in ended], [samples[i][:-1] for i in ended])
    theirs = torch.tensor([value for score in scores for value in score.log_probs])
    ours = rollouts.log_probs[ended][rollouts.mask[ended]]
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=0)
    assert len(ours) > 100
    assert float(ours.std()) > 0.5


def test_speedup_is_the_median_of_the_ratios_within_a_round():
    # 100 tokens a round; seconds 1, 2, 4 against 2, 2, 16: ratios 2, 1, 4. The ratio of the medians would be 1.
    ours = Measured(seconds=[1, 2, 4], lengths=[[60, 40]] * 3)
    theirs = Measured(seconds=[2, 2, 16], lengths=[[50, 50]] * 3)
    row = stage_one_row(Result(WORKLOAD, 1000, {"esrl": ours, "generate": theirs}), "generate")
    assert row["esrl_speedup"] == 2
    assert row["tokens_per_second"] == {"median": 50, "min": 6.25, "max": 50}
    assert row["mean_length"] == 50


def test_seconds_of_a_step_are_those_of_one_run():
    # two rounds of 2 and 4 runs: 1.5 and 1 s a run against 6 and 5; the ratios are 4 and 5
    ours = Measured(seconds=[3, 4], runs=[2, 4], lengths=[[50], [90]], stages=[{"score": 2.0}, {"score": 4.0}])
    theirs = Measured(seconds=[6, 5], runs=[1, 1], lengths=[[50], [90]], stages=[{"score": 6.0}, {}])
    row = step_row(Result(WORKLOAD, 1000, {"esrl": ours, "naive": theirs}), "naive")
    assert row["seconds"] == {"median": 5.5, "min": 5, "max": 6}
    assert row["esrl_speedup"] == 4.5
    assert row["seconds_per_token"] == pytest.approx(11 / 140)
    assert row["stages"] == {"score": 3.0}
    assert (row["rows"], row["prompts"]) == (320, 8)


@pytest.fixture(scope="module")
def steps(folders: dict[str, Path]) -> dict[str, StepContestant]:
    return {name: build(job(name, folders["esrl"], "step")) for name, build in STEPS.items()}


def gradients_of(contestant: StepContestant, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], list[int]]:
    """What a step hands to the optimizer, which is kept from it."""
    found: list[torch.Tensor] = []
    parameters = contestant.optimizer.parameters

    def look(_: float) -> float:
        found.extend(parameter.grad.clone() for parameter in parameters)
        return 0.0

    monkeypatch.setattr(contestant.optimizer, "scale_and_clip", look)
    monkeypatch.setattr(contestant.optimizer, "step", lambda rate: None)
    return found, contestant.run(seed=3)()


@pytest.mark.parametrize("name", ["esrl", "naive", "conventional-reinforce"])
def test_a_single_sample_has_a_gradient(name, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """Minimum risk over one sample has none, and ours would then have nothing to do."""
    contestant = STEPS[name](dataclasses.replace(job(name, folders["esrl"], "step"), samples=1))
    gradients, _ = gradients_of(contestant, monkeypatch)
    # of every layer of the encoder and the decoder
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_the_steps_do_the_same_work(steps: dict[str, StepContestant], monkeypatch: pytest.MonkeyPatch):
    """Ours and the conventional one draw the same samples and have the same gradient; REINFORCE has another one."""
    results = {name: gradients_of(contestant, monkeypatch) for name, contestant in steps.items()}
    assert results["esrl"][1] == results["conventional-mrt"][1] == results["conventional-reinforce"][1]
    largest = max(float(gradient.abs().max()) for gradient in results["esrl"][0])
    assert largest > 0
    for ours, theirs in zip(results["esrl"][0], results["conventional-mrt"][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * largest)
    other = max(float(gradient.abs().max()) for gradient in results["conventional-reinforce"][0])
    assert other != pytest.approx(largest, rel=0.01)
    assert lengths_agree(results["naive"][1], results["esrl"][1])
    # eq. 8 with capabilities 0, 1/8, ... 7/8, which sum to 3.5: 40 - .3 * 8 * 40 * cap / 3.5, rounded up
    assert len(results["esrl-dynamic"][1]) == sum(math.ceil(40 - 96 * i / 28) for i in range(8))
    for contestant in steps.values():
        assert contestant.stages.keys() == {"sample", "reward", "score", "update"}
        assert all(float(parameter.grad.abs().max()) == 0 for parameter in contestant.optimizer.parameters)


def test_the_naive_step_scores_what_the_engine_recorded(steps: dict[str, StepContestant]):
    naive = steps["naive"]
    prompts = as_prompts(WORKLOAD.source())
    plan = SamplingPlan(num_samples=torch.full((8,), 5), temperature=torch.ones(8))
    rollouts = naive.sampler.sample(prompts, plan)
    torch.testing.assert_close(score_padded(naive.policy, prompts, rollouts), rollouts.log_probs, rtol=0, atol=1e-5)


def test_a_step_leaves_the_model_as_it_was(steps: dict[str, StepContestant]):
    """At a rate of 1e-12 nothing moves by more than float32 can show of it: every round has the same law of lengths."""
    contestant = steps["esrl"]
    before = [parameter.detach().clone() for parameter in contestant.optimizer.parameters]
    contestant.run(seed=5)
    for parameter, old in zip(contestant.optimizer.parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=0, atol=1e-11)
    assert contestant.optimizer.adam.state


def test_peak_memory_sees_what_was_freed_and_starts_anew():
    # 2 ** 24 float32 numbers are 64 MB
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = PeakMemory(uses_torch=True)
    block = torch.ones(2**24, device=device)
    del block
    assert 62 < memory.peak() < 80
    again = PeakMemory(uses_torch=True)
    assert not again.resettable or again.peak() < 16


def test_a_waiting_contestant_gives_much_memory_back_and_keeps_little(monkeypatch):
    memory, released = PeakMemory(uses_torch=False), []
    monkeypatch.setattr(worker_module, "_give_back", lambda: released.append(True))
    monkeypatch.setattr(memory, "cuda", False)
    monkeypatch.setattr(memory, "resettable", True)
    resident = memory.rest
    monkeypatch.setattr(memory, "_rest", lambda: resident + 2 * 2**30)
    memory.release()
    assert not released
    resident += 1
    memory.release()
    assert released


def test_command_prints_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Real processes; CTranslate2 is made to look as if it were not installed, and is reported as such."""
    monkeypatch.setitem(run_module.MODELS, "small", TINY)
    monkeypatch.setattr(measure_module, "installed", lambda package: False)
    config = BenchmarkConfig(
        only=("stage-one", "step"), models=("small",), samples=(3,), repetitions=2, threads=1, json=True
    )
    assert run_command(config) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)  # fails on anything before or behind the object
    assert output.out.count("\n") == 1
    assert {row["contestant"] for row in result["stage_one"]} == {"esrl", "generate"}
    for row in result["stage_one"]:
        assert (row["model"], row["samples"]) == ("small", 3)
        assert "16 prompts of 20 tokens x 3 samples of at most 60 tokens" in row["workload"]
        rate = row["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert row["peak_memory_mb"] >= 0
        # at least 2 rounds x 48 samples, mean 8, standard deviation 7.5: standard error 0.8 or less
        assert 4 < row["mean_length"] < 12
        assert row["lengths_agree"]
    assert {row["contestant"] for row in result["step"]} == set(STEPS)
    for row in result["step"]:
        assert row["seconds"]["min"] > 0 and row["peak_memory_mb"] >= 0 and row["lengths_agree"]
    assert {row["contestant"] for row in result["not_run"]} == {"ctranslate2-float32", "ctranslate2-int8"}
    assert all("not installed; pip install" in row["reason"] for row in result["not_run"])
    assert result["machine"]["threads"] == 1
    for word in ("esrl", "generate", "conventional-mrt", "not run: ctranslate2-int8"):
        assert word in output.err


def test_a_contestant_that_fails_is_reported_with_its_reason(tmp_path: Path):
    measured = take_turns([job("generate", tmp_path / "nowhere")], 1, lambda _: None)["generate"]
    assert measured.failure is not None
    assert "nowhere: no such folder" in measured.failure
    assert measured.seconds == []


def test_a_contestant_that_is_killed_is_reported_with_its_signal(tmp_path: Path):
    with ContestantProcess(job("esrl", tmp_path)) as process:
        process.process.kill()
        with pytest.raises(ContestantFailure, match="died of signal 9, which the system sends when memory runs out"):
            process.ask({"run": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"only": ("stage-on",)}, "only holds 'stage-on', which is not known. Did you mean 'stage-one'"),
        ({"models": ("huge",)}, "models holds 'huge', which is not known. Known: small, base"),
        ({"models": ()}, "models is empty"),
        ({"samples": ()}, "samples is empty"),
        ({"samples": (5, 0)}, "samples is 0; it must be 1 or more"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**values)


@pytest.fixture
def meter() -> Meter:
    return Meter(repetitions=1, threads=1, progress=lambda _: None)


def test_memory_and_scale_vary_one_thing_at_a_time(monkeypatch: pytest.MonkeyPatch, meter: Meter):
    """Real processes on the tiny model; the largest workloads are made smaller."""
    monkeypatch.setitem(step_module.MODELS, "small", TINY)
    monkeypatch.setattr(step_module, "MEMORY_SAMPLES", (2, 4))
    monkeypatch.setattr(step_module, "MEMORY_VOCABULARIES", (300,))
    monkeypatch.setattr(step_module, "MEMORY_LENGTHS", (9,))
    rows, not_run = step_module.memory(["small"], None, meter)
    assert not not_run
    varied = [
        (row["varied"], row["contestant"], row["samples"], row["vocabulary"], row["max_new_tokens"]) for row in rows
    ]
    assert varied == [
        ("samples", "esrl", 2, 600, 60),
        ("samples", "conventional-mrt", 2, 600, 60),
        ("samples", "esrl", 4, 600, 60),
        ("samples", "conventional-mrt", 4, 600, 60),
        ("vocabulary", "esrl", 4, 300, 60),
        ("max_new_tokens", "esrl", 4, 600, 9),
        ("max_new_tokens", "conventional-mrt", 4, 600, 9),
    ]
    assert rows[-1]["mean_length"] > 8.9  # all samples reach the limit
    monkeypatch.setattr(step_module, "SCALE_ROWS", (32,))
    monkeypatch.setattr(step_module, "SCALE_PROMPTS", (4,))
    rows, _ = step_module.scale(["small"], None, meter)
    assert [(row["varied"], row["prompts"], row["rows"]) for row in rows] == [("rows", 16, 32), ("prompts", 4, 8)]
    assert all(row["seconds_per_token"] > 0 for row in rows)


def test_a_run_that_is_stopped_keeps_the_sections_it_has_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def stopped(*_: object) -> Any:
        raise KeyboardInterrupt

    row = {"metric": "bleu"}
    monkeypatch.setitem(run_module.SECTIONS, "rewards", lambda *_: ([row], [{"contestant": "x", "reason": "y"}]))
    monkeypatch.setitem(run_module.SECTIONS, "limit", stopped)
    output = tmp_path / "results.json"
    output.write_text("an older one")
    with pytest.raises(KeyboardInterrupt):
        run_module.benchmark(BenchmarkConfig(only=("rewards", "limit"), output=output))
    kept = json.loads(output.read_text())
    assert kept["rewards"] == [row] and "limit" not in kept
    assert kept["not_run"] == [{"contestant": "x", "reason": "y"}] and kept["machine"]["threads"] >= 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_step_of_grpo_beside_trls(monkeypatch: pytest.MonkeyPatch, meter: Meter):
    """Real processes on a tiny causal model: the same law of lengths, and samples that end everywhere."""
    pytest.importorskip("trl")
    tiny = dataclasses.replace(
        language_module.MODEL, sizes=Preset(width=32, layers=2, heads=2, inner_width=48), vocabulary=300, mean_length=6
    )
    monkeypatch.setattr(language_module, "MODEL", tiny)
    monkeypatch.setattr(language_module, "PROMPT_TOKENS", (5,))
    rows, not_run = language_module.language_model([], (4,), meter)
    assert not not_run
    assert [row["contestant"] for row in rows] == ["esrl", "trl", "trl-checkpointing"]
    assert all(row["lengths_agree"] and 3 < row["mean_length"] < 9 for row in rows)
    assert all(row["tokens_per_second"]["median"] > 0 for row in rows)


def test_rewards_agree_with_the_libraries(monkeypatch: pytest.MonkeyPatch, meter: Meter):
    monkeypatch.setattr("esrl.benchmark.rewards._SECONDS", 0.05)
    rows, not_run = rewards([], None, meter)
    assert not not_run
    assert [(row["metric"], row["text"]) for row in rows] == [
        ("bleu", "sentence"),
        ("chrf", "sentence"),
        ("rouge_l", "sentence"),
        ("rouge_l", "summary"),
    ]
    for row in rows:
        assert row["largest_difference"] < 1e-9
        assert row["ratio"] > 0
    assert rows[3]["words"] > 4 * rows[2]["words"]


def test_the_limit_counts_operations(monkeypatch: pytest.MonkeyPatch, meter: Meter):
    monkeypatch.setitem(step_module.MODELS, "small", TINY)
    monkeypatch.setattr("esrl.benchmark.limit._SECONDS", 0.05)
    monkeypatch.setattr("esrl.benchmark.limit._SIZES", (256,))
    monkeypatch.setattr("esrl.benchmark.limit._COPIED", 1 << 20)
    rows, _ = limit(["small"], (3,), meter)
    native = kernels()
    tiles = ["matrix products, ours on the matrix unit"] if native is not None and native.tiles else []
    products = ["matrix products", "matrix products, the fastest call", *tiles]
    assert [row["quantity"] for row in rows] == [*products, "copy", "stage one, small", "stage two, small"]
    assert all(row["giga_per_second"] > 0 for row in rows)
    assert rows[0]["giga_per_second"] <= rows[1]["giga_per_second"]
    assert all(0 < row["share_of_fastest"] <= row["share"] < 1 for row in rows[-2:])


def test_something_else_is_done_before_each_round(tmp_path: Path):
    done: list[str] = []
    take_turns([job("generate", tmp_path)], 2, done.append, before_round=lambda: done.append("before"))
    rounds = [message for message in done if "warm-up" not in message]
    assert rounds == ["before", "generate: round 1 of 2", "before", "generate: round 2 of 2"]


def test_operations_per_token_are_those_of_the_matrix_products(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
):
    """Stage one: 2 operations for each weight of the decoder and the projection, and some for attention."""
    with ContestantProcess(job("esrl", folders["esrl"], "step")) as process:
        process.ask(dataclasses.asdict(job("esrl", folders["esrl"], "step")))
        operations = process.ask({"count": 1})["operations"]
    assert "Warning" not in capfd.readouterr().err
    # query, key, value and output of both attentions but for the shared keys and values, two of width x inner width,
    # and the projection: 6 * 32 * 32 + 2 * 32 * 64 + 600 * 32 = 29,440 weights; rows that have ended but not left the
    # batch, the encoder (10 tokens for 40 samples) and attention come on top
    assert 1.0 < operations["sample"] / (2 * 29_440) < 1.35
    # forward once, backward twice
    assert 2.9 < operations["score"] / (2 * 29_440) < 4.0
    assert operations["reward"] == operations["update"] == 0
