"""The RL step: what it plans from, remembers, logs and updates, recomputed from its own logs and from the equations."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from run_helpers import NUM_DEV, STEPS, json_lines, make_task, own_reward, rl_config, saved_state, steps_of

from esrl import commands
from esrl.algorithm.allocation import AllocationConfig, allocate
from esrl.data.examples import Example
from esrl.data.readers import load_examples
from esrl.errors import RewardError
from esrl.evaluation.decode import DecodingConfig, decode
from esrl.models.seq2seq import load_policy
from esrl.rewards.text import ChrF
from esrl.sampling.engine import EngineSampler
from esrl.training.checkpoint import unpack_tensors

KEYS = {
    *("step", "epoch", "reward_mean", "reward_std", "num_samples_mean", "num_samples_histogram", "temperature_mean"),
    *("budget_used", "capability_mean", "unique_share", "truncated_share", "mrt_prompts", "reinforce_prompts"),
    *("tokens_sampled", "seconds_sample", "seconds_reward", "seconds_score", "seconds_total", "peak_memory_mb"),
    *("loss", "grad_norm", "learning_rate"),
    # what an honest reading of the first epoch and of abstaining rewards needs
    *("planned_from_memory", "abstained_rows"),
    # what alarms look at: length drift, prompts that teach nothing
    *("length_mean", "equal_reward_share"),
}
KEEP = {"step": {"duplicates": "keep"}}
ESRL = {"allocator": "esrl", "temperature_rule": "paper"}

REWARDS = """
def odd_lengths(completions, **columns):
    return [None if len(text) % 2 else len(text) / 100 for text in completions]

def not_umbrella(source, completions, **columns):
    first = min(source)
    return [None if one == first else len(text) / 100 for one, text in zip(source, completions)]

