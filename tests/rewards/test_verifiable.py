"""GSM8K's numbers, and exact match with what it may look over."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from pathlib import Path

import pytest

from esrl.evaluation.scores import check_references, metrics_by_name, score_corpus
from esrl.rewards.calling import RewardConfig, build_reward
from esrl.rewards.common import MAX_CHARACTERS
from esrl.rewards.text import ExactMatch, ExactMatchConfig
from esrl.rewards.verifiable import GSM8K, answer_number, last_number

GSM8K_DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 18 apples.", "18"),
        ("It costs $1,234.50.", "1234.5"),
        ("That is 45% of it", "45"),
        ("5-3", "3"),  # a minus between numbers is no sign
        ("x = -3", "-3"),
        ("a loss of -$20", "-20"),
        ("$-20", "-20"),
        ("−7 degrees", "-7"),
        ("pages 10-20", "20"),
        ("<<48/2=24>>24 clips", "24"),
        ("\\boxed{72}", "72"),
        ("**72**", "72"),
        ("about .5", "0.5"),
        ("3.50", "3.5"),
        ("1,2,3", "3"),  # commas that part no thousands
        ("1,234,567", "1234567"),
        ("2e3", "2000"),
        ("16years", "16"),
        ("version v2", None),
        ("none at all", None),
        ("", None),
        ("#### ", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 + 12 = 18\n#### 18", 18),
        ("#### 18 (or was it 20?)", 18),  # what follows the mark at once
        ("#### 18\nNow 20.", 18),
        ("#### 1\n#### 2", 2),
        ("so 7 it is ####", 7),  # nothing follows
        ("#### $1,000", 1000),
        ("no mark: 5 then 6", 6),
    ],
)
def test_the_marked_number_is_preferred(text, number):
    assert answer_number(text) == number


def test_rewards_by_the_short_name():
    references = ["...\n#### 18", "18", "1,000", "#### 5"]
    completions = ["so $18.00.", "#### 18 eggs", "it is 1000", "no idea"]
    with build_reward(RewardConfig(names=("gsm8k",))) as reward:
        reward.check_columns(["source", "reference"])
        result = reward.score(["q"] * 4, completions, [[1]] * 4, {"reference": references}, {})
    assert result.values.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert not result.abstained.any()


def test_gsm8k_is_a_metric_of_development_sets_too():
    metrics = metrics_by_name(["gsm8k"])
    assert score_corpus(metrics, ["1", "2", "3"], ["#### 1", "#### 2", "#### 4"])["gsm8k"].score == pytest.approx(
        200 / 3
    )
    with pytest.raises(ValueError, match="example 2: the reference 'many' holds no number"):
        check_references(metrics, ["3", "many"])


@pytest.mark.skipif(not GSM8K_DATA.is_file(), reason="the data pack is not there")
def test_every_reference_solution_of_gsm8k_is_right_and_the_next_ones_hardly_ever():
    with GSM8K_DATA.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    answers, finals = [row["answer"] for row in rows], [row["final"] for row in rows]
    gsm8k = GSM8K()
    assert gsm8k(answers, finals) == [1.0] * len(rows)
    assert gsm8k([f"So the answer is ${final}." for final in finals], answers) == [1.0] * len(rows)
    others = gsm8k(answers[1:] + answers[:1], finals)
    assert sum(others) / len(others) < 0.05


@pytest.mark.parametrize(
    "text", ["1" * MAX_CHARACTERS, "1," * (MAX_CHARACTERS // 2), "-" * MAX_CHARACTERS, "111," * 25_000]
)
def test_no_text_is_slow(text):
    started = time.monotonic()
    GSM8K().sentence_score(text, "1")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("options", "equal", "different"),
    [
        ({}, [" Yes "], ["yes", "Yes.", "Y es"]),
        ({"ignore_case": True}, ["yes", "YES "], ["Yes."]),
        ({"ignore_punctuation": True}, ["Yes.", "¡Yes!"], ["yes"]),
        ({"ignore_case": True, "ignore_punctuation": True}, ["yes!"], ["no!"]),
    ],
)
def test_exact_match_looks_over_what_it_is_told(options, equal, different):
    match = ExactMatch(ExactMatchConfig(**options))
    assert match([*equal, *different], ["Yes"] * len(equal + different)) == [1.0] * len(equal) + [0.0] * len(different)


def test_exact_match_spaces_and_signature():
    assert ExactMatch(ExactMatchConfig(ignore_spaces=True))(["a  b\nc"], ["a b c"]) == [1.0]
    assert ExactMatch()(["a  b"], ["a b"]) == [0.0]
    signatures = {ExactMatch(ExactMatchConfig(**{name: True})).signature for name in ExactMatchConfig.__slots__}
    assert len({*signatures, ExactMatch().signature}) == 4


def test_exact_match_options_reach_the_reward():
    config = RewardConfig(names=("exact_match",), exact_match=ExactMatchConfig(ignore_case=True))
    with build_reward(config) as reward:
        assert reward.score(["p"], ["YES"], [[1]], {"reference": ["yes"]}, {}).values.tolist() == [1.0]


def test_chat_messages_are_read_by_built_in_rewards():
    chats = [[{"role": "assistant", "content": "#### 4"}]]
    with build_reward(RewardConfig(names=("gsm8k",))) as reward:
        assert reward.score(["p"], chats, [[1]], {"reference": ["4"]}, {}).values.tolist() == [1.0]
