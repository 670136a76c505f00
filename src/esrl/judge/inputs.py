"""Questions and answers from JSONL files, in the forms that are about: Vicuna-80's, FastChat's, instructions, plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esrl.data.files import read_json_lines

QUESTION_FIELDS = ("prompt", "text", "question", "instruction")
REFERENCE_FIELDS = ("reference_answer", "reference", "reference_gpt4")
ANSWER_FIELDS = ("answer", "text", "completion", "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What was asked. ``reference`` is a model answer for the judge, if there is one."""

    id: str
    text: str
    category: str = ""
    reference: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A model's answers, one for each question, in their order."""

    name: str
    answers: tuple[str, ...]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a JSONL file, plain or gzip.

    A line holds the text under ``prompt``, ``text``, ``question``, ``instruction`` (with ``input``, if any, after a
    blank line) or as the single entry of ``turns``; ``question_id`` (its line number if absent), ``category`` and a
    reference answer are optional.

    Raises:
        ValueError: with ``path:line``: no text, several turns, or an id that was there before.
    """
    questions: dict[str, Question] = {}
    for number, row in read_json_lines(path):
        if row is None:
            continue
        if limit is not None and len(questions) == limit:
            break
        where = f"{path}:{number}"
        question = Question(
            id=str(row.get("question_id", number)),
            text=_question_text(row, where),
            category=str(row.get("category") or ""),
            reference=_reference(row),
        )
        if question.id in questions:
            raise ValueError(f"{where}: question_id {question.id} was there before; give each question its own.")
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{path} holds no question; each line must be one object with question_id and text.")
    return list(questions.values())


def read_answers(path: Path, name: str, questions: Sequence[Question]) -> System:
    """The answers to ``questions`` in a JSONL file, found by ``question_id`` or by the question's text (``prompt``).

    Answers to other questions are passed over. An answer may be empty: a system may have nothing to say.

    Raises:
        ValueError: an answer is missing, given twice, or is no text.
    """
    by_id = {question.id: question.id for question in questions}
    by_text = {question.text.strip(): question.id for question in questions}
    if len(by_text) < len(questions):
        by_text = {}  # the same question twice: then only an id tells them apart
    answers: dict[str, str] = {}
    for number, row in read_json_lines(path):
        if row is None:
            continue
        where = f"{path}:{number}"
        if "question_id" not in row and not _has_text(row):
            raise ValueError(f"{where}: has neither question_id nor prompt; one must say which question is answered.")
        key = (
            by_id.get(str(row["question_id"]))
            if "question_id" in row
            else by_text.get(_question_text(row, where).strip())
        )
        if key is None:
            continue
        if key in answers:
            raise ValueError(f"{where}: question {key} is answered a second time; keep one answer a question.")
        answers[key] = _answer(row, where)
    missing = [question.id for question in questions if question.id not in answers]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{path} has no answer to {len(missing)} of {len(questions)} questions (question_id {shown}); "
            "answer them too, or judge fewer with `limit`."
        )
    return System(name=name, answers=tuple(answers[question.id] for question in questions))


def _has_text(row: Mapping[str, object]) -> bool:
    return any(isinstance(row.get(field), str) for field in ("prompt", "question", "instruction"))


def _question_text(row: Mapping[str, Any], where: str) -> str:
    turns = row.get("turns")
    if isinstance(turns, list) and turns:
        if len(turns) > 1:
            raise ValueError(f"{where}: has {len(turns)} turns; one is judged. Keep the first, or ask each on its own.")
        row = {"text": turns[0]}
    for field in QUESTION_FIELDS:
        text = row.get(field)
        if isinstance(text, str) and text.strip():
            more = row.get("input") if field == "instruction" else None
            return f"{text}\n\n{more}" if isinstance(more, str) and more.strip() else text
    raise ValueError(f"{where}: holds no question; write its text under one of {', '.join(QUESTION_FIELDS)}.")


def _reference(row: Mapping[str, Any]) -> str | None:
    for field in REFERENCE_FIELDS:
        value = row.get(field)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip():
            return value
    return None


def _answer(row: Mapping[str, Any], where: str) -> str:
    for field in ANSWER_FIELDS:
        if isinstance(text := row.get(field), str):
            return text
    try:
        text = row["choices"][0]["turns"][0]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{where}: holds no answer; write its text under one of {', '.join(ANSWER_FIELDS)}.")
    return text
