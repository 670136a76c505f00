"""How the parts of the RL step are put together: capability, plan and loss of every kind, recomputed from the samples;
what is counted, logged, handed to the reward and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest
import torch
from run_helpers import make_task, own_reward, rl_config, saved_state, steps_of, values_of

from esrl import commands
from esrl.algorithm.allocation import AllocationConfig, allocate
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.capability import CapabilityConfig
from esrl.algorithm.duplicates import select_rows
from esrl.algorithm.objectives import ObjectiveConfig
from esrl.config import METHODS, build, merge
from esrl.errors import RewardError
from esrl.plan import PlanConfig, plan
from esrl.rewards.calling import StepCounts
from esrl.rewards.text import ChrF, RougeL
from esrl.sampling.engine import EngineSampler
from esrl.training import rl as rl_module
from esrl.training.figures import _averaged
from esrl.training.gradient import GradientConfig
from esrl.training.method import Method, StepConfig, check_parts
from esrl.training.planning import Rewards
from esrl.training.processes import Processes
from esrl.training.rl import RLTask
from esrl.types import Rollouts, SamplingPlan

QUEUE, ALPHA, CLIP = 30, 0.005, 10.0
EVERYTHING = {"step": {"batch_size": 24}}  # one step an epoch
COOL = {"allocation": {"temperature_rule": "fixed", "fixed_temperature": 0.6}}  # so that l and l at tau differ
KEEP = {"step": {"duplicates": "keep"}}
ONCE = {"development": {"data": False}, "training": {"save_steps": 100, "eval_on_start": False, "max_steps": 5}}

REWARDS = """
def falls(completions, trainer_state, **columns):
    return [-1.0 if trainer_state.global_step == 1 else 0.5] * len(completions)

def silent_on_one(source, completions, **columns):
    first = min(source)
    return [None if one == first else len(one) / 100 for one in source]

def tells(completions, trainer_state, log_metric, log_extra, **columns):
    log_metric("seen_step", trainer_state.global_step)
    log_metric("seen_epoch", trainer_state["epoch"])
    log_extra("length", [len(text) for text in completions])
    log_extra("odd", [float("nan"), *[{"no": "JSON number"}] * (len(completions) - 1)])
    return [len(text) / 100 for text in completions]
