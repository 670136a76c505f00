"""Records of the usual instruction, chat, preference and question sets, brought to source, reference and columns.

Each format has columns of fixed names:

    columns       whatever `source_column` and `reference_column` name (``prompt`` and ``completion``, say)
    instruction   ``instruction``, ``input`` (may be missing or blank), ``output``: Alpaca's
    messages      ``messages``: a list of {"role", "content"}; the last one, the assistant's, is the answer
    preferences   ``prompt``, ``chosen``, ``rejected``: texts, or lists of messages
    gsm8k         ``question``, ``answer``, whose last line is ``#### number``

A conversation's answer is its last message alone: earlier turns of the assistant are part of the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from esrl.data.examples import MESSAGES, REFERENCE, REJECTED, SOURCE
from esrl.data.files import json_type, nearest
from esrl.data.templates import generic_chat

Format = Literal["columns", "instruction", "messages", "preferences", "gsm8k"]
Message = dict[str, str]

ANSWER_MARK = "####"

_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of the prompt, of the answer
    "instruction": (("instruction",), ("output",)),
    "messages": (("messages",), ()),
    "preferences": (("chosen", "rejected"), ()),
    "gsm8k": (("question",), ("answer",)),
}
FORMATS = ("columns", *_COLUMNS)


def columns_of(name: str, with_reference: bool) -> list[str]:
    """The columns that a table of this format must have; empty for ``columns``, whose names are settings."""
    prompt, answer = _COLUMNS.get(name, ((), ()))
    return [*prompt, *(answer if with_reference else ())]


def convert(row: Mapping[str, object], name: str, with_reference: bool, where: str) -> dict[str, object]:
    """A record of one of the formats (not ``columns``) as source, reference and further columns.

    Args:
        with_reference: whether the answer is wanted; without it, ``output`` and ``answer`` may be missing, and a last
            message of the assistant is dropped.
        where: the record's place (``path:line``), for messages.

    Raises:
        ValueError: a value of the wrong kind, with ``where`` and the remedy.
    """
    found = _CONVERTERS[name](row, with_reference, where)
    for key, value in row.items():
        if key not in found and key not in _taken(name):
            found[f"original_{key}" if key in (SOURCE, REFERENCE, MESSAGES, REJECTED) else key] = value
    return found


def parse_messages(value: object, where: str, column: str = MESSAGES) -> list[Message]:
    """Check a list of messages and return it with ``role`` and ``content`` alone.

    Raises:
        ValueError: not a list with at least one {"role", "content"} of strings.
    """
    if not isinstance(value, list) or not value:
        kind = "an empty array" if value == [] else f"a {json_type(value)}"
        raise ValueError(f'{where}: column "{column}" holds {kind}; it must be a list of {{"role", "content"}}.')
    result = []
    for number, message in enumerate(value, 1):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not role.strip() or not isinstance(content, str):
            raise ValueError(
                f'{where}: message {number} of "{column}" needs "role" and "content", both strings; this library '
                "trains on text alone, so leave out images and tool calls."
            )
        result.append({"role": role, "content": content})
    return result


def final_number(answer: str, where: str) -> str:
    """The number behind ``####`` of a GSM8K answer, without thousands separators.

    Raises:
        ValueError: there is no such mark.
    """
    _, mark, number = answer.rpartition(ANSWER_MARK)
    if not mark or not number.strip():
        raise ValueError(f'{where}: the answer has no "{ANSWER_MARK} number"; GSM8K answers end in one.')
    return number.strip().replace(",", "")


def _instruction(row: Mapping[str, object], with_reference: bool, where: str) -> dict[str, object]:
    result: dict[str, object] = {
        "instruction": row["instruction"],
        "input": row.get("input") or "",
        SOURCE: row["instruction"],
    }
    return result | ({REFERENCE: row["output"]} if with_reference else {})


def _messages(row: Mapping[str, object], with_reference: bool, where: str) -> dict[str, object]:
    messages = parse_messages(row["messages"], where)
    answered = messages[-1]["role"] == "assistant"
    if with_reference and not answered:
        raise ValueError(
            f"{where}: the last message is the {messages[-1]['role']}'s, but the answer to learn is the assistant's; "
            "add it, or set data.reference_column to none for prompts alone."
        )
    prompt = messages[:-1] if answered else messages
    if not prompt:
        raise ValueError(f"{where}: the conversation has no message before the answer; it needs a prompt.")
    return _chat(prompt) | ({REFERENCE: messages[-1]["content"]} if with_reference else {})


def _preferences(row: Mapping[str, object], with_reference: bool, where: str) -> dict[str, object]:
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("prompt")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError(f'{where}: "chosen" and "rejected" must be of a kind: two texts or two lists of messages.')
    if not isinstance(chosen, list):
        if prompt is None:
            raise ValueError(f'{where}: no column "prompt"{nearest("prompt", list(row))}; a pair of texts needs one.')
        columns = _chat(parse_messages(prompt, where, "prompt")) if isinstance(prompt, list) else {SOURCE: prompt}
        return columns | {REFERENCE: chosen, REJECTED: rejected}
    two = parse_messages(chosen, where, "chosen"), parse_messages(rejected, where, "rejected")
    for column, messages in zip(("chosen", "rejected"), two, strict=True):
        if messages[-1]["role"] != "assistant":
            raise ValueError(f'{where}: "{column}" must end with a message of the assistant.')
    contexts = [messages[:-1] for messages in two]
    if prompt is not None:
        before = parse_messages(prompt, where, "prompt") if isinstance(prompt, list) else _user(prompt, where)
        # both habits are common: pairs that hold the prompt already, and pairs that do not
        contexts = [context if context[: len(before)] == before else before + context for context in contexts]
    if contexts[0] != contexts[1] or not contexts[0]:
        raise ValueError(
            f'{where}: "chosen" and "rejected" must share every message but the last, and at least one; '
            "compare answers to the same prompt."
        )
    return _chat(contexts[0]) | {REFERENCE: two[0][-1]["content"], REJECTED: two[1][-1]["content"]}


def _gsm8k(row: Mapping[str, object], with_reference: bool, where: str) -> dict[str, object]:
    result = {SOURCE: row["question"], "question": row["question"]}
    answer = row.get("answer")
    if isinstance(answer, str):
        result["final"] = final_number(answer, where)
    return result | ({REFERENCE: answer} if with_reference else {})


def _chat(messages: Sequence[Message]) -> dict[str, object]:
    """A conversation's columns: readable text as the source, and the messages for the chat template."""
    return {SOURCE: generic_chat(messages), MESSAGES: json.dumps(messages, ensure_ascii=False)}


def _user(prompt: object, where: str) -> list[Message]:
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: column "prompt" holds a {json_type(prompt)}; it must be text or messages.')
    return [{"role": "user", "content": prompt}]


def _taken(name: str) -> set[str]:
    return {*columns_of(name, True), "prompt"} if name == "preferences" else set(columns_of(name, True))


_CONVERTERS: dict[str, Callable[[Mapping[str, Any], bool, str], dict[str, object]]] = {
    "instruction": _instruction,
    "messages": _messages,
    "preferences": _preferences,
    "gsm8k": _gsm8k,
}
