"""Scores of a test set: corpus metrics with their signature and interval, and the paired bootstrap.

Everything here works on additive statistics: a segment's statistics are extracted once, a resample of the test set is a
row of weights, and a thousand resamples are one matrix product.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esrl.rewards.calling import METRICS
from esrl.rewards.text import Metric

CONFIDENCE = 0.95
_WEIGHTS_AT_ONCE = 4_000_000  # resamples x segments held at a time: 32 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A corpus score from 0 to 100, how it was computed, and its 95 % bootstrap interval (percentiles)."""

    score: float
    signature: str
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two systems on one test set.

    ``difference`` is score - other_score; [``low``, ``high``] is its 95 % bootstrap interval (percentiles);
    ``p_value`` is two-sided, see ``paired_bootstrap``.
    """

    score: float
    other_score: float
    difference: float
    low: float
    high: float
    p_value: float


def metrics_by_name(names: Sequence[str]) -> list[Metric]:
    """The metrics called ``names``, each with its default settings, in that order.

    Raises:
        ValueError: a name is unknown (the nearest one is suggested).
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name.lower(), METRICS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"metric {name!r} is unknown; {hint}Known: {', '.join(METRICS)}.")
    return [METRICS[name]() for name in names]


def check_references(metrics: Sequence[Any], references: Iterable[str]) -> None:
    """Refuse references that a metric cannot see, before any time is spent.

    Raises:
        ValueError: the number of the first such reference, and the metric to take instead.
    """
    checks = [metric.check_reference for metric in metrics if hasattr(metric, "check_reference")]
    for number, reference in enumerate(references if checks else (), 1):
        for check in checks:
            try:
                check(reference)
            except ValueError as error:
                raise ValueError(f"example {number}: {error}") from error


def score_corpus(
    metrics: Sequence[Metric],
    completions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    num_resamples: int = 1000,
    seed: int = 12345,
) -> dict[str, Score]:
    """Score a test set by every metric.

    Args:
        completions: one output for each segment.
        references: one reference, or several, for each segment.
        num_resamples: bootstrap resamples behind the interval.

    Returns:
        the scores by the metric's name, in the order of ``metrics``.

    Raises:
        ValueError: there is no segment, the lengths differ, or two metrics share a name.
    """
    names = [metric.name for metric in metrics]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"two metrics are called {repeated[0]!r}; scores are kept by name, score them one after another."
        )
    _check_lengths({"completions": len(completions), "references": len(references)}, num_resamples)
    statistics = [_statistics(metric, completions, references) for metric in metrics]
    resampled = _resample(statistics, num_resamples, seed)
    return {
        metric.name: Score(
            score=float(metric.corpus_score(own.sum(0))),
            signature=_signature(metric, references),
            **_interval(metric.corpus_score(sums)),
        )
        for metric, own, sums in zip(metrics, statistics, resampled, strict=True)
    }


def paired_bootstrap(
    metric: Metric,
    completions: Sequence[str],
    others: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    num_resamples: int = 1000,
    seed: int = 12345,
) -> Comparison:
    """Compare two systems by paired bootstrap resampling (Koehn 2004), two-sided as in sacreBLEU's ``PairedTest``.

    With d the absolute difference of the two corpus scores on the whole test set and d_b the one on resample b of B,

        p = (1 + #{b : d_b - mean(d_1 .. d_B) > d}) / (B + 1)

    The resamples are those sacreBLEU draws from the same seed, so both report the same p-value up to its float32.
    Equal outputs have p = 1 / (B + 1) by this formula (no d_b exceeds 0 strictly); they are given p = 1 here, for a
    difference of nothing is no evidence.

    Raises:
        ValueError: there is no segment, the lengths differ, or ``num_resamples`` is below 1.
    """
    lengths = {"completions": len(completions), "others": len(others), "references": len(references)}
    _check_lengths(lengths, num_resamples)
    both = [_statistics(metric, texts, references) for texts in (completions, others)]
    score, other_score = (float(metric.corpus_score(statistics.sum(0))) for statistics in both)
    sums, other_sums = _resample(both, num_resamples, seed)
    differences = metric.corpus_score(sums) - metric.corpus_score(other_sums)
    absolute = np.abs(differences)
    exceeding = int(np.sum(absolute - absolute.mean() > abs(score - other_score)))
    identical = bool(np.array_equal(both[0], both[1]))
    return Comparison(
        score=score,
        other_score=other_score,
        difference=score - other_score,
        p_value=1.0 if identical else (exceeding + 1) / (num_resamples + 1),
        **_interval(differences),
    )


def _check_lengths(lengths: dict[str, int], num_resamples: int) -> None:
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(
            f"{listed}: line i of each belongs to segment i, so the numbers must agree. Check for lost lines."
        )
    if not lengths["completions"]:
        raise ValueError("there are no completions; a corpus score needs at least one segment.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; the bootstrap needs at least 1, 1000 is usual.")


def _signature(metric: Metric, references: Sequence[str | Sequence[str]]) -> str:
    """The metric's signature with the number of references in the test set, "var" where it varies (as sacreBLEU)."""
    numbers = {1 if isinstance(reference, str) else len(reference) for reference in references}
    return metric.signature.replace("nrefs:1|", f"nrefs:{numbers.pop() if len(numbers) == 1 else 'var'}|", 1)


def _statistics(
    metric: Metric, completions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> NDArray[np.float64]:
    """(N, num_statistics) of the segments."""
    rows = [metric.statistics(text, reference) for text, reference in zip(completions, references, strict=True)]
    return np.asarray(rows, dtype=np.float64)


def _resample(statistics: list[NDArray[np.float64]], num_resamples: int, seed: int) -> list[NDArray[np.float64]]:
    """Sums over resampled test sets: (num_resamples, num_statistics) for each array, all from the same resamples."""
    blocks = (
        [[weights @ own for own in statistics] for weights in _weights(len(statistics[0]), num_resamples, seed)]
        if statistics
        else []
    )
    return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]


def _weights(num_segments: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """The multinomial weight matrix (num_resamples, N), a block of rows at a time.

    Counting drawn indices is faster than ``Generator.multinomial`` and draws what sacreBLEU draws.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _WEIGHTS_AT_ONCE // num_segments)
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        drawn = rng.integers(0, num_segments, size=(count, num_segments))
        drawn += np.arange(count)[:, None] * num_segments  # one bin for each (resample, segment)
        counts = np.bincount(drawn.ravel(), minlength=count * num_segments)
        yield counts.reshape(count, num_segments).astype(np.float64)


def _interval(values: NDArray[Any]) -> dict[str, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"low": float(low), "high": float(high)}
