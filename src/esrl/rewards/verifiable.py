"""GSM8K's answers: the number a solution ends in (Cobbe et al. 2021), as a metric like the text metrics."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from decimal import Decimal
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esrl.rewards.common import check_text, mean_score, references_of, score_all

MARK = "####"
# A sign belongs to a number only where nothing stands before it: "5-3" ends in 3, "x = -3" in -3. Commas belong to it
# where they part thousands.
_NUMBER = re.compile(
    r"(?<![\w.])([-−+]?)[$€£]?([-−]?)(\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(\.\d+)?([eE][-+]?\d{1,3}(?!\d))?"
)


def last_number(text: str) -> Decimal | None:
    """The last number of ``text``: without currency, thousands separators, per cent sign or the sentence's period."""
    found = deque(_NUMBER.finditer(text), maxlen=1)
    return _value(found[0]) if found else None


def answer_number(text: str) -> Decimal | None:
    """The number that follows the last "####"; where there is none, the last number of the text."""
    _, mark, answer = text.rpartition(MARK)
    found = _NUMBER.search(answer) if mark else None
    return last_number(text) if found is None else _value(found)


def _value(found: re.Match[str]) -> Decimal:
    before, after, whole, fraction, exponent = found.groups(default="")
    sign = "-" if (before + after).strip("+") else ""
    return Decimal(f"{sign}{whole.replace(',', '')}{fraction}{exponent}")


class GSM8K:
    """1 where the completion's number equals the reference's, else 0; 18, 18.0, $18 and 18% are equal.

    The number is the one after the last "####", where there is none the last one. A completion without a number
    scores 0.
    """

    name = "gsm8k"
    num_statistics = 2

    def __init__(self) -> None:
        self.signature = f"nrefs:1|number:after-{MARK}-or-last|version:esrl-{metadata.version('esrl')}"

    def check_reference(self, reference: str | Sequence[str]) -> None:
        """Refuse a reference that no completion can match.

        Raises:
            ValueError: it holds no number.
        """
        self._numbers(reference)

    def statistics(self, completion: str, reference: str | Sequence[str]) -> list[float]:
        """Additive over a corpus: [match, 1].

        Raises:
            ValueError: a text is not a string or longer than ``MAX_CHARACTERS``, or a reference holds no number.
        """
        return [self.sentence_score(completion, reference), 1.0]

    def sentence_score(self, completion: str, reference: str | Sequence[str]) -> float:
        """1.0 or 0.0."""
        return float(answer_number(check_text(completion, "completion")) in self._numbers(reference))

    def corpus_score(self, statistics: NDArray[np.float64]) -> NDArray[np.float64]:
        """The share of matches, in per cent, of (..., 2) summed statistics; 0 for an empty corpus."""
        return mean_score(statistics)

    def __call__(self, completions: list[str], reference: list[str], **columns: Any) -> list[float]:
        """The metric as a reward function: 1.0 or 0.0 for each completion."""
        return score_all(self.sentence_score, completions, reference)

    def _numbers(self, reference: str | Sequence[str]) -> list[Decimal]:
        numbers = []
        for text in references_of(reference):
            number = answer_number(text)
            if number is None:
                raise ValueError(
                    f'the reference {text[:60]!r} holds no number; gsm8k needs one, best after "{MARK}". Name the '
                    "column that has the answers as the reference."
                )
            numbers.append(number)
        return numbers
