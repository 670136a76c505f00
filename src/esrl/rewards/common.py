"""What the text metrics share: the length cap, the cache of prepared references, the loop over completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

MAX_CHARACTERS = 100_000
"""A longer completion or reference is refused: it keeps every call of every metric under a second."""

MAX_CACHED_CHARACTERS = 100_000
"""References kept prepared, counted in characters. Rows of one prompt are contiguous, so a small cache hits."""

Prepared = TypeVar("Prepared")


def check_text(text: object, role: str) -> str:
    """``text`` if it is a string of at most ``MAX_CHARACTERS``.

    Raises:
        ValueError: it is not a string, or longer.
    """
    if not isinstance(text, str):
        raise ValueError(f"a {role} is {text!r:.60} ({type(text).__name__}); text metrics need strings.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"a {role} has {len(text)} characters, at most {MAX_CHARACTERS} are scored: {text[:40]!r}...; "
            "lower the length limit or cut the text."
        )
    return text


def plain_text(message: object, role: str) -> str:
    """A text, or the last message's content where it comes as a list of chat messages, as TRL gives chats.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(message, str):
        return message
    if isinstance(message, list) and message and isinstance(message[-1], dict):
        content = message[-1].get("content")
        if isinstance(content, str):
            return content
    raise ValueError(f"a {role} is {message!r:.60}; it must be a text, or a list of chat messages with `content`.")


def references_of(reference: object) -> tuple[str, ...]:
    """One or more references of one completion.

    Raises:
        ValueError: there is none, or one is not a string or too long.
    """
    if isinstance(reference, str):
        return (check_text(reference, "reference"),)
    if not isinstance(reference, Sequence) or not reference:
        raise ValueError(f"the reference is {reference!r:.60}; it must be a string or a non-empty list of strings.")
    return tuple(check_text(one, "reference") for one in reference)


class ReferenceCache(Generic[Prepared]):
    """Keeps what ``prepare`` made of the latest references; the oldest leave first.

    ``prepare`` gets one or more references of one completion.
    """

    def __init__(self, prepare: Callable[[tuple[str, ...]], Prepared]) -> None:
        self._prepare = prepare
        self._entries: dict[str | tuple[str, ...], Prepared] = {}
        self._num_characters = 0

    def __call__(self, reference: str | Sequence[str]) -> Prepared:
        """The prepared form of ``reference``.

        Raises:
            ValueError: there is no reference, or one is not a string or too long.
        """
        key = reference if type(reference) is str else references_of(reference)
        found = self._entries.get(key)
        return self._add(key) if found is None else found

    def _add(self, key: str | tuple[str, ...]) -> Prepared:
        prepared = self._prepare(references_of(key))
        self._entries[key] = prepared
        self._num_characters += _size(key)
        while self._num_characters > MAX_CACHED_CHARACTERS and len(self._entries) > 1:
            oldest = next(iter(self._entries))
            del self._entries[oldest]
            self._num_characters -= _size(oldest)
        return prepared


def _size(key: str | tuple[str, ...]) -> int:
    return 1 + (len(key) if isinstance(key, str) else sum(map(len, key)))


def score_all(
    sentence_score: Callable[[str, str | Sequence[str]], float],
    completions: Sequence[str],
    reference: Sequence[str | Sequence[str]],
) -> list[float]:
    """``sentence_score`` of each completion with its reference: the body of every metric's ``__call__``.

    Raises:
        ValueError: the two lists differ in length.
    """
    if len(completions) != len(reference):
        raise ValueError(
            f"{len(completions)} completions but {len(reference)} references; each completion needs its own reference."
        )
    return [sentence_score(text, wanted) for text, wanted in zip(completions, reference, strict=True)]


def clipped_matches(grams: list, distinct: frozenset, repeated: dict) -> int:
    """How many of ``grams`` the reference holds, each at most as often as the reference does.

    ``distinct`` are the reference's n-grams, ``repeated`` those of them that it holds more than once, with their
    counts. Counting what both hold once is a set operation; only repetitions need a count.
    """
    matches = len(distinct.intersection(grams))
    if repeated and matches:
        counts: dict = {}
        for gram in grams:
            if gram in repeated:
                counts[gram] = counts.get(gram, 0) + 1
        matches += sum(min(count, repeated[gram]) - 1 for gram, count in counts.items())
    return matches


def mean_score(statistics: NDArray[np.float64]) -> NDArray[np.float64]:
    """100 * sum / count of (..., 2) summed statistics; 0 where nothing was counted."""
    sums = np.asarray(statistics, dtype=np.float64)
    return np.asarray(100 * sums[..., 0] / np.maximum(sums[..., 1], 1))
