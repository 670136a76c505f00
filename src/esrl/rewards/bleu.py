"""BLEU with sacreBLEU's numbers, several times faster.

Papineni et al. (2002); smoothing as in Chen and Cherry (2014), the way sacreBLEU computes both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU as SacreBLEU

from esrl.rewards.common import ReferenceCache, check_text, clipped_matches, score_all

MAX_ORDER = 4
MAX_CACHED_WORDS = 1 << 16
MAX_CACHED_WORD_LENGTH = 64


class _Reference(NamedTuple):
    lengths: tuple[int, ...]
    distinct: tuple[frozenset, ...]  # one for each order
    repeated: tuple[dict, ...]  # n-grams held more than once, with their counts


class BLEU:
    """BLEU of one completion (in [0, 1]) and of a corpus (0 to 100).

    Sentence scores are sacreBLEU's ``sentence_bleu`` / 100; corpus scores are its ``corpus_bleu`` (where effective
    order is off, as in sacreBLEU). Several references: the closest length and the highest count of each n-gram.

    Args:
        tokenize: the name of a sacreBLEU tokenizer: 13a, intl, zh, char, none, ja-mecab, ko-mecab, flores200, ...
            (the mecab ones need sacreBLEU's extras; the spm ones fetch their model at first use).
        lowercase: ignore case.
        smoothing: "exp", "floor", "add-k" or "none".
        smooth_value: of "floor" (None: 0.1) and "add-k" (None: 1).
        effective_order: in sentence scores leave out the orders the completion is too short for.

    Raises:
        ValueError: an unknown tokenizer or smoothing, or a tokenizer whose extra is not installed.
    """

    name = "bleu"
    num_statistics = 2 + 2 * MAX_ORDER

    def __init__(
        self,
        *,
        tokenize: str = "13a",
        lowercase: bool = False,
        smoothing: str = "exp",
        smooth_value: float | None = None,
        effective_order: bool = True,
    ) -> None:
        _check_choice("tokenize", tokenize, list(SacreBLEU.TOKENIZERS))
        _check_choice("smoothing", smoothing, list(SacreBLEU.SMOOTH_DEFAULTS))
        if smooth_value is not None and not (math.isfinite(smooth_value) and smooth_value >= 0):
            raise ValueError(f"smooth_value is {smooth_value}; it must be finite and 0 or more, or None.")
        try:
            scorer = SacreBLEU(
                tokenize=tokenize, lowercase=lowercase, smooth_method=smoothing, smooth_value=smooth_value
            )
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"tokenize = {tokenize!r} cannot be used: {' '.join(str(error).split())}") from error
        scorer.num_refs = 1
        self.signature = str(scorer.get_signature())
        self.lowercase = lowercase
        self.smoothing = smoothing
        default = SacreBLEU.SMOOTH_DEFAULTS[smoothing]
        self.smooth_value = float(smooth_value if smooth_value is not None else default or 0.0)
        self.effective_order = effective_order
        self._split: Callable[[str], list[str]] = (
            _WordwiseTokenizer(scorer.tokenizer) if tokenize == "13a" else _LineTokenizer(scorer.tokenizer)
        )
        self._reference = ReferenceCache(self._prepare)

    def statistics(self, completion: str, reference: str | Sequence[str]) -> list[float]:
        """Additive over a corpus: [completion length, reference length, matches x 4, totals x 4], in tokens.

        Raises:
            ValueError: a text is not a string or longer than ``MAX_CHARACTERS``.
        """
        length, reference_length, correct = self._count(completion, reference)
        total = [max(0, length - n) for n in range(MAX_ORDER)]
        return [float(value) for value in (length, reference_length, *correct, *total)]

    def sentence_score(self, completion: str, reference: str | Sequence[str]) -> float:
        """Smoothed BLEU of one completion, in [0, 1]."""
        length, reference_length, correct = self._count(completion, reference)
        if not any(correct):
            return 0.0
        log_precision, order, halvings = 0.0, MAX_ORDER, 1.0
        for n in range(MAX_ORDER):
            matches, total = float(correct[n]), float(max(0, length - n))
            if n and self.smoothing == "add-k":
                matches, total = matches + self.smooth_value, total + self.smooth_value
            if total == 0:
                if not self.effective_order:
                    return 0.0
                break
            order = n + 1 if self.effective_order else MAX_ORDER
            if matches == 0 and self.smoothing == "exp":
                halvings *= 2
                matches = 1 / halvings
            elif matches == 0 and self.smoothing == "floor":
                matches = self.smooth_value
            if matches == 0:
                return 0.0
            log_precision += math.log(matches / total)
        brevity = min(0.0, 1 - reference_length / length)
        return min(1.0, math.exp(brevity + log_precision / order))

    def corpus_score(self, statistics: NDArray[np.float64]) -> NDArray[np.float64]:
        """BLEU of summed statistics, 0 to 100.

        Args:
            statistics: (..., num_statistics), each a sum over a corpus (or a resample of it).

        Returns:
            (...)
        """
        sums = np.asarray(statistics, dtype=np.float64)
        length, reference_length = sums[..., 0], sums[..., 1]
        correct, total = sums[..., 2 : 2 + MAX_ORDER], sums[..., 2 + MAX_ORDER :]
        scored = (correct > 0).any(-1)
        if self.smoothing == "add-k":
            later_orders = self.smooth_value * (np.arange(MAX_ORDER) > 0)
            correct, total = correct + later_orders, total + later_orders
        if self.smoothing == "exp":
            missing = correct == 0
            correct = np.where(missing, 0.5 ** np.cumsum(missing, -1), correct)
        elif self.smoothing == "floor":
            correct = np.where(correct == 0, self.smooth_value, correct)
        scored = scored & (total > 0).all(-1) & (correct > 0).all(-1)
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not scored may divide by 0
            brevity = np.minimum(0.0, 1 - reference_length / length)
            score = 100 * np.exp(brevity + np.log(correct / total).mean(-1))
        return np.where(scored, score, 0.0)

    def __call__(self, completions: list[str], reference: list[str], **columns: Any) -> list[float]:
        """The metric as a reward function: each completion's sentence score, in [0, 1]."""
        return score_all(self.sentence_score, completions, reference)

    def _tokens(self, text: str) -> list[str]:
        return self._split((text.lower() if self.lowercase else text).rstrip())

    def _count(self, completion: str, reference: str | Sequence[str]) -> tuple[int, int, list[int]]:
        tokens = self._tokens(check_text(completion, "completion"))
        wanted = self._reference(reference)
        length = len(tokens)
        if len(wanted.lengths) == 1:
            reference_length = wanted.lengths[0]
        else:
            reference_length = min(wanted.lengths, key=lambda one: (abs(one - length), one))
        correct = [0] * MAX_ORDER
        for n, grams in enumerate(_grams(tokens)):
            correct[n] = clipped_matches(grams, wanted.distinct[n], wanted.repeated[n])
            if not correct[n]:  # then no longer n-gram matches either
                break
        return length, reference_length, correct

    def _prepare(self, references: tuple[str, ...]) -> _Reference:
        texts = [self._tokens(text) for text in references]
        most: list[Counter] = [Counter() for _ in range(MAX_ORDER)]
        for tokens in texts:
            for n, grams in enumerate(_grams(tokens)):
                most[n] |= Counter(grams)
        return _Reference(
            lengths=tuple(map(len, texts)),
            distinct=tuple(map(frozenset, most)),
            repeated=tuple({gram: count for gram, count in counts.items() if count > 1} for counts in most),
        )


def _grams(tokens: list[str]) -> Iterator[list]:
    """The n-grams of each order; single tokens stay strings, whose hashes Python keeps."""
    yield tokens
    shifted = [tokens]
    for n in range(1, MAX_ORDER):
        shifted.append(tokens[n:])
        yield list(zip(*shifted, strict=False))


def _check_choice(option: str, value: str, known: list[str]) -> None:
    if value not in known:
        near = get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        raise ValueError(f"{option} is {value!r}, which sacreBLEU does not have; {hint}")


def _uncached(tokenizer: Any) -> Callable[[str], str]:
    """The tokenizer without sacreBLEU's caches, which keep 65,536 lines of any length; samples hardly repeat."""
    inner = getattr(tokenizer, "_post_tokenizer", None)
    if inner is not None:
        tokenizer._post_tokenizer = _uncached(inner)
    call = type(tokenizer).__call__
    return partial(getattr(call, "__wrapped__", call), tokenizer)


class _LineTokenizer:
    """Any sacreBLEU tokenizer, applied to the whole line."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenize = _uncached(tokenizer)

    def __call__(self, line: str) -> list[str]:
        return self._tokenize(line).split()


class _WordwiseTokenizer:
    """sacreBLEU's 13a word by word, with a memory of words.

    13a may be cut at white space: what its rules look at beyond a word's end is whether a digit stands there, and
    white space is none. Only its removals of "<skipped>" and of a hyphen at a line's end, and its entities, work on
    the line; a line with one of these is tokenized whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenize = _uncached(tokenizer)
        self._words: dict[str, tuple[str, ...]] = {}

    def __call__(self, line: str) -> list[str]:
        if "<skipped>" in line or "\n" in line or "&" in line:
            return self._tokenize(line).split()
        tokens: list[str] = []
        known = self._words
        for word in line.split():
            tokens += known.get(word) or self._add(word)
        return tokens

    def _add(self, word: str) -> tuple[str, ...]:
        pieces = tuple(self._tokenize(word).split())
        if len(word) <= MAX_CACHED_WORD_LENGTH:
            if len(self._words) >= MAX_CACHED_WORDS:
                self._words.clear()
            self._words[word] = pieces
        return pieces
