"""How good a reward model is on held-out preferences: accuracy, calibration, and what of it is length.

A pair's margin is r(chosen) - r(rejected); the Bradley-Terry model reads sigmoid(margin) as the probability that the
chosen answer is the better one. Annotators prefer longer answers, so a model that has learnt nothing but length can
look good: beside every accuracy stand that of "the longer one wins", the accuracy where the chosen answer is the
shorter one, and the accuracy where both are about as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_BINS = 10
MATCHED_RATIO = 0.8
"""Two answers count as equally long when the shorter has at least this share of the longer one's tokens."""
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Pairs whose confidence lies in [low, high)."""

    low: float
    high: float
    count: int
    confidence: float | None
    """Mean confidence of the pairs; None without any."""
    accuracy: float | None
    """Share of them that the model orders rightly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceReport:
    """A reward model on N pairs; every share lies in [0, 1], and is None where there is no pair to take it of."""

    pairs: int
    accuracy: float
    """Share with r(chosen) > r(rejected); equal rewards count half."""
    accuracy_low: float
    """Lower end of the accuracy's 95 % interval (Wilson)."""
    accuracy_high: float
    loss: float
    """Mean of -log sigmoid(margin), in nats; ln 2 = 0.693 for a model that knows nothing."""
    margin: float
    """Mean margin."""
    ece: float
    """Expected calibration error (Naeini et al. 2015): mean over pairs of |confidence - accuracy| of their bin."""
    bins: tuple[ReliabilityBin, ...]
    accuracy_chosen_shorter: float | None
    """Accuracy on pairs whose chosen answer has fewer tokens: the length bias."""
    accuracy_chosen_longer: float | None
    accuracy_matched: float | None
    """Accuracy where the shorter answer has at least 0.8 of the longer one's tokens."""
    chosen_shorter: int
    chosen_longer: int
    matched: int
    length_accuracy: float
    """Accuracy of the baseline that prefers the longer answer; equal lengths count half."""
    length_p_value: float
    """Two-sided sign test (McNemar's exact) of the model against that baseline, on the pairs where they differ."""
    length_correlation: float | None
    """Pearson correlation of reward and tokens over all 2N answers; None where either never varies."""
    margin_length_correlation: float | None
    """Likewise of margin and difference in tokens over pairs: length within a prompt."""

    def scores(self, prefix: str = "dev_") -> dict[str, float]:
        """The numbers alone, without those there are none of."""
        names = (
            *("accuracy", "loss", "margin", "ece", "accuracy_chosen_shorter", "accuracy_chosen_longer"),
            *("accuracy_matched", "length_accuracy", "length_p_value", "length_correlation"),
            "margin_length_correlation",
        )
        values = {name: getattr(self, name) for name in names}
        return {prefix + name: float(value) for name, value in values.items() if value is not None}


def preference_report(
    chosen: Sequence[float], rejected: Sequence[float], chosen_tokens: Sequence[int], rejected_tokens: Sequence[int]
) -> PreferenceReport:
    """Judge a reward model by its rewards.

    Args:
        chosen, rejected: (N,) rewards of the better and the worse answer of each pair.
        chosen_tokens, rejected_tokens: (N,) lengths of these answers.

    Raises:
        ValueError: no pair, different numbers of them, or a reward that is not finite.
    """
    rewards = np.asarray([chosen, rejected], dtype=np.float64)
    tokens = np.asarray([chosen_tokens, rejected_tokens], dtype=np.float64)
    if rewards.shape != tokens.shape or rewards.size == 0:
        raise ValueError(f"rewards of shape {rewards.shape} and lengths of {tokens.shape}; give N >= 1 of each.")
    if not np.isfinite(rewards).all():
        bad = int(np.argmin(np.isfinite(rewards).all(0)))
        raise ValueError(f"pair {bad} has the rewards {rewards[:, bad].tolist()}; they must be finite.")
    margin, extra = rewards[0] - rewards[1], tokens[0] - tokens[1]
    right, longer = (np.sign(margin) + 1) / 2, (np.sign(extra) + 1) / 2
    matched = tokens.min(0) >= MATCHED_RATIO * tokens.max(0)
    low, high = wilson_interval(float(right.sum()), len(right))
    ece, bins = calibration(margin)
    return PreferenceReport(
        pairs=len(right),
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        loss=float(np.logaddexp(0.0, -margin).mean()),
        margin=float(margin.mean()),
        ece=ece,
        bins=bins,
        accuracy_chosen_shorter=_mean(right[extra < 0]),
        accuracy_chosen_longer=_mean(right[extra > 0]),
        accuracy_matched=_mean(right[matched]),
        chosen_shorter=int((extra < 0).sum()),
        chosen_longer=int((extra > 0).sum()),
        matched=int(matched.sum()),
        length_accuracy=float(longer.mean()),
        length_p_value=sign_test(int((right > longer).sum()), int((right < longer).sum())),
        length_correlation=correlation(rewards.ravel(), tokens.ravel()),
        margin_length_correlation=correlation(margin, extra),
    )


def calibration(margin: Array, num_bins: int = NUM_BINS) -> tuple[float, tuple[ReliabilityBin, ...]]:
    """Expected calibration error of sigmoid(margin), and the bins of its reliability diagram.

    Which answer is called the chosen one is known beforehand, so sigmoid(margin) itself has nothing to be compared
    with. The model's *confidence* is max(p, 1 - p), its claim to be right about the pair; the bins divide [0.5, 1]
    evenly. (The same error comes from bins over [0, 1] that see every pair both ways round.)
    """
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (np.sign(margin) + 1) / 2
    place = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    bins, error = [], 0.0
    for number in range(num_bins):
        inside = place == number
        claimed, found = _mean(confidence[inside]), _mean(right[inside])
        if claimed is not None and found is not None:
            error += float(inside.mean()) * abs(claimed - found)
        low, high = (0.5 + (number + end) / (2 * num_bins) for end in (0, 1))
        bins.append(ReliabilityBin(low=low, high=high, count=int(inside.sum()), confidence=claimed, accuracy=found))
    return error, tuple(bins)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, z2 = successes / trials, _Z**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value that wins and losses are equally likely; 1 where there are none."""
    count, fewer = wins + losses, min(wins, losses)
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * sum(math.exp(log - count * math.log(2)) for log in logs))


def correlation(left: Array, right: Array) -> float | None:
    """Pearson's; None where one side does not vary."""
    if min(np.ptp(left), np.ptp(right)) == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None
