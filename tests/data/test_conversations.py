"""Instruction, chat, preference and question files become examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esrl.data.readers import DataConfig, LoadedData, load_examples
from esrl.data.templates import ALPACA, ALPACA_NO_INPUT

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}


def load(tmp_path: Path, rows: list[dict[str, Any]], **config: Any) -> LoadedData:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(DataConfig(path=str(path), **config))


def columns(tmp_path: Path, rows: list[dict[str, Any]], **config: Any) -> list[dict[str, str]]:
    return [example.columns for example in load(tmp_path, rows, **config).examples]


def test_instructions_take_alpacas_template_with_and_without_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 {instruction}", "output": "2", "n": 3},
        {"instruction": "Sing.", "input": " ", "output": "La"},
        {"instruction": "Sing.", "output": ""},
    ]
    loaded = load(tmp_path, rows, format="instruction")
    first, second = (example.columns for example in loaded.examples)
    assert first["source"] == ALPACA.replace("{input}", "1 {instruction}").replace("{instruction}", "Add.", 1)
    assert second["source"] == ALPACA_NO_INPUT.replace("{instruction}", "Sing.")
    assert (first["reference"], first["instruction"], first["n"]) == ("2", "Add.", "3")
    assert "output" not in first  # the answer stands in the reference alone
    assert loaded.report.skipped_empty == 1


def test_a_template_of_ones_own(tmp_path):
    rows = [{"instruction": "A", "input": "B", "output": "C"}, {"instruction": "A", "input": "", "output": "C"}]
    found = columns(tmp_path, rows, format="instruction", template="{instruction}<{input}>")
    assert [row["source"] for row in found] == ["A<B>", "A<>"]
    found = columns(
        tmp_path, rows, format="instruction", template="I{instruction}{input}", template_without_input="{instruction}!"
    )
    assert [row["source"] for row in found] == ["IAB", "A!"]
    found = columns(tmp_path, rows, format="instruction", template="plain")
    assert [row["source"] for row in found] == ["A\n\nB", "A"]


def test_prompt_and_completion_are_two_columns(tmp_path):
    rows = [{"prompt": "P", "completion": "C", "messages": "not a chat"}]
    config = {"source_column": "prompt", "reference_column": "completion"}
    assert columns(tmp_path, rows, **config) == [
        {"source": "P", "reference": "C", "original_messages": "not a chat"}  # "messages" would mark a chat
    ]
    assert columns(tmp_path, rows, **config, template="Q: {prompt}\nA:")[0]["source"] == "Q: P\nA:"


def test_instructions_without_answers_are_prompts(tmp_path):
    found = columns(tmp_path, [{"instruction": "A"}], format="instruction", reference_column=None, template="plain")
    assert found == [{"source": "A", "instruction": "A", "input": ""}]


def test_a_chat_ends_in_its_answer(tmp_path):
    rows = [{"messages": [USER, ANSWER, {"role": "user", "content": "Bye", "name": "x"}, OTHER], "id": "7"}]
    (found,) = columns(tmp_path, rows, format="messages")
    assert json.loads(found["messages"]) == [USER, ANSWER, {"role": "user", "content": "Bye"}]
    assert found["reference"] == "Go away" and found["id"] == "7"
    assert found["source"].endswith("### Assistant:\nHello\n\n### User:\nBye\n\n### Assistant:\n")
    for messages in ([USER], [USER, ANSWER]):  # prompts alone: a last answer is dropped
        (found,) = columns(tmp_path, [{"messages": messages}], format="messages", reference_column=None)
        assert json.loads(found["messages"]) == [USER] and "reference" not in found


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER], "the last message is the user's"),
        ([ANSWER], "no message before the answer"),
        ([], "an empty array"),
        ("Hi", "holds a string"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "message 1 of"),
        ([USER, {"content": "Hello"}], "message 2 of"),
    ],
)
def test_chats_that_are_none_are_refused_by_line(tmp_path, messages, message):
    with pytest.raises(ValueError, match=rf"data.jsonl:1: .*{message}"):
        load(tmp_path, [{"messages": messages}], format="messages")


def test_preferences_as_texts_and_as_messages(tmp_path):
    chat = {"messages": json.dumps([USER]), "reference": "Hello", "rejected": "Go away"}
    text = {"prompt": "Hi", "chosen": "Hello", "rejected": "", "margin": 0.5}
    assert columns(tmp_path, [text], format="preferences") == [
        {"source": "Hi", "reference": "Hello", "rejected": "", "margin": "0.5"}
    ]
    whole = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    ends = {"chosen": [ANSWER], "rejected": [OTHER]}
    for row in (whole, whole | {"prompt": [USER]}, whole | {"prompt": "Hi"}, ends | {"prompt": [USER]}):
        (found,) = columns(tmp_path, [row], format="preferences")
        assert {name: found[name] for name in chat} == chat
    (found,) = columns(tmp_path, [text], format="preferences", template="alpaca")
    assert found["source"] == ALPACA_NO_INPUT.replace("{instruction}", "Hi")


def test_equal_answers_are_skipped_and_counted(tmp_path):
    rows = [{"prompt": "P", "chosen": c, "rejected": r} for c, r in (("a", "b"), ("a", "a"), (" ", "b"))]
    report = load(tmp_path, rows, format="preferences").report
    assert (report.read, report.kept, report.skipped_equal, report.skipped_empty) == (3, 1, 1, 1)
    assert "1 skipped (chosen equals rejected)" in str(report)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "P", "chosen": "a", "rejected": [ANSWER]}, "of a kind"),
        ({"chosen": "a", "rejected": "b"}, 'no column "prompt"'),
        ({"prompt": "P", "chosen": "a"}, 'no column "rejected"'),
        ({"chosen": [USER, ANSWER], "rejected": [OTHER]}, "share every message but the last"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "share every message but the last, and at least one"),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]},
            '"rejected" must end with a message of the assistant',
        ),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "must be a string"),
    ],
)
def test_preferences_that_are_none_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, [row], format="preferences")


def test_gsm8k_keeps_the_final_number(tmp_path):
    answer = "She sells 48/2 = <<48/2=24>>24.\n#### 1,024"
    (found,) = columns(tmp_path, [{"question": "How many?", "answer": answer}], format="gsm8k")
    assert found == {"source": "How many?", "question": "How many?", "reference": answer, "final": "1024"}
    (found,) = columns(tmp_path, [{"question": "Q", "answer": answer}], format="gsm8k", template="Q: {question}\nA:")
    assert found["source"] == "Q: Q\nA:"
    with pytest.raises(ValueError, match=r'data.jsonl:1: the answer has no "#### number"'):
        load(tmp_path, [{"question": "Q", "answer": "It is 4."}], format="gsm8k")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "alpaca"}, "format is 'alpaca'; choose one of columns, instruction"),
        ({"format": "instruction", "source_column": "prompt"}, "fixed names"),
        ({"format": "messages", "template": "alpaca"}, "chat template"),
        ({"format": "preferences", "reference_column": None}, "both answers"),
        ({"template": "no column"}, "names no column"),
        ({"template": "{a"}, "single brace"),
        ({"template_without_input": "{a}"}, "goes with template"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(path="x.jsonl", **config)


def test_a_format_needs_its_columns_and_a_table(tmp_path):
    with pytest.raises(ValueError, match=r'no column "instruction" \(nearest: "instructions"\)'):
        load(tmp_path, [{"instructions": "A", "output": "B"}], format="instruction")
    with pytest.raises(ValueError, match="name it by `path`"):
        DataConfig(source=Path("x.txt"), format="instruction")