def nothing(completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of ESRL, every prompt logged."""
    folder = tmp_path_factory.mktemp("rl") / "run"
    commands.rl(rl_config(assets, folder))
    return folder


def lines_by_step(run: Path) -> dict[int, list[dict[str, Any]]]:
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in json_lines(run / "samples.jsonl"):
        steps.setdefault(line["step"], []).append(line)
    return steps


def rewards_of(line: dict[str, Any]) -> list[float]:
    return [sample["reward"] for sample in line["samples"] for _ in range(sample["count"])]


def test_metrics_have_the_promised_keys_and_nothing_else(run):
    rows = steps_of(run)
    assert len(rows) == STEPS and all(row.keys() == KEYS for row in rows)
    logged = {"step", "epoch", "example_id", "prompt", "reference", "num_samples", "temperature", "capability"}
    assert all(line.keys() == logged | {"samples"} for line in json_lines(run / "samples.jsonl"))


def test_an_epoch_visits_every_prompt_once(run):
    lines = json_lines(run / "samples.jsonl")
    for epoch in (0, 1):
        visited = [line["example_id"] for line in lines if line["epoch"] == epoch]
        assert len(visited) == len(set(visited)) == 24
    orders = [[line["example_id"] for line in lines if line["epoch"] == epoch] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_the_figures_of_a_step_follow_from_its_samples(run):
    for row in steps_of(run):
        lines = lines_by_step(run)[row["step"]]
        counts = [line["num_samples"] for line in lines]
        rewards = [reward for line in lines for reward in rewards_of(line)]
        assert [len(rewards_of(line)) for line in lines] == counts
        assert row["reward_mean"] == pytest.approx(fmean(rewards))
        assert row["reward_std"] == pytest.approx(pstdev(rewards))
        assert row["num_samples_mean"] == pytest.approx(fmean(counts))
        assert row["num_samples_histogram"] == {str(k): n for k, n in sorted(Counter(counts).items())}
        # eq. 9: tau = 0.6 + k * 0.4 / 4
        assert [line["temperature"] for line in lines] == pytest.approx([0.6 + 0.1 * k for k in counts])
        assert row["temperature_mean"] == pytest.approx(fmean(0.6 + 0.1 * k for k in counts))
        greedy = 6 * (1 - row["planned_from_memory"])
        assert row["budget_used"] == pytest.approx((sum(counts) + greedy) / (6 * 4))
        assert row["capability_mean"] == pytest.approx(fmean(fmean(rewards_of(line)) for line in lines))
        assert row["unique_share"] == pytest.approx(sum(len(line["samples"]) for line in lines) / sum(counts))
        assert row["mrt_prompts"] == sum(k > 1 for k in counts)
        assert row["reinforce_prompts"] == sum(k == 1 for k in counts)
        assert 0 <= row["truncated_share"] <= 1 and row["abstained_rows"] == 0


def test_tokens_sampled_counts_every_real_token_greedy_ones_too(assets, monkeypatch):
    seen = []
    real = EngineSampler.sample

    def sample(self: Any, *args: Any) -> Any:
        rollouts = real(self, *args)
        seen.append(rollouts)
        return rollouts

    monkeypatch.setattr(EngineSampler, "sample", sample)
    with make_task(assets, KEEP) as task:
        update = task.compute(0, 0)
    assert len(seen) == 2 and len(seen[0].texts) == 6  # first estimates, then the samples
    assert update.metrics["tokens_sampled"] == sum(int(rollouts.lengths.sum()) for rollouts in seen)


def test_the_first_epoch_plans_from_greedy_decodes_and_the_second_from_memory(run, assets):
    rows = steps_of(run)
    assert [row["planned_from_memory"] for row in rows] == [0.0] * 4 + [1.0] * 4
    config = AllocationConfig(max_samples=4)
    # the first step, from the start: greedy outputs of the untrained model, scored by chrF
    first = lines_by_step(run)[1]
    examples = [Example(line["example_id"], {"source": line["prompt"]}) for line in first]
    texts = decode(load_policy(assets / "model"), examples, DecodingConfig(max_new_tokens=10))
    greedy = ChrF()(completions=texts, reference=[line["reference"] for line in first])
    assert [line["capability"] for line in first] == pytest.approx(greedy)
    # the second epoch: eq. 6 of the samples of the first
    remembered = {
        line["example_id"]: fmean(rewards_of(line)) for step in range(1, 5) for line in lines_by_step(run)[step]
    }
    for step, lines in lines_by_step(run).items():
        if step > 4:
            assert [line["capability"] for line in lines] == pytest.approx(
                [remembered[line["example_id"]] for line in lines]
            )
        plan = allocate(torch.tensor([line["capability"] for line in lines]), config)
        assert [line["num_samples"] for line in lines] == plan.num_samples.tolist()


def test_memory_and_queue_hold_what_the_samples_say(run):
    """Eq. 6 of each prompt's last visit; and the last 30 rewards in order, as many as the queue holds."""
    state = saved_state(run)["state.json"]["task"]
    lines = json_lines(run / "samples.jsonl")
    for line in lines[-24:]:
        score, greedy, epoch, number, std = state["memory"][line["example_id"]]
        rewards = rewards_of(line)
        assert score == pytest.approx(fmean(rewards), abs=1e-12)
        assert (greedy, epoch, number) == (False, 1, len(rewards))
        if number > 1:
            assert std == pytest.approx(pstdev(rewards) * math.sqrt(number / (number - 1)), abs=1e-12)
        else:
            assert std is None
    pushed = [reward for line in lines for reward in rewards_of(line)]
    assert state["queue"]["values"] == pushed[-30:]
    assert state["queue"]["total_count"] == len(pushed)
    assert state["queue"]["total_sum"] == pytest.approx(math.fsum(pushed))


def test_computing_a_step_changes_nothing_and_repeats_itself(assets):
    """An interrupted step may be computed again, from the same state, to the same gradient."""
    with make_task(assets) as task:
        task.compute(0, 0).commit()
        before = task.state_dict()
        gradients = []
        for _ in range(2):
            task.model.zero_grad()
            update = task.compute(0, 1)
            gradients.append([parameter.grad for parameter in task.model.parameters() if parameter.grad is not None])
            assert task.state_dict() == before
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
        update.commit()
        assert task.state_dict() != before


def test_the_denominator_is_the_number_of_prompts(assets):
    with make_task(assets, {"step": {"batch_size": 7}}) as task:
        sizes = [task.compute(0, batch).denominator for batch in range(task.num_batches(0))]
    assert sizes == [7, 7, 7, 3]  # 24 prompts


def test_uniform_budget_spends_what_eq_8_would(assets):
    spent: dict[str, list[float]] = {}
    for name in ("esrl", "uniform_budget"):
        with make_task(assets, {"allocation": {"allocator": name, "max_samples": 7}}) as task:
            spent[name] = [task.compute(0, batch).metrics["num_samples_mean"] for batch in range(4)]
    assert spent["esrl"] == spent["uniform_budget"]
    with make_task(assets, {"allocation": {"allocator": "uniform_budget", "max_samples": 7}}) as task:
        histogram = task.compute(0, 0).metrics["num_samples_histogram"]
    counts = [int(k) for k in histogram]
    assert max(counts) - min(counts) <= 1  # spread evenly


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"allocator {name}": {"allocation": {"allocator": name}} for name in ("uniform", "random", "variance")},
    **{f"rounding {name}": {"allocation": {"rounding": name}} for name in ("floor", "nearest", "largest_remainder")},
    **{f"temperature {name}": {"allocation": {"temperature_rule": name}} for name in ("span", "fixed")},
    "eliminate prompts": {"allocation": {"eliminate": "prompts", "max_samples": 1}},
    **{
        f"baseline {name}": {"baseline": {"kind": name}, "objective": {"kind": "reinforce"}}
        for name in ("fifo", "moving_average", "prompt_mean", "leave_one_out", "none")
    },
    **{
        f"entropy {name}": {"capability": {"estimator": "entropy", "entropy_form": name}}
        for name in ("paper", "full_normalised", "sampled_logp", "max_prob")
    },
    "entropy of sequences": {"capability": {"estimator": "entropy", "average": "sequences", "contrast": "minmax"}},
    **{f"map {name}": {"capability": {"capability_map": name}} for name in ("sigmoid_z", "minmax", "rank")},
    "drop duplicates": {"step": {"duplicates": "drop"}},
    "keep duplicates": KEEP,
    "mrt": {"objective": {"kind": "mrt", "group_correction": True}},
    "mrt of mean log-probabilities": {"objective": {"length_normalise": True, "alpha": 1.0, "mrt_scale": "none"}},
    "reinforce, summed": {"objective": {"kind": "reinforce", "reinforce_reduction": "sum"}},
    "importance weights": {"objective": {"importance_weights": True}},
    "scores at tau": {"objective": {"score_temperature": "sampling"}},
    "graph": {"gradient": {"kind": "graph"}},
    "graph, scores at tau": {"gradient": {"kind": "graph"}, "objective": {"score_temperature": "sampling"}},
    "graph, entropy": {"gradient": {"kind": "graph"}, "capability": {"estimator": "entropy"}},
    "dropout": {"gradient": {"dropout": 0.1}},
    "one sample": {"allocation": {"max_samples": 1}},
    "wide batch": {"step": {"batch_size": 100}},
    **{name: {"method": name} for name in ("grpo", "rloo", "ppo")},
    **{f"{name} of ESRL's samples": {"method": name, "allocation": ESRL} for name in ("grpo", "rloo", "ppo")},
    **{f"{name}, one sample": {"method": name, "allocation": {"max_samples": 1}} for name in ("grpo", "rloo", "ppo")},
    **{f"{name}, graph": {"method": name, "gradient": {"kind": "graph"}} for name in ("grpo", "rloo", "ppo")},
    **{f"grpo by {name}": {"method": "grpo", "objective": {"normalise": name}} for name in ("token", "constant")},
    **{f"grpo, spread: {name}": {"method": "grpo", "objective": {"std_normalise": name}} for name in ("batch", "none")},
    **{
        f"{name}, KL in {place} by {how}": {
            "method": name,
            "objective": {"kl_coefficient": 0.1, "kl_place": place, "kl_estimator": how, "kl_target": 1.0},
        }
        for name, place, how in (
            ("grpo", "loss", "k3"),
            ("grpo", "sequence", "k1"),
            ("rloo", "loss", "k2"),
            ("ppo", "sequence", "k3"),
            ("ppo", "loss", "k1"),
            ("esrl", "sequence", "k1"),
            ("mrt", "loss", "k3"),
        )
    },
    **{f"{name}, dropout": {"method": name, "gradient": {"dropout": 0.1}} for name in ("grpo", "ppo")},
    "ESRL-Reward": {"capability": {"estimator": "reward"}, "reward": {"names": ["chrf"], "weights": [-1.0]}},
    "two rewards": {"reward": {"names": ["chrf", "rouge_l"], "weights": [1.0, -0.5]}, "method": "reinforce"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_steps_of_every_kind_give_finite_numbers(assets, name):
    """The second epoch's first step, so that memory, queue and spread have something to say."""
    with make_task(assets, VARIANTS[name]) as task:
        for epoch, batch in ((0, 0), (0, task.num_batches(0) - 1), (1, 0)):
            task.model.zero_grad()
            update = task.compute(epoch, batch)
            update.commit()
            assert math.isfinite(update.loss) and update.denominator > 0
            numbers = [value for value in update.metrics.values() if isinstance(value, int | float)]
            assert all(map(math.isfinite, numbers)) and len(numbers) > 10
            gradients = [parameter.grad for parameter in task.model.parameters() if parameter.grad is not None]
            assert gradients and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
            assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


def test_what_the_graph_does_not_record_is_refused(assets):
    changes = {"gradient": {"kind": "graph"}, "capability": {"estimator": "entropy", "entropy_form": "max_prob"}}
    with (
        pytest.raises(ValueError, match=r'"graph" does not record what entropy_form .max_prob. needs'),
        make_task(assets, changes),
    ):
        pass


@pytest.mark.parametrize(
    "objective",
    [{}, {"kind": "reinforce", "reinforce_reduction": "sum"}, {"score_temperature": "sampling"}, {"kind": "mrt"}],
    ids=["fused", "reinforce", "scores at tau", "mrt"],
)
def test_both_kinds_of_gradient_give_the_same_parameters(assets, tmp_path, objective):
    """An epsilon far above the gradients makes AdamW's update linear in them: where a gradient is near 0, the usual one
    would turn a difference of rounding into a whole step."""
    ends, norms, drawn = [], [], []
    for kind in ("graph", "two_stage"):
        folder = tmp_path / kind
        changes = {"gradient": {"kind": kind}, "objective": objective, "training": {"max_steps": 1}}
        commands.rl(rl_config(assets, folder, KEEP, changes, {"optimizer": {"adam_epsilon": 100.0}}))
        ends.append(last_parameters(folder))
        norms.append(steps_of(folder)[0]["grad_norm"])
        drawn.append([line["samples"] for line in json_lines(folder / "samples.jsonl")])
    assert drawn[0] == drawn[1]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0
    moved = 0.0
    start = dict(load_policy(assets / "model").model.named_parameters())
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=0, atol=1e-8), name
        moved += float((value - start[name]).abs().sum().detach())
    assert moved > 0


