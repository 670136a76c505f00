"""Alarms: raised by what they are for, once, with what was seen, and by nothing else; resumable."""

from __future__ import annotations

import html
import json
import re

import pytest
from run_helpers import json_lines, rl_config

from esrl import commands
from esrl.report import write_report
from esrl.training.alarms import AlarmConfig, State, new_state, observe_evaluation, observe_step

CONFIG = AlarmConfig(window=4, evaluations=2, metric="dev_bleu", max_kl=5.0, max_equal_share=0.5)


def steps(name: str, values: list[float], state: State | None = None, start: int = 1) -> tuple[State, list[str]]:
    state, lines = state or new_state(), []
    for step, value in enumerate(values, start):
        state, new = observe_step(state, step, {name: value, "unknown": 1.0}, CONFIG)
        state = json.loads(json.dumps(state))  # what a checkpoint makes of it
        lines += new
    return state, lines


def evaluations(pairs: list[tuple[float, float]]) -> list[str]:
    """(mean reward, held-out metric) of each evaluation, ten steps apart; the first before any step."""
    state, lines = observe_evaluation(new_state(), 0, {"dev_bleu": 30.0}, CONFIG)
    for number, (reward, score) in enumerate(pairs):
        for step in range(10 * number, 10 * number + 10):
            state, _ = observe_step(state, step, {"reward_mean": reward}, CONFIG)
        state, new = observe_evaluation(state, 10 * number + 10, {"dev_bleu": score}, CONFIG)
        lines += new
    return lines


@pytest.mark.parametrize(("later", "word"), [(41.0, "more than 2 times as many"), (9.0, "less than 1/2 as many")])
def test_length_drift(later, word):
    # 20 at the start; the window of steps 5 to 8 is the first wholly beyond [10, 40]
    _, lines = steps("length_mean", [20.0] * 4 + [later] * 6)
    assert len(lines) == 1
    assert f"length drift: answers have {later:.1f} tokens over steps 5 to 8, 20.0 at the start of the run" in lines[0]
    assert word in lines[0]


def test_lengths_within_the_bounds_are_silent():
    assert steps("length_mean", [20.0] * 4 + [40.0] * 8 + [10.0] * 8)[1] == []


def test_kl_and_equal_rewards():
    _, lines = steps("kl_mean", [1.0] * 4 + [6.0] * 4)
    assert lines == [line for line in lines if "KL blow-up: the policy is 6.0 nats" in line and "steps 5 to 8" in line]
    assert len(lines) == 1 and "max_kl = 5" in lines[0]
    _, lines = steps("equal_reward_share", [0.5] * 4 + [0.75] * 4)
    assert len(lines) == 1 and "equal rewards: 56% of the prompts" in lines[0]  # (3 * .5 + .75) / 4


def test_a_single_step_is_no_alarm():
    assert steps("kl_mean", [100.0] * 3)[1] == []
    assert steps("kl_mean", [1.0, 1.0, 16.0, 1.0])[1] == []  # a mean of 4.75


def test_an_alarm_is_repeated_only_after_it_was_over():
    state, first = steps("kl_mean", [6.0] * 10)
    assert len(first) == 1
    state, calm = steps("kl_mean", [0.0] * 4, state, 11)
    state, second = steps("kl_mean", [6.0] * 8, state, 15)
    assert calm == [] and len(second) == 1
    assert "steps 15 to 18" in second[0]


def test_reward_up_while_the_metric_falls():
    lines = evaluations([(0.2, 31.0), (0.25, 30.5), (0.3, 30.0), (0.35, 29.5)])
    assert len(lines) == 1
    assert "from step 10 to 30 the mean reward rose from 0.2 to 0.3, while dev_bleu fell from 31 to 30" in lines[0]
    assert "take the model of step 10" in lines[0]


def test_the_best_before_the_first_step_takes_the_first_known_reward():
    lines = evaluations([(0.2, 29.0), (0.3, 28.0)])
    assert len(lines) == 1 and "from step 0 to 20 the mean reward rose from 0.2 to 0.3" in lines[0]


@pytest.mark.parametrize(
    "pairs",
    [
        [(0.2, 31.0), (0.3, 32.0), (0.4, 33.0), (0.5, 34.0)],  # both rise
        [(0.4, 31.0), (0.3, 30.0), (0.2, 29.0), (0.1, 28.0)],  # both fall
        [(0.2, 31.0), (0.3, 30.0), (0.4, 31.5), (0.5, 31.0)],  # never two in a row below the best
    ],
)
def test_no_alarm(pairs):
    assert evaluations(pairs) == []


def test_observing_changes_nothing_but_the_new_state():
    state, _ = steps("kl_mean", [1.0, 2.0])
    before = json.dumps(state)
    observe_step(state, 3, {"kl_mean": 9.0}, CONFIG)
    observe_evaluation(state, 3, {"dev_bleu": 9.0}, CONFIG)
    assert json.dumps(state) == before


def test_an_evaluation_without_the_metric_is_not_judged():
    assert observe_evaluation(new_state(), 1, {"dev_chrf": 1.0}, CONFIG) == (new_state(), [])
    assert observe_evaluation(new_state(), 1, {"dev_bleu": 1.0}, AlarmConfig()) == (new_state(), [])  # none is named


@pytest.mark.parametrize(
    "options",
    [
        {"window": 0},
        {"evaluations": 0},
        {"length_factor": 1.0},
        {"length_factor": float("inf")},
        {"max_kl": 0.0},
        {"max_equal_share": 1.1},
    ],
)
def test_configuration_is_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AlarmConfig(**options)


def test_a_runs_report_lists_its_alarms(assets, tmp_path):
    """Of a real run, with bounds that any divergence and any prompt of equal rewards break."""
    alarms = {"window": 1, "max_kl": 1e-9, "max_equal_share": 0.0}
    training = {"method": "rloo", "training": {"alarms": alarms, "max_steps": 6}}
    commands.rl(rl_config(assets, tmp_path / "run", training))
    lines = [row for row in json_lines(tmp_path / "run" / "metrics.jsonl") if row.get("kind") == "alarm"]
    names = [line["alarm"].partition(": ")[0] for line in lines]
    assert "KL blow-up" in names and set(names) <= {"KL blow-up", "equal rewards"}
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<h2>Alarms</h2>") == 1
    assert re.findall(r">(KL blow-up|equal rewards)</td>", page) == names
    for line in lines:
        assert html.escape(line["alarm"].partition(": ")[2]) in page
    assert page.count("Triangles: alarms.") == 2  # under the development metric and the reward
