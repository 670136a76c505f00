"""Examples with ids that depend on their content alone, and the rule for over-long ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Literal

SOURCE = "source"
REFERENCE = "reference"
MESSAGES = "messages"
"""The column with a conversation up to its answer, as JSON; its presence marks a chat example."""
REJECTED = "rejected"
"""The column with the worse of two answers; the better one is the reference."""

_DIGEST_BYTES = 10  # 20 hex characters: two of 10^8 different examples agree with probability 4e-9
_TOKENIZE_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """One input and what belongs to it.

    ``columns`` holds ``"source"``, ``"reference"`` where there is one, and every further column of the data by name.
    ``id`` is a hash of the columns and the number of equal examples before this one (see `number_examples`).
    """

    id: str
    columns: dict[str, str]

    @property
    def source(self) -> str:
        return self.columns[SOURCE]

    @property
    def reference(self) -> str | None:
        return self.columns.get(REFERENCE)


def content_digest(columns: Mapping[str, str]) -> str:
    """20 hex characters of BLAKE2b over all columns, whatever their order.

    Names and values go in with their byte lengths, so no two different contents share an encoding. Empty columns do
    not count: a record that lacks a column and one in which it is empty are the same content.

    Raises:
        UnicodeEncodeError: a value holds an unpaired surrogate.
    """
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(columns):
        if columns[name]:
            for text in (name, columns[name]):
                data = text.encode()
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
    return digest.hexdigest()


def number_examples(records: Iterable[dict[str, str]]) -> Iterator[Example]:
    """Give each record the id ``"{digest}-{n}"``; n counts equal records from 0 in the order they come."""
    seen: dict[str, int] = {}
    for columns in records:
        digest = content_digest(columns)
        occurrence = seen.get(digest, 0)
        seen[digest] = occurrence + 1
        yield Example(f"{digest}-{occurrence}", columns)


def fixed_subset(examples: Sequence[Example], limit: int) -> tuple[Example, ...]:
    """The ``limit`` examples with the smallest ids, in the order given; which ones does not depend on that order."""

    def rank(index: int) -> tuple[str, int]:
        digest, occurrence = examples[index].id.split("-")
        return digest, int(occurrence)

    chosen = sorted(range(len(examples)), key=rank)[:limit]
    return tuple(examples[index] for index in sorted(chosen))


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthReport:
    """What `limit_lengths` did."""

    read: int
    kept: int
    long_sources: int
    """Examples whose source has more than ``max_source_tokens``."""
    long_references: int
    """Examples whose reference has more than ``max_target_tokens``."""
    max_source_tokens: int
    max_target_tokens: int | None
    rule: Literal["skip", "cut", "truncate_left"]

    @property
    def skipped(self) -> int:
        return self.read - self.kept

    def __str__(self) -> str:
        parts = [f"{self.long_sources:,} sources over {self.max_source_tokens:,} tokens"]
        if self.max_target_tokens is not None:
            parts.append(f"{self.long_references:,} references over {self.max_target_tokens:,} tokens")
        fate = f"{self.skipped:,} examples skipped"
        if self.rule == "cut":
            fate = "kept, sources to be cut"
        if self.rule == "truncate_left":
            fate += ", sources cut at their beginning"
        return f"{' and '.join(parts)}: {fate}; {self.kept:,} of {self.read:,} examples left"


def limit_lengths(
    examples: Sequence[Example],
    tokenize: Callable[[list[str]], list[list[int]]],
    *,
    max_source_tokens: int,
    max_target_tokens: int | None,
    rule: Literal["skip", "cut"],
) -> tuple[tuple[Example, ...], LengthReport]:
    """Find the over-long examples and leave them out (``"skip"``) or in (``"cut"``).

    Under ``"cut"`` nothing changes here: the caller's tokenization truncates the sources, and over-long references
    stay whole, because rewards compare texts, not tokens. Either way they are counted.

    Args:
        tokenize: texts to token ids, as in training; special tokens count when it adds them.
        max_source_tokens: 1 or more.
        max_target_tokens: 1 or more; None leaves references alone.

    Raises:
        ValueError: a limit below 1, an unknown rule, or every example is over-long under ``"skip"``.
    """
    if max_source_tokens < 1:
        raise ValueError(f"max_source_tokens is {max_source_tokens}; it must be 1 or more.")
    if max_target_tokens is not None and max_target_tokens < 1:
        raise ValueError(f"max_target_tokens is {max_target_tokens}; it must be 1 or more, or None for no limit.")
    if rule not in ("skip", "cut"):
        raise ValueError(f'the rule for over-long examples is {rule!r}; it must be "skip" or "cut".')
    references = None
    if max_target_tokens is not None:
        known = _lengths((e.reference or "" for e in examples), tokenize)
        references = [0 if e.reference is None else n for e, n in zip(examples, known, strict=True)]
    return limit_token_counts(
        examples,
        list(_lengths((e.source for e in examples), tokenize)),
        references,
        max_source_tokens=max_source_tokens,
        max_target_tokens=max_target_tokens,
        rule=rule,
    )


def limit_token_counts(
    examples: Sequence[Example],
    source_tokens: Sequence[int],
    reference_tokens: Sequence[int] | None,
    *,
    max_source_tokens: int,
    max_target_tokens: int | None,
    rule: Literal["skip", "cut", "truncate_left"],
) -> tuple[tuple[Example, ...], LengthReport]:
    """`limit_lengths` with the tokens of sources and references already counted.

    Under ``"truncate_left"`` the caller cuts the beginning of long sources; long references are left out, since the
    end of a cut one would be learned as an end.

    Raises:
        ValueError: nothing is left.
    """
    long_source = [count > max_source_tokens for count in source_tokens]
    long_reference = [False] * len(examples)
    if max_target_tokens is not None and reference_tokens is not None:
        long_reference = [count > max_target_tokens for count in reference_tokens]
    kept = tuple(
        e
        for e, s, r in zip(examples, long_source, long_reference, strict=True)
        if rule == "cut" or not ((s and rule == "skip") or r)
    )
    report = LengthReport(
        read=len(examples),
        kept=len(kept),
        long_sources=sum(long_source),
        long_references=sum(long_reference),
        max_source_tokens=max_source_tokens,
        max_target_tokens=max_target_tokens,
        rule=rule,
    )
    if examples and not kept:
        remedy = ', or keep over-long examples with the rule "cut"' if rule == "skip" else ""
        raise ValueError(f"{report}. Raise the limits{remedy}.")
    return kept, report


def _lengths(texts: Iterable[str], tokenize: Callable[[list[str]], list[list[int]]]) -> Iterator[int]:
    rest = iter(texts)
    while batch := list(islice(rest, _TOKENIZE_AT_ONCE)):
        rows = tokenize(batch)
        if len(rows) != len(batch):
            raise ValueError(f"tokenize returned {len(rows)} rows for {len(batch)} texts; it must return one each.")
        yield from map(len, rows)