"""


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SamplingPlan, Rollouts]]:
    """Every plan that stage one was given from now on, and what it drew."""
    seen = []
    real = EngineSampler.sample

    def sample(self: Any, prompts: Any, plan: SamplingPlan, *args: Any) -> Rollouts:
        rollouts = real(self, prompts, plan, *args)
        seen.append((plan, rollouts))
        return rollouts

    monkeypatch.setattr(EngineSampler, "sample", sample)
    return seen


def rows_of(rollouts: Rollouts, prompt: int) -> list[int]:
    return [row for row, owner in enumerate(rollouts.prompt_index.tolist()) if owner == prompt]


def real_tokens(values: torch.Tensor, rollouts: Rollouts, row: int) -> list[float]:
    return values[row][rollouts.mask[row]].tolist()


def between_0_and_1(scores: list[float]) -> list[float]:
    return [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]


KINDS: dict[str, dict[str, Any]] = {
    "eq. 6": {},
    "eq. 7": {"capability": {"estimator": "entropy"}},
    "eq. 7, contrast": {"capability": {"estimator": "entropy", "contrast": "minmax"}},
    "contrast": {"capability": {"contrast": "minmax"}},
    **{f"map {name}": {"capability": {"capability_map": name}} for name in ("sigmoid_z", "minmax", "rank")},
    "variance": {"allocation": {"allocator": "variance"}},
    "importance weights": {"objective": {"importance_weights": True}},
    "scores at tau": {"objective": {"score_temperature": "sampling"}},
}


def mapped(scores: list[float], task: RLTask, queue: list[float]) -> list[float]:
    """Method.md, section 2."""
    config = task.method.capability
    if config.capability_map == "sigmoid_z":
        scores = [1 / (1 + math.exp(-(score - fmean(queue)) / pstdev(queue))) for score in scores]
    elif config.capability_map == "rank":
        scores = [sum(other < score for other in scores) / (len(scores) - 1) for score in scores]
    if config.capability_map == "minmax" or config.contrast == "minmax":
        scores = between_0_and_1(scores)
    return scores


def loss_of(rollouts: Rollouts, rewards: list[float], baseline: float, task: RLTask, *, weighted: bool) -> float:
    """Eq. 3, 4, 5, prompt by prompt: MRT where there are several samples, REINFORCE where there is one."""
    at_tau = task.method.objective.score_temperature == "sampling"
    scored = rollouts.sampling_log_probs if at_tau else rollouts.log_probs
    total = 0.0
    for prompt in sorted(set(rollouts.prompt_index.tolist())):
        rows = rows_of(rollouts, prompt)
        logs = [math.fsum(real_tokens(scored, rollouts, row)) for row in rows]
        if len(rows) == 1:
            total += -(rewards[rows[0]] - baseline) * logs[0]
            continue
        drawn = [math.fsum(real_tokens(rollouts.sampling_log_probs, rollouts, row)) for row in rows]
        weights = [min(math.exp(a - b), CLIP) if weighted else 1.0 for a, b in zip(logs, drawn, strict=True)]
        q = [math.exp(ALPHA * (log - max(logs))) * weight for log, weight in zip(logs, weights, strict=True)]
        risk = [part / math.fsum(q) * (baseline - rewards[row]) for part, row in zip(q, rows, strict=True)]
        total += math.fsum(risk) / ALPHA
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_capability_plan_and_loss_follow_from_the_samples(assets, monkeypatch, kind):
    """The second epoch of two steps: Cap_x of the first's samples, the plan from it, the loss of the second's."""
    seen = watch(monkeypatch)
    with make_task(assets, EVERYTHING, KEEP, COOL, KINDS[kind]) as task:
        prompts = [task.prompts(epoch, 0) for epoch in (0, 1)]
        task.compute(0, 0).commit()
        update = task.compute(1, 0)
        lines = update.commit()
    (_, first), (plan, second) = seen[-2:]  # the second epoch decodes nothing greedily
    rewards = [
        ChrF()(
            completions=list(rollouts.texts),
            reference=[batch.columns["reference"][i] for i in rollouts.prompt_index.tolist()],
        )
        for rollouts, batch in zip((first, second), prompts, strict=True)
    ]
    score, spread = {}, {}
    for i, example in enumerate(prompts[0].example_ids):
        rows = rows_of(first, i)
        if task.method.capability.estimator == "entropy":
            tokens = [log for row in rows for log in real_tokens(first.log_probs, first, row)]
            score[example] = 1 + fmean(math.exp(log) * log for log in tokens)
        else:
            score[example] = fmean(rewards[0][row] for row in rows)
        spread[example] = stdev([rewards[0][row] for row in rows]) if len(rows) > 1 else math.nan
    ids = prompts[1].example_ids
    capability = mapped([score[example] for example in ids], task, rewards[0][-QUEUE:])
    if task.method.allocation.needs_capability:
        assert [line["capability"] for line in lines] == pytest.approx(capability, rel=1e-6)
        assert len(set(plan.num_samples.tolist())) > 1 or kind == "eq. 7"  # which hardly varies
    else:
        assert [line["capability"] for line in lines] == [None] * 24
    expected = allocate(
        torch.tensor(capability, dtype=torch.float64),
        task.method.allocation,
        reward_std=torch.tensor([spread[example] for example in ids], dtype=torch.float64),
    )
    assert plan.num_samples.tolist() == expected.num_samples.tolist()
    baseline = fmean((rewards[0] + rewards[1])[-QUEUE:])
    weighted = task.method.objective.importance_weights
    loss = loss_of(second, rewards[1], baseline, task, weighted=weighted)
    assert update.loss == pytest.approx(loss, rel=1e-4, abs=1e-3)  # float32
    if weighted:
        assert abs(loss - loss_of(second, rewards[1], baseline, task, weighted=False)) > 0.01


def with_copies(rollouts: Rollouts) -> Rollouts:
    """The first prompt's samples all the same and cut at the limit; all others finished."""
    first = rollouts.prompt_index == 0
    rows = torch.arange(rollouts.num_rows).masked_fill(first, 0)
    return replace(select_rows(rollouts, rows.tolist()), sample_index=rollouts.sample_index, finished=~first)


