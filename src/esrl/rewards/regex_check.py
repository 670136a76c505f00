"""The check of `regex`. A pattern can take hours over a text, so it runs in a process that can be killed
(``rewards.timed``); nothing but the standard library is imported, so that the process is up in a fraction of a second.
"""

from __future__ import annotations

import re
from typing import Any


def match_regex(
    completions: list[str], settings: dict[str, Any], reference: list[str | list[str]] | None = None
) -> list[float]:
    """1 where the pattern matches (and, with a group, the group is the reference), else 0.

    Args:
        settings: pattern, match ("full" or "partial") and group ("": none) of ``RegexConfig``.

    Raises:
        ValueError: there is a group but no reference.
    """
    pattern, group = re.compile(settings["pattern"]), settings["group"]
    match = pattern.fullmatch if settings["match"] == "full" else pattern.search
    if group and reference is None:
        raise ValueError(f"regex compares the group {group!r} with the column 'reference', which the data lacks.")
    scores = []
    for index, text in enumerate(completions):
        found = match(text.strip())
        if found is None or not group or reference is None:
            scores.append(float(found is not None))
            continue
        wanted = reference[index]
        captured = found[int(group) if group.isdecimal() else group]  # None: the group took no part in the match
        texts = [wanted] if isinstance(wanted, str) else wanted
        scores.append(float(captured is not None and captured.strip() in [one.strip() for one in texts]))
    return scores
