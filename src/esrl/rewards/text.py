"""Text metrics, all of one shape: rewards for training, statistics for corpus scores and bootstrap tests."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from esrl.rewards.bleu import BLEU
from esrl.rewards.chrf import ChrF
from esrl.rewards.common import MAX_CHARACTERS, check_text, mean_score, references_of, score_all
from esrl.rewards.rouge import RougeL

__all__ = ["BLEU", "MAX_CHARACTERS", "ChrF", "ExactMatch", "ExactMatchConfig", "Metric", "RougeL"]


class Metric(Protocol):
    """A text metric.

    ``sentence_score`` and the call (a reward function in TRL's manner) give values in [0, 1]. ``statistics`` add up
    over a corpus, and ``corpus_score`` turns (..., num_statistics) sums into (...) scores from 0 to 100, all at once.
    ``signature`` says what was computed, in sacreBLEU's manner, for one reference per completion.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_statistics(self) -> int: ...

    @property
    def signature(self) -> str: ...

    def statistics(self, completion: str, reference: str | Sequence[str]) -> list[float]: ...

    def sentence_score(self, completion: str, reference: str | Sequence[str]) -> float: ...

    def corpus_score(self, statistics: NDArray[np.float64]) -> NDArray[np.float64]: ...

    def __call__(self, completions: list[str], reference: list[str], **columns: Any) -> list[float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatchConfig:
    """What `exact_match` looks over; white space at both ends never counts."""

    ignore_case: bool = False
    """Compare case-folded."""
    ignore_punctuation: bool = False
    """Compare without punctuation (Unicode's categories P)."""
    ignore_spaces: bool = False
    """Any run of white space counts as one space."""


class ExactMatch:
    """1 where the completion is the reference (or one of them), white space at both ends aside; else 0.

    Args:
        config: what else is looked over; None: nothing.
    """

    name = "exact_match"
    num_statistics = 2

    def __init__(self, config: ExactMatchConfig | None = None) -> None:
        self.config = config or ExactMatchConfig()
        case = "folded" if self.config.ignore_case else "mixed"
        space = "collapsed" if self.config.ignore_spaces else "trimmed"
        punctuation = "|punct:removed" if self.config.ignore_punctuation else ""
        version = metadata.version("esrl")
        self.signature = f"nrefs:1|case:{case}|space:{space}{punctuation}|version:esrl-{version}"

    def statistics(self, completion: str, reference: str | Sequence[str]) -> list[float]:
        """Additive over a corpus: [match, 1].

        Raises:
            ValueError: a text is not a string or longer than ``MAX_CHARACTERS``, or there is no reference.
        """
        return [self.sentence_score(completion, reference), 1.0]

    def sentence_score(self, completion: str, reference: str | Sequence[str]) -> float:
        """1.0 or 0.0."""
        found = self._normalised(check_text(completion, "completion"))
        return float(found in [self._normalised(text) for text in references_of(reference)])

    def _normalised(self, text: str) -> str:
        if self.config.ignore_case:
            text = text.casefold()
        if self.config.ignore_punctuation:
            text = "".join(sign for sign in text if not unicodedata.category(sign).startswith("P"))
        return " ".join(text.split()) if self.config.ignore_spaces else text.strip()

    def corpus_score(self, statistics: NDArray[np.float64]) -> NDArray[np.float64]:
        """The share of matches, in per cent, of (..., 2) summed statistics; 0 for an empty corpus."""
        return mean_score(statistics)

    def __call__(self, completions: list[str], reference: list[str], **columns: Any) -> list[float]:
        """The metric as a reward function: 1.0 or 0.0 for each completion."""
        return score_all(self.sentence_score, completions, reference)