def last_parameters(run: Path) -> dict[str, torch.Tensor]:
    return unpack_tensors(saved_state(run)["model.safetensors"])


def test_abstained_samples_take_no_part(assets, tmp_path):
    run = tmp_path / "run"
    changes = {**own_reward(tmp_path, REWARDS, "odd_lengths"), "step": {"duplicates": "keep"}}
    commands.rl(rl_config(assets, run, changes, {"development": {"data": False}, "training": {"max_steps": 3}}))
    state = saved_state(run)["state.json"]["task"]
    pushed, abstained = [], 0
    for row in steps_of(run):
        lines = lines_by_step(run)[row["step"]]
        samples = [sample for line in lines for sample in line["samples"]]
        assert all((sample["count"] == 0) == (len(sample["text"]) % 2 == 1) for sample in samples)
        assert row["abstained_rows"] == sum(sample["count"] == 0 for sample in samples)
        counted = [reward for line in lines for reward in rewards_of(line)]
        assert row["reward_mean"] == pytest.approx(fmean(counted))
        pushed += counted
        abstained += row["abstained_rows"]
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        for line in lines:
            if rewards_of(line):
                score, _, _, number, _ = state["memory"][line["example_id"]]
                assert score == pytest.approx(fmean(rewards_of(line))) and number == len(rewards_of(line))
    assert abstained > 5
    assert state["queue"]["values"] == pushed[-30:]
    greedy = state["reward"]["num_samples"] - sum(row["num_samples_mean"] * 6 for row in steps_of(run))
    assert greedy == pytest.approx(18)  # one for each of 3 x 6 prompts