@pytest.mark.parametrize(("rule", "kind"), [*((r, "two_stage") for r in ("merge", "keep", "drop")), ("merge", "graph")])
def test_figures_are_those_of_the_samples_as_drawn(assets, monkeypatch, rule, kind):
    """Whatever becomes of duplicates afterwards, and whichever way the gradient is taken."""
    seen: list[Rollouts] = []

    def noted(rollouts: Rollouts) -> Rollouts:
        seen.append(with_copies(rollouts))
        return seen[-1]

    real_sample, real_graph = EngineSampler.sample, rl_module.sample_with_graph

    def with_graph(*args: Any) -> tuple[Rollouts, torch.Tensor]:
        rollouts, log_probs = real_graph(*args)
        return noted(rollouts), log_probs

    monkeypatch.setattr(EngineSampler, "sample", lambda self, *args: noted(real_sample(self, *args)))
    monkeypatch.setattr(rl_module, "sample_with_graph", with_graph)
    changes = {"step": {"duplicates": rule}, "gradient": {"kind": kind}, "allocation": {"allocator": "uniform"}}
    with make_task(assets, changes) as task:
        metrics = task.compute(0, 0).metrics
    (drawn,) = seen
    owner = drawn.prompt_index.tolist()
    different = {(owner[row], *real_tokens(drawn.tokens, drawn, row)) for row in range(24)}
    assert drawn.num_rows == 24 and len(different) < 24  # 6 prompts, 4 samples each
    assert metrics["truncated_share"] == pytest.approx(4 / 24)
    assert metrics["unique_share"] == pytest.approx(len(different) / 24)
    assert metrics["tokens_sampled"] == int(drawn.mask.sum())


def test_the_reward_is_told_the_step_and_what_it_tells_is_logged(assets, tmp_path):
    with make_task(assets, own_reward(tmp_path, REWARDS, "tells"), KEEP) as task:
        task.compute(0, 0).commit()
        update = task.compute(1, 2)
        lines = update.commit()
    assert (update.metrics["seen_step"], update.metrics["seen_epoch"]) == (1 * 4 + 2, 1)
    samples = [sample for line in lines for sample in line["samples"]]
    assert [sample["extra"]["length"] for sample in samples] == [len(sample["text"]) for sample in samples]
    assert samples[0]["extra"]["odd"] == "nan"
    assert samples[-1]["extra"]["odd"] == "{'no': 'JSON number'}"
    json.dumps(lines, allow_nan=False)


def test_logged_figures_are_averaged_over_processes_by_their_rows(monkeypatch):
    processes = Processes()
    monkeypatch.setattr(processes, "gather", lambda own: [*own, (1, {"share": 0.9, "other": 2.0}), (0, {})])
    rewards = Rewards(torch.zeros(3), torch.ones(3, dtype=torch.int64), {"share": 0.5})
    # (3 * .5 + 1 * .9) / 4 = .6
    assert _averaged(rewards, processes) == pytest.approx({"share": 0.6, "other": 2.0})


def test_a_capability_that_falls_below_0_stops_the_run_before_the_step(assets, tmp_path):
    """The first step's rewards are .5, the second's greedy ones -1: the first step is kept, the error says where."""
    run = tmp_path / "run"
    with pytest.raises(RewardError, match=r"the capability of example \S+ is -1.0.*capability_map") as caught:
        commands.rl(rl_config(assets, run, own_reward(tmp_path, REWARDS, "falls"), ONCE))
    assert saved_state(run)["step"] == len(steps_of(run)) == 1
    with make_task(assets) as task:
        assert any(example in str(caught.value) for example in task.prompts(0, 1).example_ids)


