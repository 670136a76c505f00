"""The built-in task: German to English, about numbers, dates, times, prices and what people do with them.

It needs no file and no network. The sentences have real grammar (cases, genders, verbs at the end and in two parts),
one right translation each, and no end. Training, development and test sentences are disjoint whatever the seeds,
because the text of a sentence decides which part it belongs to.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

from esrl.data.demo.numbers import Draw
from esrl.data.demo.sentences import sentence
from esrl.data.examples import REFERENCE, SOURCE, Example, number_examples

Part = Literal["train", "dev", "test"]

_MAX_MISSES = 5000


def part_of(source: str) -> Part:
    """The part a German sentence belongs to, by its text alone: 90 % train, 5 % dev, 5 % test."""
    bucket = int.from_bytes(blake2b(source.encode(), digest_size=8).digest(), "little") % 100
    return "train" if bucket < 90 else "dev" if bucket < 95 else "test"


def make_examples(count: int, seed: int, part: Part) -> list[Example]:
    """Make ``count`` different sentences of a part, with the columns "source" (German) and "reference" (English).

    The same arguments give the same examples on every machine and Python version, and a smaller ``count`` gives the
    beginning of a larger one.

    Raises:
        ValueError: a negative count, an unknown part, or more sentences than the part has.
    """
    if count < 0:
        raise ValueError(f"count is {count}; it must be 0 or more.")
    if part not in ("train", "dev", "test"):
        raise ValueError(f'the part is {part!r}; it must be "train", "dev" or "test".')
    draw = Draw(f"esrl demo {part} {seed}")
    found: dict[str, str] = {}
    misses = 0
    while len(found) < count:
        source, reference = sentence(draw)
        if source in found or part_of(source) != part:
            misses += 1
            if misses > _MAX_MISSES:
                raise ValueError(
                    f"only {len(found):,} different {part} sentences found for count {count:,}; ask for fewer."
                )
            continue
        found[source] = reference
        misses = 0
    return list(number_examples({SOURCE: source, REFERENCE: reference} for source, reference in found.items()))
