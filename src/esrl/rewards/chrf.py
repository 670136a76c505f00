"""chrF and chrF++ with sacreBLEU's numbers, several times faster (Popović 2015, 2017)."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import add
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import CHRF as SacreCHRF

from esrl.rewards.common import ReferenceCache, check_text, clipped_matches, score_all

_PUNCTUATION = frozenset(string.punctuation)


class _Order(NamedTuple):
    distinct: frozenset
    repeated: dict  # n-grams held more than once, with their counts
    total: int


class ChrF:
    """chrF of one completion (in [0, 1]) and of a corpus (0 to 100).

    Equal to sacreBLEU's ``sentence_chrf`` / 100 and ``corpus_chrf``. Several references: the one with the best score.

    Args:
        char_order: longest character n-gram, 1 or more.
        word_order: longest word n-gram; 2 gives chrF++.
        beta: how many times recall counts as much as precision.
        lowercase: ignore case.
        whitespace: let white space take part in character n-grams.

    Raises:
        ValueError: an order or ``beta`` is out of range.
    """

    name = "chrf"

    def __init__(
        self,
        *,
        char_order: int = 6,
        word_order: int = 0,
        beta: int = 2,
        lowercase: bool = False,
        whitespace: bool = False,
    ) -> None:
        for option, value, least in (("char_order", char_order, 1), ("word_order", word_order, 0), ("beta", beta, 1)):
            if value < least:
                raise ValueError(f"{option} is {value}; it must be {least} or more.")
        scorer = SacreCHRF(
            char_order=char_order, word_order=word_order, beta=beta, lowercase=lowercase, whitespace=whitespace
        )
        scorer.num_refs = 1
        self.signature = str(scorer.get_signature())
        self.char_order = char_order
        self.word_order = word_order
        self.factor = beta**2
        self.lowercase = lowercase
        self.whitespace = whitespace
        self.num_statistics = 3 * (char_order + word_order)
        self._reference = ReferenceCache(self._prepare)

    def statistics(self, completion: str, reference: str | Sequence[str]) -> list[float]:
        """Additive over a corpus: [n-grams of the completion, of the reference, matches] for each order.

        Raises:
            ValueError: a text is not a string or longer than ``MAX_CHARACTERS``.
        """
        return self._count(completion, reference)[0]

    def sentence_score(self, completion: str, reference: str | Sequence[str]) -> float:
        """chrF of one completion, in [0, 1]."""
        return self._count(completion, reference)[1]

    def corpus_score(self, statistics: NDArray[np.float64]) -> NDArray[np.float64]:
        """chrF of summed statistics, 0 to 100.

        Args:
            statistics: (..., num_statistics), each a sum over a corpus (or a resample of it).

        Returns:
            (...)
        """
        sums = np.asarray(statistics, dtype=np.float64)
        held, wanted, matches = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
        counted = (held > 0) & (wanted > 0)
        orders = np.maximum(counted.sum(-1), 1)
        precision = np.where(counted, matches / np.maximum(held, 1), 0.0).sum(-1) / orders
        recall = np.where(counted, matches / np.maximum(wanted, 1), 0.0).sum(-1) / orders
        denominator = self.factor * precision + recall
        score = 100 * (1 + self.factor) * precision * recall / np.where(denominator > 0, denominator, 1.0)
        return np.asarray(score)

    def __call__(self, completions: list[str], reference: list[str], **columns: Any) -> list[float]:
        """The metric as a reward function: each completion's sentence score, in [0, 1]."""
        return score_all(self.sentence_score, completions, reference)

    def _count(self, completion: str, reference: str | Sequence[str]) -> tuple[list[float], float]:
        """Statistics and score against the best of the references."""
        check_text(completion, "completion")
        prepared = self._reference(reference)
        orders = self._grams(completion) if len(prepared) == 1 else list(self._grams(completion))
        best: list[float] = []
        best_score = -1.0
        for wanted in prepared:
            statistics: list[float] = []
            for grams, order in zip(orders, wanted, strict=True):
                matches = clipped_matches(grams, order.distinct, order.repeated)
                statistics += (float(len(grams) if order.total else 0), float(order.total), float(matches))
            score = self._score(statistics)
            if score > best_score:
                best, best_score = statistics, score
        return best, best_score

    def _score(self, statistics: list[float]) -> float:
        precision = recall = 0.0
        orders = 0
        for held, wanted, matches in zip(statistics[0::3], statistics[1::3], statistics[2::3], strict=True):
            if held and wanted:
                precision += matches / held
                recall += matches / wanted
                orders += 1
        if not precision:  # no match, so no recall either
            return 0.0
        precision, recall = precision / orders, recall / orders
        return min(1.0, (1 + self.factor) * precision * recall / (self.factor * precision + recall))

    def _prepare(self, references: tuple[str, ...]) -> list[list[_Order]]:
        prepared = []
        for text in references:
            orders = []
            for grams in self._grams(text):
                counts = Counter(grams)
                repeated = {gram: count for gram, count in counts.items() if count > 1}
                orders.append(_Order(frozenset(counts), repeated, len(grams)))
            prepared.append(orders)
        return prepared

    def _grams(self, text: str) -> Iterator[list]:
        """The n-grams of each order: characters first, then words."""
        if self.lowercase:
            text = text.lower()
        characters = text if self.whitespace else "".join(text.split())
        grams = list(characters)
        yield grams
        for n in range(1, self.char_order):
            grams = list(map(add, grams, characters[n:]))  # each shorter n-gram and the character after it
            yield grams
        if self.word_order:
            words = _words(text)
            for n in range(1, self.word_order + 1):
                yield list(zip(*(words[i:] for i in range(n)), strict=False))


def _words(text: str) -> list[str]:
    """Words with one punctuation mark split off: the last character's, else the first one's (as chrF++ does)."""
    words: list[str] = []
    for word in text.split():
        if len(word) == 1:
            words.append(word)
        elif word[-1] in _PUNCTUATION:
            words += (word[:-1], word[-1])
        elif word[0] in _PUNCTUATION:
            words += (word[0], word[1:])
        else:
            words.append(word)
    return words
