"""What a judge's reply comes to: a rating, two scores or a verdict; ``None`` where it holds none, never a guess.

The last statement counts, not the first: a judge explains before it decides, and its explanation may quote the
question, the format it was given, or an answer that pleads for "[[10]]". What a model thinks aloud is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LOWEST, HIGHEST = 0.0, 10.0
"""A number outside is no rating. The templates ask for 1 to 10; GPT-4 gave 0 to an answer that was empty."""
TIE = 0.1
"""Two scores at most this far apart are a tie, as in FastChat's `llm_judge`."""

Verdict = Literal["first", "second", "tie"]

_NUMBER = r"(\d{1,3}(?:\.\d+)?)"
_OF_TEN = r"(?:[ \t]*/[ \t]*10)?"
_RATING = re.compile(rf"\[\[[ \t]*(?:rating[ \t]*:[ \t]*)?{_NUMBER}{_OF_TEN}[ \t]*\]\]", re.I)
_RATING_LINE = re.compile(rf"(?:rating|score)[^\d\n]{{0,20}}{_NUMBER}{_OF_TEN}\W*", re.I)
_VERDICT = re.compile(r"\[\[[ \t]*([ABC])[ \t]*\]\]")
_VERDICT_LINE = re.compile(r"(?:^|.*\W)\[([ABC])\]\W*")
_PAIR = re.compile(rf"\[\[[ \t]*{_NUMBER}[ \t]*,[ \t]*{_NUMBER}[ \t]*\]\]")
_FIRST_LINE = re.compile(rf"[(*]*{_NUMBER}(?:[ \t]*,[ \t]*|[ \t]+){_NUMBER}[)*]*")
_NAMED_PAIR = re.compile(rf"\b(?:scores?|output)\b[^.\n(]*\([ \t]*{_NUMBER}[ \t]*,[ \t]*{_NUMBER}[ \t]*\)", re.I)
_LABELLED = re.compile(
    rf"^[ \t*_#-]*Assistant ([12AB])[ \t*_]*:[ \t*_]*{_NUMBER}{_OF_TEN}[ \t*_.]*(?=$|\()", re.I | re.M
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgment:
    """One reply, understood. Of a single answer: one score. Of two answers in the order shown: a verdict and, where the
    template asks for scores, both."""

    scores: tuple[float, ...] = ()
    verdict: Verdict | None = None


def rating(text: str) -> Judgment | None:
    """``[[8]]``, or what judges make of it: ``[[8.5]]``, ``[[rating: 8]]``, ``[[8/10]]``, a last line ``Rating: 8``."""
    spoken = _spoken(text)
    found = _RATING.findall(spoken)
    line = None if found else _RATING_LINE.search(_last_line(spoken))
    if line is not None and line.end() == len(_last_line(spoken)):
        found = [line[1]]
    return _scored(found[-1:])


def verdict(text: str) -> Judgment | None:
    """``[[A]]``, ``[[B]]`` or ``[[C]]`` for a tie; or a single bracket at the end of the last line."""
    spoken = _spoken(text)
    found = _VERDICT.findall(spoken)
    line = None if found else _VERDICT_LINE.fullmatch(_last_line(spoken))
    letter = found[-1] if found else line[1] if line is not None else None
    names: dict[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
    return None if letter is None else Judgment(verdict=names[letter])


def bracketed_scores(text: str) -> Judgment | None:
    """``[[8, 6]]``: the first answer's score and the second one's."""
    found = _PAIR.findall(_spoken(text))
    return _scored(found[-1]) if found else None


def two_scores(text: str) -> Judgment | None:
    """The form of the first Vicuna reviews (March 2023): a first line of two numbers, ``8 9``.

    Where GPT-4 reasoned first, as it did for mathematics, the two stand further down: as ``the scores are (1, 5)`` or
    ``Output: (1, 7)``, or on a line each, ``Assistant 1: 10`` and ``Assistant 2: 4/10 (a mistake)``.
    """
    spoken = _spoken(text)
    if first := _FIRST_LINE.fullmatch(_first_line(spoken)):
        return _scored(first.groups())
    if named := _NAMED_PAIR.findall(spoken):
        return _scored(named[-1])
    labelled = {label.upper().translate(_LETTERS): score for label, score in _LABELLED.findall(spoken)}
    return _scored((labelled["1"], labelled["2"])) if len(labelled) == 2 else None


_LETTERS = str.maketrans("AB", "12")

FORMATS: dict[str, tuple[Literal["single", "pairwise"], Callable[[str], Judgment | None]]] = {
    "[[rating]]": ("single", rating),
    "[[A]]": ("pairwise", verdict),
    "[[rating_a,rating_b]]": ("pairwise", bracketed_scores),
    "two scores": ("pairwise", two_scores),
}
"""A template's ``output_format``: the kind of template it belongs to, and its parser."""


def _scored(numbers: tuple[str, ...] | list[str]) -> Judgment | None:
    """The scores, if there are any and all are on the scale; two of them also make a verdict."""
    scores = tuple(float(number) for number in numbers)
    if not scores or not all(LOWEST <= score <= HIGHEST for score in scores):
        return None
    if len(scores) == 1:
        return Judgment(scores=scores)
    ahead = scores[0] - scores[1]
    return Judgment(scores=scores, verdict="tie" if abs(ahead) <= TIE else "first" if ahead > 0 else "second")


def _spoken(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


def _last_line(text: str) -> str:
    return text.rsplit("\n", 1)[-1].strip()
