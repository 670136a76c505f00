"""Prompt templates: text with placeholders, and the generic form of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from esrl.data.files import nearest

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Stanford Alpaca's template (Taori et al. 2023), to the letter; the answer follows the colon."""

ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""Its form for a record whose input is blank."""

TEMPLATES = {"alpaca": (ALPACA, ALPACA_NO_INPUT), "plain": ("{instruction}\n\n{input}", "{instruction}")}
"""Templates by name, each with its form for a record without input."""

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def placeholders(template: str) -> tuple[str, ...]:
    """The names in ``{name}``, each once, in order; ``{{`` and ``}}`` stand for braces.

    Raises:
        ValueError: a brace that belongs to neither, or an empty name.
    """
    rest = _PLACEHOLDER.sub("", template)
    if "{" in rest or "}" in rest:
        raise ValueError(f"template {_shorten(template)} has a single brace; write {{{{ or }}}} for a brace as text.")
    names = [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]
    if "" in names:
        raise ValueError(f"template {_shorten(template)} has {{}}; name the column to put there, such as {{input}}.")
    return tuple(dict.fromkeys(names))


def fill(template: str, values: Mapping[str, str], where: str) -> str:
    """The template with each ``{name}`` replaced by that value, once: braces in a value stay as they are.

    Args:
        where: the record's place (``path:line``), for the message.

    Raises:
        ValueError: a placeholder names no value.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if name not in values:
            known = ", ".join(values)
            raise ValueError(
                f"{where}: the template names {{{name}}}{nearest(name, list(values))}, but the columns are {known}. "
                "Change data.template, or write {{ and }} for braces."
            )
        return values[name]

    return _PLACEHOLDER.sub(replace, template)


def generic_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as plain text, open for the assistant's answer; for models without a chat template.

    Each message is ``### Role:``, a line break, its content and an empty line; the end is ``### Assistant:`` and a
    line break.
    """
    turns = [f"### {message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages]
    return "".join(turns) + "### Assistant:\n"


def _shorten(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
