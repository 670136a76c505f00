"""Questions, answers and templates: every form that is about is read, whatever is wrong is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from judge_server import DATA, write_lines

from esrl.judge.inputs import Question, read_answers, read_questions
from esrl.judge.prompts import messages, read_template

ASKED = [Question(id="1", text="One?"), Question(id="2", text="Two?")]


def test_vicuna_80_is_read_with_its_references():
    questions = read_questions(DATA / "vicuna80_questions.jsonl.gz")
    assert [question.id for question in questions] == [str(n) for n in range(1, 81)]
    assert questions[0] == Question(id="1", text="How can I improve my time management skills?", category="generic")
    referenced = [question for question in questions if question.reference is not None]
    assert len(referenced) == 10 and {question.category for question in referenced} == {"coding", "math"}
    assert len(read_questions(DATA / "vicuna80_questions.jsonl.gz", limit=3)) == 3


def test_the_forms_of_a_question(tmp_path):
    rows = [
        {"question_id": "a", "text": "T", "category": "c"},
        {"question_id": 7, "turns": ["first"], "reference": ["R"]},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Go.", "input": ""},
    ]
    assert read_questions(write_lines(tmp_path / "q.jsonl", rows)) == [
        Question(id="a", text="T", category="c"),
        Question(id="7", text="first", reference="R"),
        Question(id="3", text="Add.\n\n1 2"),
        Question(id="4", text="Go."),
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question_id": 1}], "q.jsonl:1: holds no question"),
        ([{"text": " "}], "q.jsonl:1: holds no question"),
        ([{"turns": ["a", "b"]}], "q.jsonl:1: has 2 turns; one is judged"),
        ([{"question_id": 1, "text": "a"}, {"question_id": "1", "text": "b"}], "q.jsonl:2: question_id 1 was there"),
    ],
)
def test_questions_that_cannot_be_asked(tmp_path, rows, said):
    with pytest.raises(ValueError) as caught:
        read_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert said in str(caught.value)


def test_the_forms_of_an_answer(tmp_path):
    rows = [
        [{"question_id": 2, "answer": "b"}, {"question_id": "1", "answer": ""}, {"question_id": 9, "answer": "else"}],
        [{"prompt": " Two?\n", "completion": "b"}, {"prompt": "One?", "output": ""}, {"prompt": "Other?"}],
        [{"question_id": 1, "text": ""}, {"question_id": 2, "choices": [{"turns": ["b"]}]}],
    ]
    for number, lines in enumerate(rows):
        system = read_answers(write_lines(tmp_path / f"{number}.jsonl", lines), "ours", ASKED)
        assert (system.name, system.answers) == ("ours", ("", "b"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question_id": 1, "answer": "a"}], "a.jsonl has no answer to 1 of 2 questions (question_id 2)"),
        ([{"question_id": 1, "answer": "a"}] * 2, "a.jsonl:2: question 1 is answered a second time"),
        ([{"question_id": 1, "answer": None}], "a.jsonl:1: holds no answer"),
        ([{"answer": "a"}], "a.jsonl:1: has neither question_id nor prompt"),
        ([{"question_id": 1, "choices": []}], "a.jsonl:1: holds no answer"),
    ],
)
def test_answers_that_cannot_be_used(tmp_path, rows, said):
    with pytest.raises(ValueError) as caught:
        read_answers(write_lines(tmp_path / "a.jsonl", rows), "ours", ASKED)
    assert said in str(caught.value)


# Templates

TEMPLATES = DATA / "judge_prompts.jsonl"


def test_fastchat_s_templates_are_filled_in():
    question = Question(id="1", text="What is {x}?", reference="The {reference}.")
    template = read_template(TEMPLATES, "single-v1", "single")
    system, user = messages(template, question, ["An {answer} with [[10]]."])
    assert system == {"role": "system", "content": "You are a helpful assistant."}
    shown = "[The Start of Assistant's Answer]\nAn {answer} with [[10]].\n[The End of Assistant's Answer]"
    assert user["content"].endswith(f"[Question]\nWhat is {{x}}?\n\n{shown}")
    pair = read_template(TEMPLATES, "pair-math-v1", "pairwise")
    text = messages(pair, question, ["first", "second"])[1]["content"]
    places = [text.index(part) for part in ("What is {x}?", "The {reference}.", "first", "second")]
    assert places == sorted(places) and pair.needs_reference and not template.needs_reference


@pytest.mark.parametrize(
    ("name", "mode", "said"),
    [
        ("single-v2", "single", "has no template 'single-v2' (nearest: \"single-v1\")"),
        ("pair-v2", "single", "is for type 'pairwise', but mode is 'single'"),
        ("single-v1-multi-turn", "single", "holds {answer_1}, which nothing fills"),
        ("pair-v2-multi-turn", "pairwise", "which nothing fills; there are answer_a, answer_b, question, ref_answer_1"),
    ],
)
def test_templates_that_cannot_be_used(name, mode, said):
    with pytest.raises(ValueError) as caught:
        read_template(TEMPLATES, name, mode)
    assert said in str(caught.value)


GOOD = {"name": "t", "type": "single", "prompt_template": "{question} {answer}", "output_format": "[[rating]]"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_template": "{question}"}, "lacks {answer}"),
        ({"prompt_template": "{question} {answer.__class__}"}, "holds {answer.__class__}, which nothing fills"),
        ({"prompt_template": "{question} {answer!r}"}, "holds {answer!r}"),
        ({"prompt_template": "{question} {answer:>9}"}, "holds {answer:>9}"),
        ({"prompt_template": "{question} {answer"}, "is written twice"),
        ({"prompt_template": None}, "has no text under prompt_template"),
        ({"output_format": "stars"}, "has output_format 'stars'; for single there are '[[rating]]'"),
        ({"output_format": "[[A]]"}, "has output_format '[[A]]'"),
    ],
)
def test_templates_of_one_s_own(tmp_path, change, said):
    read_template(write_lines(tmp_path / "t.jsonl", [GOOD]), "t", "single")
    with pytest.raises(ValueError) as caught:
        read_template(write_lines(tmp_path / "t.jsonl", [{**GOOD, **change}]), "t", "single")
    assert said in str(caught.value)


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"answers": ()}, "answers names 0 files"),
        ({"answers": (Path("a"),) * 3}, "answers names 3 files"),
        ({"answers": (Path("a"),), "mode": "pairwise"}, "answers names 1 files; mode 'pairwise' needs two"),
        ({"answers": (Path("x/a.jsonl"), Path("y/a.jsonl.gz"))}, "both systems are called 'a'"),
        ({"names": ("ours",)}, "names has 1 entries for 2 files"),
        ({"judge": " "}, "judge is empty"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_settings_that_cannot_be(comparison, settings, said):
    with pytest.raises(ValueError) as caught:
        comparison(2, **settings)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"max_attempts": 0},
        {"timeout_seconds": 0.0},
        {"min_delay_seconds": 99.0},
        {"temperature": -1.0},
    ],
)
def test_request_settings_that_cannot_be(patient, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(patient, **wrong)
