"""Arithmetic and numbers in words: tasks whose answers can be checked, made from nothing but a seed.

They serve verifiable rewards (``exact_match`` against the reference). Training, development and test problems are
disjoint whatever the seeds, because the text of a problem decides which part it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from esrl.data.demo import Part, part_of
from esrl.data.demo.numbers import Draw, english_number
from esrl.data.examples import REFERENCE, SOURCE, Example, number_examples

Kind = Literal["addition", "subtraction", "multiplication", "words", "digits"]

_MAX_MISSES = 5000
_MOST_WORDS = 9999  # the largest number that has words here


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticConfig:
    """Which problems there are."""

    kinds: tuple[Kind, ...] = ("addition",)
    """addition, subtraction (never below 0), multiplication, words (13 to "thirteen"), digits ("thirteen" to 13)."""
    largest: int = 99
    """The largest number in a problem; numbers are drawn evenly from 0. For words and digits at most 9999."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in get_args(Kind)]
        if unknown or not self.kinds:
            raise ValueError(f"kinds is {self.kinds!r}; choose from {', '.join(get_args(Kind))}.")
        if self.largest < 1:
            raise ValueError(f"largest is {self.largest}; it must be 1 or more.")
        if self.largest > _MOST_WORDS and {"words", "digits"} & set(self.kinds):
            raise ValueError(f"largest is {self.largest}; numbers in words end at {_MOST_WORDS}.")


def make_arithmetic(count: int, seed: int, part: Part, config: ArithmeticConfig | None = None) -> list[Example]:
    """Make ``count`` different problems of a part: 90 % of all are training, 5 % development, 5 % test problems.

    Returns:
        examples with the columns "source" ("23 + 48 ="), "reference" ("71") and "kind". The same arguments give the
        same examples everywhere, and a smaller ``count`` gives the beginning of a larger one.

    Raises:
        ValueError: a negative count, an unknown part, or more problems than the part has.
    """
    config = config or ArithmeticConfig()
    if count < 0:
        raise ValueError(f"count is {count}; it must be 0 or more.")
    if part not in get_args(Part):
        raise ValueError(f"the part is {part!r}; it must be one of {', '.join(get_args(Part))}.")
    draw = Draw(f"esrl arithmetic {part} {seed} {','.join(config.kinds)} {config.largest}")
    found: dict[str, dict[str, str]] = {}
    misses = 0
    while len(found) < count:
        kind = draw.pick(config.kinds)
        source, reference = _PROBLEMS[kind](draw, config.largest)
        if source in found or part_of(source) != part:
            misses += 1
            if misses > _MAX_MISSES:
                raise ValueError(
                    f"only {len(found):,} different {part} problems found for count {count:,}; ask for fewer, or raise "
                    f"largest ({config.largest})."
                )
            continue
        found[source] = {SOURCE: source, REFERENCE: reference, "kind": kind}
        misses = 0
    return list(number_examples(found.values()))


def write_examples(examples: Sequence[Example], path: Path) -> None:
    """Write examples as JSONL, a line each, for `data.path`."""
    lines = (json.dumps(example.columns, ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), encoding="utf-8")


def _addition(draw: Draw, largest: int) -> tuple[str, str]:
    left, right = draw.between(0, largest), draw.between(0, largest)
    return f"{left} + {right} =", str(left + right)


def _subtraction(draw: Draw, largest: int) -> tuple[str, str]:
    right, left = sorted((draw.between(0, largest), draw.between(0, largest)))
    return f"{left} - {right} =", str(left - right)


def _multiplication(draw: Draw, largest: int) -> tuple[str, str]:
    left, right = draw.between(0, largest), draw.between(0, largest)
    return f"{left} * {right} =", str(left * right)


def _words(draw: Draw, largest: int) -> tuple[str, str]:
    number = draw.between(0, largest)
    return f"{number} in words:", english_number(number)


def _digits(draw: Draw, largest: int) -> tuple[str, str]:
    number = draw.between(0, largest)
    return f"{english_number(number)} in digits:", str(number)


_PROBLEMS: dict[str, Callable[[Draw, int], tuple[str, str]]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "multiplication": _multiplication,
    "words": _words,
    "digits": _digits,
}
