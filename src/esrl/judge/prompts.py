"""Judge templates, and the messages they make of a question and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from esrl.data.files import nearest, read_json_lines
from esrl.judge.inputs import Question
from esrl.judge.parsing import FORMATS

Mode = Literal["single", "pairwise"]
Messages = list[dict[str, str]]

_FIELDS: dict[str, set[str]] = {
    "single": {"question", "answer", "ref_answer_1"},
    "pairwise": {"question", "answer_a", "answer_b", "ref_answer_1"},
}
_NEEDED: dict[str, set[str]] = {"single": {"question", "answer"}, "pairwise": {"question", "answer_a", "answer_b"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A line of a template file, in FastChat's form. ``output_format`` names the parser of the replies."""

    name: str
    type: Mode
    system_prompt: str
    prompt_template: str
    output_format: str

    @property
    def needs_reference(self) -> bool:
        return "ref_answer_1" in _fields(self.prompt_template)


def read_template(path: Path, name: str, mode: Mode) -> Template:
    """The template called ``name`` in a JSONL file.

    Raises:
        ValueError: no such template, one for another mode, an output format that nobody parses, or a placeholder that
            nothing fills, such as a second turn.
    """
    rows = {str(row.get("name")): (number, row) for number, row in read_json_lines(path) if row is not None}
    if name not in rows:
        raise ValueError(f"{path} has no template {name!r}{nearest(name, list(rows))}. There are: {', '.join(rows)}.")
    number, row = rows[name]
    where = f"{path}:{number}: template {name!r}"
    values: dict[str, Any] = {key: row.get(key) for key in ("name", "type", "prompt_template", "output_format")}
    values["system_prompt"] = row.get("system_prompt", "")
    for key, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{where} has no text under {key}; see docs/judge.md for the form of a template.")
    template = Template(**values)
    if template.type != mode:
        raise ValueError(f"{where} is for type {template.type!r}, but mode is {mode!r}; choose another template.")
    if template.output_format not in FORMATS or FORMATS[template.output_format][0] != mode:
        known = ", ".join(repr(form) for form, (kind, _) in FORMATS.items() if kind == mode)
        raise ValueError(f"{where} has output_format {template.output_format!r}; for {mode} there are {known}.")
    _check_fields(template, where)
    return template


def messages(template: Template, question: Question, answers: Sequence[str]) -> Messages:
    """What the judge is asked about one answer, or about two in the order shown."""
    names = ("answer",) if template.type == "single" else ("answer_a", "answer_b")
    values = dict(zip(names, answers, strict=True))
    prompt = template.prompt_template.format(question=question.text, ref_answer_1=question.reference or "", **values)
    system = [{"role": "system", "content": template.system_prompt}] if template.system_prompt.strip() else []
    return [*system, {"role": "user", "content": prompt}]


def _fields(text: str) -> set[str]:
    """The placeholders, as written: ``a.b`` and ``a[0]`` are no names, so they are refused and nothing is looked up."""
    found = set()
    for _, field, spec, conversion in Formatter().parse(text):
        if field is not None:
            found.add(field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else ""))
    return found


def _check_fields(template: Template, where: str) -> None:
    try:
        fields = _fields(template.prompt_template)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; a brace that is meant as such is written twice.") from error
    known = _FIELDS[template.type]
    if wrong := sorted(fields - known):
        raise ValueError(f"{where} holds {{{wrong[0]}}}, which nothing fills; there are {', '.join(sorted(known))}.")
    if missing := sorted(_NEEDED[template.type] - fields):
        raise ValueError(f"{where} lacks {{{missing[0]}}}: the judge would not see it. Add the placeholder.")