def test_a_prompt_all_of_whose_samples_abstain_teaches_nothing_and_is_estimated_again(assets, tmp_path):
    with make_task(assets, own_reward(tmp_path, REWARDS, "not_umbrella"), {"step": {"batch_size": 24}}) as task:
        update = task.compute(0, 0)
        update.commit()
        silent = min(task.examples, key=lambda example: example.source)
        assert len(task.memory) == 23 and silent.id not in task.memory.records
        assert math.isfinite(update.loss)
        rows = update.metrics["num_samples_mean"] * 24
        assert 0 < update.metrics["abstained_rows"] <= 4 < rows
        # 24 greedy decodes were drawn, the abstained one too
        assert update.metrics["budget_used"] == pytest.approx((rows + 24) / (24 * 4))
        again = task.compute(1, 0)
        assert again.metrics["planned_from_memory"] == pytest.approx(23 / 24)
        assert again.metrics["budget_used"] * 96 == pytest.approx(again.metrics["num_samples_mean"] * 24 + 1)


def test_a_reward_that_always_abstains_stops_the_run(assets, tmp_path):
    """More than half of the samples of 20 steps: in the eleventh, however many calls a step makes."""
    reward = own_reward(tmp_path, REWARDS, "nothing")
    run = tmp_path / "run"
    with pytest.raises(RewardError, match="abstained from 55% of the samples of 20 steps"):
        commands.rl(rl_config(assets, run, reward, {"development": {"data": False}, "training": {"num_epochs": 3}}))
    assert saved_state(run)["step"] == len(steps_of(run)) == 10
    start = dict(load_policy(assets / "model").model.named_parameters())
    assert all(torch.equal(value, start[name]) for name, value in last_parameters(run).items())


