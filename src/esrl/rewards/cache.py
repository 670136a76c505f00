"""Scores that are kept by text, so that equal texts get equal bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class CacheCounts(NamedTuple):
    """How the cache served since it was made."""

    hits: int = 0
    misses: int = 0


class ScoreCache:
    """Scores by a digest of the text, the oldest leaving first.

    What a step adds is ``fresh`` until ``commit``, so that a step that is given up leaves nothing behind.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts = CacheCounts()
        self.fresh: dict[str, float] = {}
        self._kept: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def look_up(self, keys: Iterable[str]) -> dict[str, float]:
        """The scores that are known, by key; counts hits and misses."""
        found, misses = {}, 0
        for key in keys:
            score = self._kept.get(key, self.fresh.get(key))
            if score is None:
                misses += 1
            else:
                found[key] = score
        self.counts = CacheCounts(self.counts.hits + len(found), self.counts.misses + misses)
        return found

    def add(self, scores: Mapping[str, float]) -> None:
        """Keep scores of the step under way."""
        if self.size:
            self.fresh.update(scores)

    def commit(self, everyone: Iterable[Mapping[str, float]] | None = None) -> None:
        """Take the step's scores over: ``fresh``, or those of all processes, of which the first has the say."""
        for scores in [self.fresh] if everyone is None else everyone:
            for key, score in scores.items():
                self._kept.setdefault(key, score)
        for key in list(self._kept)[: max(0, len(self._kept) - self.size)]:
            del self._kept[key]
        self.fresh = {}

    def state_dict(self) -> dict[str, float]:
        """The committed scores, oldest first."""
        return dict(self._kept)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from committed scores; what is fresh is forgotten."""
        self._kept, self.fresh = dict(state), {}