@pytest.mark.parametrize("how", ["identity", "minmax"])
def test_a_prompt_whose_first_estimate_abstains_is_taken_for_average(assets, tmp_path, how):
    reward = own_reward(tmp_path, REWARDS, "silent_on_one")
    with make_task(assets, reward, EVERYTHING, {"capability": {"capability_map": how}}) as task:
        lines = task.compute(0, 0).commit()
    silent = min(range(24), key=lambda i: lines[i]["prompt"])
    others = [line["capability"] for i, line in enumerate(lines) if i != silent]
    assert lines[silent]["capability"] == pytest.approx(fmean(others)) and len(set(others)) > 1


@pytest.mark.parametrize(("estimator", "calls"), [("metric", 2), ("entropy", 1)])
def test_first_estimates_by_entropy_ask_for_no_reward(assets, monkeypatch, estimator, calls):
    with make_task(assets, {"capability": {"estimator": estimator}}) as task:
        scored: list[int] = []
        real = task.reward.score

        def score(prompts: Sequence[str], *args: Any) -> Any:
            scored.append(len(prompts))
            return real(prompts, *args)

        monkeypatch.setattr(task.reward, "score", score)
        update = task.compute(0, 0)
    assert len(scored) == calls and update.metrics["planned_from_memory"] == 0


def test_a_dropped_prompt_comes_back_after_an_epoch(assets):
    """floor(.3 * 24) = 7 are dropped each time. In the second epoch their records are first estimates of the first; in
    the third the records of those that the second dropped are too old."""
    changes = {"allocation": {"eliminate": "prompts", "max_samples": 1}}
    shares, known = [], []
    with make_task(assets, EVERYTHING, changes) as task:
        for epoch in range(3):
            update = task.compute(epoch, 0)
            update.commit()
            known.append(update.metrics["planned_from_memory"])
            shares.append(update.metrics["num_samples_histogram"])
            # eq. 9 at k = k_max; tau of a prompt without samples is no temperature of anything
            assert update.metrics["temperature_mean"] == pytest.approx(1.0)
    assert shares == [{"0": 7, "1": 17}] * 3
    assert known == pytest.approx([0, 1, 17 / 24])


def test_an_epochs_batches_are_made_once(assets, monkeypatch):
    made: list[int] = []
    real = rl_module.shuffled_batches
    monkeypatch.setattr(rl_module, "shuffled_batches", lambda *args: made.append(args[-1]) or real(*args))
    with make_task(assets) as task:
        for epoch, batch in ((0, 0), (0, 1), (0, 3), (1, 0)):
            task.prompts(epoch, batch)
    assert made == [0, 1]


NEGATIVE = {"reward": {"names": ["chrf", "rouge_l"], "weights": [1.0, -0.5]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (NEGATIVE, r"reward.weights holds -0.5, .* set capability.capability_map"),
        ({"gradient": {"kind": "graph"}, "step": {"duplicates": "drop"}}, 'duplicates cannot be "drop"'),
    ],
)
def test_parts_that_do_not_go_together_are_refused(assets, changes, message):
    with pytest.raises(ValueError, match=message), make_task(assets, changes):
        pass


@pytest.mark.parametrize("capability", [{"capability_map": "rank"}, {"contrast": "minmax"}, {"estimator": "entropy"}])
def test_negative_weights_are_fine_where_capability_is_not(assets: Path, capability: dict[str, str]):
    with make_task(assets, NEGATIVE, {"capability": capability}) as task:
        assert math.isfinite(task.compute(0, 0).loss)


def parts_with(capability: dict[str, Any], allocation: dict[str, Any] | None = None) -> Method:
    return Method(
        allocation=AllocationConfig(**(allocation or {})),
        capability=CapabilityConfig(**capability),
        objective=ObjectiveConfig(),
        baseline=BaselineConfig(),
    )


@pytest.mark.parametrize("capability", [{}, {"capability_map": "identity"}])
def test_a_reward_models_scores_are_no_capabilities_as_they_are(capability):
    with pytest.raises(ValueError, match=r'"model", whose scores may be negative.*set capability.estimator = "reward"'):
        check_parts(parts_with(capability), StepConfig(), GradientConfig(), ("bleu", "model"), (1.0, 1.0))