def test_an_interrupted_step_does_not_count_abstentions_twice(assets, tmp_path):
    with make_task(assets, own_reward(tmp_path, REWARDS, "odd_lengths")) as task:
        task.compute(0, 0).commit()
        before = task.reward.state_dict()
        assert before["num_abstained"] > 0
        task.compute(0, 1)  # and never committed: the signal came
        interrupted = task.reward.state_dict()
        assert interrupted["num_samples"] > before["num_samples"]
        assert task.state_dict()["reward"] == before
        update = task.compute(0, 1)
        assert task.reward.state_dict() == interrupted
        update.commit()
        assert task.state_dict()["reward"] == interrupted


def test_development_scores_are_those_of_the_command(run, assets):
    """The last line of the log against the exported model, decoded and scored anew."""
    config = rl_config(assets, run)
    assert config.development.data is not None
    examples = load_examples(config.development.data).examples
    assert len(examples) == NUM_DEV
    policy = load_policy(run / "model")
    texts = decode(policy, examples, DecodingConfig(max_new_tokens=10))
    metric = ChrF()
    rows = [metric.statistics(text, e.columns["reference"]) for text, e in zip(texts, examples, strict=True)]
    score = float(metric.corpus_score(torch.tensor(rows, dtype=torch.float64).sum(0).numpy()))
    lines = [row for row in json_lines(run / "metrics.jsonl") if row.get("best")]
    assert lines[-1]["dev_chrf"] == pytest.approx(score)
