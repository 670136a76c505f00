"""ROUGE-L with rouge-score's numbers, much faster (Lin, 2004): a bit-parallel longest common subsequence."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from esrl.rewards.common import MAX_CHARACTERS, ReferenceCache, check_text, mean_score, score_all

MAX_CACHED_STEMS = 1 << 16
MAX_SUMMARY_WORK = 400_000
"""Summary level: tokens and table cells / 1024, over all pairs of lines that share a token: half a second, 50 MB."""

_TOKENIZERS = ("ascii", "unicode")
_WORD = re.compile(r"\w+")
_KEEP_ALPHANUMERIC = bytes(code if chr(code) in string.ascii_lowercase + string.digits else 32 for code in range(256))

_ASCII_IN_LOWER_CASE = "\u212a\u0130"
"""The characters beyond ASCII that lower case turns into ASCII ones: the Kelvin sign and a Turkish I."""

Lines = list[list[str]]

_similarity = LCSseq.similarity


class RougeL:
    """F-measure of the longest common subsequence, in [0, 1]; of a corpus its mean, 0 to 100.

    Equal to rouge-score's ``rougeL``, with ``summary_level`` to its ``rougeLsum``. Several references: the best one.

    Args:
        stemming: compare stems of words over three letters (Porter's, from nltk, as rouge-score does).
        summary_level: compare line by line (one sentence on each), taking the union of the matches.
        tokenizer: "ascii", rouge-score's: runs of a-z and 0-9, so other letters part words; "unicode": runs of
            letters and digits of any script, for which rouge-score has no number.

    Raises:
        ValueError: an unknown tokenizer, or nltk is missing.
    """

    @property
    def name(self) -> str:
        """``rouge_l``, or ``rouge_l_unicode`` with words of any script."""
        return "rouge_l" if self.tokenizer == "ascii" else "rouge_l_unicode"

    num_statistics = 2

    def __init__(self, *, stemming: bool = False, summary_level: bool = False, tokenizer: str = "ascii") -> None:
        if tokenizer not in _TOKENIZERS:
            raise ValueError(f"tokenizer is {tokenizer!r}; it must be one of {', '.join(_TOKENIZERS)}.")
        self._split = _ascii_tokens if tokenizer == "ascii" else _unicode_tokens
        self._stem = _Stemmer() if stemming else None
        self.tokenizer = tokenizer
        self.summary_level = summary_level
        level = "summary" if summary_level else "sentence"
        stem = "porter" if stemming else "no"
        version = metadata.version("esrl")
        self.signature = f"nrefs:1|case:lc|stem:{stem}|tok:{tokenizer}|level:{level}|version:esrl-{version}"
        self._reference = ReferenceCache(self._prepare)

    def statistics(self, completion: str, reference: str | Sequence[str]) -> list[float]:
        """Additive over a corpus: [F-measure, 1].

        Raises:
            ValueError: a text is not a string or longer than ``MAX_CHARACTERS``.
        """
        return [self.sentence_score(completion, reference), 1.0]

    def sentence_score(self, completion: str, reference: str | Sequence[str]) -> float:
        """F-measure of one completion, in [0, 1]; 0 where either side has no token.

        Raises:
            ValueError: see ``statistics``; or at summary level so many lines that comparing them takes too long.
        """
        check_text(completion, "completion")
        wanted = self._reference(reference)
        if self.summary_level:
            lines = self._lines(completion)
            return max(_summary_score(one, lines) for one in wanted)
        tokens = self._tokens(completion)
        best = 0.0
        for (line,) in wanted:
            matches = _similarity(line, tokens)
            if matches:
                best = max(best, 2 * matches / (len(line) + len(tokens)))
        return best

    def corpus_score(self, statistics: NDArray[np.float64]) -> NDArray[np.float64]:
        """100 times the mean F-measure of (..., 2) summed statistics; 0 for an empty corpus."""
        return mean_score(statistics)

    def __call__(self, completions: list[str], reference: list[str], **columns: Any) -> list[float]:
        """The metric as a reward function: each completion's F-measure, in [0, 1]."""
        scores = self._compiled(completions, reference)
        return score_all(self.sentence_score, completions, reference) if scores is None else scores

    def _compiled(self, completions: list[str], reference: list[str]) -> list[float] | None:
        """All at once by the compiled kernel; None where there is none, or this is not for it."""
        if self.tokenizer != "ascii" or self.summary_level or self._stem is not None:
            return None
        if not completions or len(completions) != len(reference):
            return None
        from esrl.kernels import kernels  # brings PyTorch, which a single score does not need

        native = kernels()
        own, wanted = _joined(completions), _joined(reference)
        return (
            None if native is None or own is None or wanted is None else native.rouge_l(own, wanted, len(completions))
        )

    def check_reference(self, reference: str | Sequence[str]) -> None:
        """Refuse a reference that the ASCII tokenizer cannot see, such as Chinese text: every completion would score 0.

        Raises:
            ValueError: a reference has letters but no token. The metric ``rouge_l_unicode`` takes such text.
        """
        for text in (reference,) if isinstance(reference, str) else reference:
            if any(map(str.isalpha, text)) and not self._tokens(text):
                raise ValueError(
                    f"ROUGE-L's {self.tokenizer} tokenizer finds no token in the reference {text[:40]!r}, so every "
                    'completion would score 0; use rouge_l_unicode (tokenizer="unicode").'
                )

    def _tokens(self, text: str) -> list[str]:
        tokens = self._split(text.lower())
        return tokens if self._stem is None else [stem for stem in map(self._stem, tokens) if stem]

    def _lines(self, text: str) -> Lines:
        return [tokens for line in text.split("\n") if (tokens := self._tokens(line))]

    def _prepare(self, references: tuple[str, ...]) -> list[Lines]:
        return [self._lines(text) if self.summary_level else [self._tokens(text)] for text in references]


def _joined(texts: list[str]) -> bytes | None:
    """The texts, each followed by a 0, as the kernel reads them; None where one is no text, too long or holds a 0."""
    try:
        joined = "\0".join(texts)
        if max(map(len, texts)) > MAX_CHARACTERS or joined.count("\0") != len(texts) - 1:
            return None
    except TypeError:  # several references, or what is no text: said where one is scored by itself
        return None
    if any(sign in joined for sign in _ASCII_IN_LOWER_CASE):
        joined = joined.lower()
    return joined.encode("utf-8", "surrogatepass") + b"\0"


def _ascii_tokens(text: str) -> list[str]:
    """Runs of a-z and 0-9, by a byte table: three times as fast as the regular expression."""
    return text.encode("ascii", "replace").translate(_KEEP_ALPHANUMERIC).decode("ascii").split()


def _unicode_tokens(text: str) -> list[str]:
    return _WORD.findall(text)


class _Stemmer:
    """Porter's stems of words over three letters, remembered."""

    def __init__(self) -> None:
        try:
            from nltk.stem.porter import PorterStemmer
        except ImportError as error:
            raise ValueError(
                "stemming needs nltk, which is not installed; pip install nltk, or stemming=False."
            ) from error
        self._stem = PorterStemmer().stem
        self._known: dict[str, str] = {}

    def __call__(self, word: str) -> str:
        if len(word) <= 3:
            return word
        stem = self._known.get(word)
        if stem is None:
            stem = self._stem(word)
            if len(self._known) >= MAX_CACHED_STEMS:
                self._known.clear()
            if len(word) <= 64:
                self._known[word] = stem
        return stem


def _summary_score(reference: Lines, completion: Lines) -> float:
    """F-measure of the union LCS (Lin, section 3.2), no token counted more often than either side holds it."""
    if len(reference) == len(completion) == 1:  # the union is the one subsequence, and neither side can run out
        return 2 * _similarity(reference[0], completion[0]) / (len(reference[0]) + len(completion[0]))
    left_reference = Counter(token for line in reference for token in line)
    left_completion = Counter(token for line in completion for token in line)
    lines = list({tuple(line): line for line in completion}.values())
    lines_with: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        for token in set(line):
            lines_with.setdefault(token, []).append(index)
    num_reference, num_completion = left_reference.total(), left_completion.total()
    hits = work = 0
    for line in reference:
        union: set[int] = set()
        for index in sorted({index for token in set(line) for index in lines_with.get(token, ())}):
            work += len(line) + len(lines[index]) + len(line) * len(lines[index]) // 1024
            if work > MAX_SUMMARY_WORK:
                raise ValueError(
                    f"summary-level ROUGE-L of {len(reference)} reference lines ({num_reference} tokens) and "
                    f"{len(completion)} completion lines ({num_completion} tokens) takes too long; shorten the texts "
                    "or set summary_level=False."
                )
            union |= _matched_positions(line, lines[index])
        for position in sorted(union):
            token = line[position]
            if left_completion[token] > 0 and left_reference[token] > 0:
                hits += 1
                left_completion[token] -= 1
                left_reference[token] -= 1
    return 2 * hits / (num_reference + num_completion) if hits else 0.0


def _matched_positions(reference: list[str], completion: list[str]) -> set[int]:
    """Positions in ``reference`` of one longest common subsequence: the one rouge-score reads out of its table.

    Each row of the table is one integer: bit j is 0 where the row rises by one at column j (Hyyrö, 2004). Walking
    back from the corner, rouge-score takes a match, else goes left if that cell is larger than the one above.
    """
    where: dict[str, int] = {}
    for column, token in enumerate(completion):
        where[token] = where.get(token, 0) | 1 << column
    full = (1 << len(completion)) - 1
    row = full
    rows = [row]
    for token in reference:
        matched = row & where.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
        rows.append(row)

    positions: set[int] = set()
    i, j = len(reference), len(completion)
    while i and j:
        if reference[i - 1] == completion[j - 1]:
            i, j = i - 1, j - 1
            positions.add(i)
        elif not rows[i] >> (j - 1) & 1 or _value(rows[i - 1], j) == _value(rows[i], j):
            i -= 1  # the cell to the left is no larger than the one above
        else:
            j -= 1
    return positions


def _value(row: int, column: int) -> int:
    """The table's value: how many of the row's first ``column`` bits are 0."""
    return column - (row & ((1 << column) - 1)).bit_count()
