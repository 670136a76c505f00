"""Rewards at matched length: how much better answers are than others of about the same length.

Reward models like long answers, so a policy can gain reward by length alone. What is left of its gain among answers of
one length is not length's doing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedLength:
    """The mean reward of answers above that of others, before and after matching their lengths."""

    difference: float
    """At matched length."""
    standard_error: float
    """Of ``difference``, for independent answers whose rewards spread alike in every bin; NaN where every bin has one
    answer a side."""
    unmatched: float
    """The plain difference of means."""
    length_difference: float
    """What is left of the difference in length within the bins, weighted as ``difference`` is; near 0 where matching
    worked."""
    matched_share: float
    """Share of all answers in bins that have answers of both sides; the others cannot be compared."""
    num_bins: int
    """Bins with answers of both sides."""


def matched_length(
    rewards: Sequence[float],
    lengths: Sequence[int],
    other_rewards: Sequence[float],
    other_lengths: Sequence[int],
    *,
    num_bins: int = 20,
) -> MatchedLength:
    """Compare two sets of answers at matched length.

    All lengths are cut into ``num_bins`` bins of about equally many answers; equal lengths share a bin, so with few
    different lengths every one has its own. In each bin that has answers of both sides, n and m of them, the means are
    compared; bins weigh n m / (n + m), the inverse variance of their difference under one spread of rewards.

    Args:
        lengths: tokens of each answer; ``other_lengths`` likewise.

    Raises:
        ValueError: a side is empty, its two lists differ in length or hold what is not finite, ``num_bins`` is below 1,
            or no bin has answers of both sides.
    """
    own, own_lengths = _checked("rewards", rewards, lengths)
    others, others_lengths = _checked("other_rewards", other_rewards, other_lengths)
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be 1 or more.")
    edges = _edges(np.concatenate([own_lengths, others_lengths]), num_bins)
    bins, other_bins = (np.searchsorted(edges, one, side="left") for one in (own_lengths, others_lengths))
    shared = np.intersect1d(bins, other_bins)
    if not len(shared):
        raise ValueError(
            f"no length is shared: answers of {own_lengths.min():g} to {own_lengths.max():g} tokens against "
            f"{others_lengths.min():g} to {others_lengths.max():g}; there is nothing to compare at matched length."
        )
    weight = rise = longer = squares = 0.0
    counted = 0
    for one in shared.tolist():
        mine, theirs = bins == one, other_bins == one
        n, m = int(mine.sum()), int(theirs.sum())
        share = n * m / (n + m)
        weight += share
        counted += n + m
        rise += share * (own[mine].mean() - others[theirs].mean())
        longer += share * (own_lengths[mine].mean() - others_lengths[theirs].mean())
        squares += n * own[mine].var() + m * others[theirs].var()
    freedom = counted - 2 * len(shared)
    return MatchedLength(
        difference=float(rise / weight),
        # a bin's difference has variance s^2 / share, so the weighted mean has s^2 / sum(share)
        standard_error=math.sqrt(squares / freedom / weight) if freedom else math.nan,
        unmatched=float(own.mean() - others.mean()),
        length_difference=float(longer / weight),
        matched_share=counted / (len(own) + len(others)),
        num_bins=len(shared),
    )


def _checked(
    name: str, rewards: Sequence[float], lengths: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, sizes = np.asarray(rewards, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    if values.ndim != 1 or values.shape != sizes.shape or not len(values):
        raise ValueError(
            f"{name}: {values.shape} rewards for {sizes.shape} lengths; give one of each for every answer."
        )
    if not (np.isfinite(values).all() and np.isfinite(sizes).all()):
        raise ValueError(f"{name} or their lengths are not all finite; leave out answers without a reward.")
    return values, sizes


def _edges(lengths: NDArray[np.float64], num_bins: int) -> NDArray[np.float64]:
    """Upper edges, inclusive, of bins with about equally many of ``lengths``; the last one is open."""
    distinct = np.unique(lengths)
    if len(distinct) <= num_bins:
        return distinct[:-1]
    quantiles = np.quantile(lengths, np.arange(1, num_bins) / num_bins, method="lower")
    return np.unique(quantiles)