@pytest.mark.parametrize(
    ("capability", "allocation"),
    [
        ({"estimator": "reward"}, {}),
        ({"capability_map": "rank"}, {}),
        ({"contrast": "minmax"}, {}),
        ({"estimator": "entropy"}, {}),
        ({}, {"allocator": "uniform"}),
    ],
)
def test_mapped_or_not_needed_they_are(capability, allocation):
    check_parts(parts_with(capability, allocation), StepConfig(), GradientConfig(), ("model",), (1.0,))


def z_scores(values: list[float]) -> list[float]:
    return [(value - fmean(values)) / pstdev(values) for value in values]


@pytest.mark.parametrize("normalise", ["each", "sum"])
def test_normalised_rewards_are_learnt_from_and_nothing_else_is_made_of_them(assets, monkeypatch, normalise):
    """REINFORCE from z-scores over the step with a baseline of 0; figures, capability and queue from the plain sum."""
    seen = watch(monkeypatch)
    reward = {"reward": {"names": ["chrf", "rouge_l"], "weights": [1.0, 2.0], "normalise": normalise}}
    with make_task(assets, EVERYTHING, KEEP, reward, {"objective": {"kind": "reinforce"}}) as task:
        prompts = task.prompts(0, 0)
        update = task.compute(0, 0)
        lines = update.commit()
    (_, greedy), (_, rollouts) = seen

    def parts(drawn: Rollouts) -> list[list[float]]:
        references = [prompts.columns["reference"][i] for i in drawn.prompt_index.tolist()]
        return [metric(completions=list(drawn.texts), reference=references) for metric in (ChrF(), RougeL())]

    first, second = parts(rollouts)
    raw = [a + 2 * b for a, b in zip(first, second, strict=True)]
    signal = [a + 2 * b for a, b in zip(z_scores(first), z_scores(second), strict=True)]
    signal = z_scores(raw) if normalise == "sum" else signal
    assert update.metrics["reward_mean"] == pytest.approx(fmean(raw))
    assert list(task.queue.values) == pytest.approx(raw[-QUEUE:])
    assert [sample["reward"] for line in lines for sample in line["samples"]] == pytest.approx(raw)
    total = 0.0
    for prompt, example in enumerate(prompts.example_ids):
        rows = rows_of(rollouts, prompt)
        assert task.memory.records[example].score == pytest.approx(fmean(raw[row] for row in rows))
        logs = [math.fsum(real_tokens(rollouts.log_probs, rollouts, row)) for row in rows]
        total -= fmean(signal[row] * log for row, log in zip(rows, logs, strict=True))
    assert update.loss == pytest.approx(total, rel=1e-4, abs=1e-3)  # float32
    # first estimates are plain sums, too
    estimates = [a + 2 * b for a, b in zip(*parts(greedy), strict=True)]
    assert [line["capability"] for line in lines] == pytest.approx(estimates)


def test_every_process_ends_the_rewards_step_alike(assets, monkeypatch):
    """The counts are added up, and what reward models' caches have learnt is joined in the order of processes."""
    ended: list[Any] = []
    with make_task(assets) as task:
        monkeypatch.setattr(task.processes, "gather", lambda own: [*own, (StepCounts(3, 1, 0), {"other": 2.0})])
        monkeypatch.setattr(task.reward, "end_step", lambda *given: ended.append(given))
        task.reward.counts = StepCounts(5, 0, 1)
        task._end_reward_step()
    assert ended == [(StepCounts(8, 1, 1), [{}, {"other": 2.0}])]


def test_a_plan_is_made_for_batches_of_prompts_not_for_updates(assets):
    """Two updates a batch make 8 steps of 24 examples in batches of 6, and there are 4 plans."""
    several = {"method": "grpo", "step": {"updates_per_batch": 2}}
    values = values_of("rl", assets, Path("unused"), several)
    config = build(PlanConfig, merge(METHODS["grpo"], {**values, "steps": 100}), "test")
    assert len(plan(config)["batches"]) == 4
