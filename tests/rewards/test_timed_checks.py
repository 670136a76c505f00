"""Regular expressions and JSON schemas as rewards, in real processes, with texts that take for ever."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from esrl.errors import RewardError
from esrl.rewards.calling import RewardConfig, RewardResult, build_reward
from esrl.rewards.timed import JsonSchemaConfig, RegexConfig

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
ENDLESS = "a" * 60 + "b"
"""What (a+)+ takes 2^60 steps for."""


def score(config: RewardConfig, completions: list[Any], reference: list[str] | None = None) -> RewardResult:
    size = len(completions)
    columns = {"reference": reference} if reference else {}
    with build_reward(config) as reward:
        reward.check_columns(columns)
        return reward.score(["p"] * size, completions, [[1]] * size, columns, {})


def regex(completions: list[Any], reference: list[str] | None = None, **options: Any) -> list[float]:
    return score(RewardConfig(names=("regex",), regex=RegexConfig(**options)), completions, reference).values.tolist()


def schema_file(tmp_path: Path, schema: Any) -> RewardConfig:
    path = tmp_path / "schema.json"
    path.write_text(schema if isinstance(schema, str) else json.dumps(schema), encoding="utf-8")
    return RewardConfig(names=("json_schema",), json_schema=JsonSchemaConfig(path=path, seconds=0.5))


def test_partial_and_full_matches():
    texts = [" 12 ", "it is 12", "none"]
    assert regex(texts, pattern=r"\d+") == [1.0, 1.0, 0.0]
    assert regex(texts, pattern=r"\d+", match="full") == [1.0, 0.0, 0.0]
    assert regex(["X"], pattern="(?i)x") == [1.0]


@pytest.mark.parametrize("group", ["1", "answer"])
def test_a_group_is_compared_with_the_reference(group):
    pattern = r"<a>(?P<answer>.*?)</a>|nothing"
    texts = ["<a> 7 </a>", "<a>8</a>", "7", "nothing"]
    assert regex(texts, ["7"] * 4, pattern=pattern, group=group) == [1.0, 0.0, 0.0, 0.0]


def test_a_group_needs_the_reference_column():
    with pytest.raises(ValueError, match="reward 'regex' needs the column 'reference'; the data has none"):
        score(RewardConfig(names=("regex",), regex=RegexConfig(pattern="(a)", group="1")), ["a"])


def test_a_text_that_takes_for_ever_abstains_alone(caplog):
    config = RewardConfig(names=("regex",), regex=RegexConfig(pattern="^(a+)+$", seconds=0.3))
    started = time.monotonic()
    result = score(config, ["aa", ENDLESS, "b", "a" * 20])
    assert time.monotonic() - started < 4  # the batch, then the culprit: .3 s each, and three starts of a process
    assert result.abstained.tolist() == [False, True, False, False]
    assert result.values.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert f"regex_check:match_regex gave no answer in 0.3 s for {ENDLESS[:60]!r}; it abstains" in caplog.text


def test_its_process_ends_with_the_reward():
    reward = build_reward(RewardConfig(names=("regex",), regex=RegexConfig(pattern="a")))
    reward.score(["p"], ["a"], [[1]], {}, {})
    pid = reward._components[0].worker.pid
    os.kill(pid, 0)  # it is there
    reward.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_json_schema(tmp_path):
    texts = [
        '{"name": "Ann", "age": 3}',
        ' {"name": "Ann"}\n',
        '{"age": 3}',
        '{"name": "Ann", "more": 1}',
        '{"name": "Ann", "age": -1}',
        '{"name": "Ann"} indeed',
        "Ann",
        '{"name": "Ann", "age": NaN}',
        "9" * 5000,  # beyond Python's limit of digits
        "[" * 50_000,  # beyond its stack
        "",
    ]
    assert score(schema_file(tmp_path, SCHEMA), texts).values.tolist() == [1.0, 1.0] + [0.0] * 9


def test_a_schema_that_takes_for_ever_is_stopped(tmp_path):
    config = schema_file(tmp_path, {"type": "string", "pattern": "^(a+)+$"})
    result = score(config, ['"aa"', json.dumps(ENDLESS), '"b"'])
    assert result.abstained.tolist() == [False, True, False]
    assert result.values.tolist() == [1.0, 0.0, 0.0]


def test_a_reference_elsewhere_is_not_fetched(tmp_path):
    inside = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}
    assert score(schema_file(tmp_path, inside), ["1", '"1"']).values.tolist() == [1.0, 0.0]
    with pytest.raises(RewardError, match=r"reward 'json_schema' raised .*example\.com/s\.json"):
        score(schema_file(tmp_path, {"$ref": "http://example.com/s.json"}), ["1"])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "is not JSON"),
        ({"type": "no such type"}, r"is no JSON schema: 'no such type' is not valid.*\(at \$\.type\)"),
    ],
)
def test_unusable_schemas(tmp_path, schema, message):
    with pytest.raises(ValueError, match=message):
        build_reward(schema_file(tmp_path, schema))


def test_a_missing_schema_file(tmp_path):
    config = RewardConfig(names=("json_schema",), json_schema=JsonSchemaConfig(path=tmp_path / "no.json"))
    with pytest.raises(ValueError, match=r"no\.json: No such file"):
        build_reward(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegexConfig(pattern="("), r"pattern is '\(', which is no regular expression: missing \)"),
        (lambda: RegexConfig(pattern="(a)(?P<b>c)", group="x"), "group is 'x'; the pattern has b, 1, 2"),
        (lambda: RegexConfig(pattern="a", match="whole"), "match is 'whole'; choose full or partial"),
        (lambda: RegexConfig(pattern="a", seconds=0), "seconds is 0"),
        (lambda: JsonSchemaConfig(seconds=float("nan")), "seconds is nan"),
        # a file may name the reward and a flag what it needs, so these are found when the reward is built
        (lambda: build_reward(RewardConfig(names=("regex",))), "regex.pattern is empty"),
        (lambda: build_reward(RewardConfig(names=("json_schema",))), "json_schema.path is not set"),
        (lambda: build_reward(RewardConfig(names=("model",))), "model.path is not set"),
        (lambda: RewardConfig(normalise="all"), "normalise is 'all'; choose none, each or sum"),
        (lambda: RewardConfig(names=("gsm8",)), "did you mean 'gsm8k'"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
