"""Several rewards become one: weighted, and normalised before the sum, after it, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Normalise = Literal["none", "each", "sum"]
Gather = Callable[[list[Any]], list[Any]]
"""Joins every process's list, in the order of processes: ``training.processes.Processes.gather``."""

NO_SPREAD = 1e-9
"""Rewards that differ by less than this, relative to their size, differ by rounding: their z-scores are 0."""


def z_scores(values: Tensor, counts: Tensor, gather: Gather | None = None) -> Tensor:
    """(values - mean) / standard deviation over the batch, of population form; 0 where all are equal.

    Args:
        values: (R,) float64.
        counts: (R,) how many samples each row stands for; a row of 0 samples has no part in mean and deviation.
        gather: over all processes, which then all must call this; None: this process's rows alone.
    """
    own = list(zip(values.tolist(), counts.tolist(), strict=True))
    rows = torch.tensor(own if gather is None else gather(own), dtype=torch.float64).reshape(-1, 2)
    everyone, weights = rows[:, 0], rows[:, 1]
    number = weights.sum()
    if number == 0:
        return torch.zeros_like(values)
    mean = (weights * everyone).sum() / number
    deviation = ((weights * (everyone - mean).square()).sum() / number).sqrt()
    if deviation <= NO_SPREAD * everyone[weights > 0].abs().max():
        return torch.zeros_like(values)
    return (values - mean) / deviation


def combine(
    scores: Tensor, weights: Tensor, normalise: Normalise, counts: Tensor, gather: Gather | None = None
) -> Tensor:
    """The weighted sum of rewards.

    Args:
        scores: (R, F) of F reward functions, float64.
        weights: (F,) float64.
        normalise: ``each``: every function's scores become z-scores before they are weighted and summed, so that the
            weights say how much each counts, whatever its scale; ``sum``: the weighted sum becomes a z-score.
        counts: (R,) how many samples each row stands for; 0 where a function abstained.
        gather: see ``z_scores``.

    Returns:
        (R,) float64.
    """
    if normalise == "each":
        columns = [z_scores(scores[:, j], counts, gather) for j in range(scores.shape[1])]
        scores = torch.stack(columns, 1) if columns else scores
    total = torch.zeros(len(scores), dtype=torch.float64)
    for j, weight in enumerate(weights.tolist()):  # in this order, whatever the number of rows
        total += weight * scores[:, j]
    return z_scores(total, counts, gather) if normalise == "sum" else total
