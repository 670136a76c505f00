"""All that a toy policy can say, with its probability, and whether samples follow that law."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from esrl.types import Rollouts

LONGEST = 3
Law = dict[tuple[int, ...], float]


def enumerate_sequences(
    logits_after: Callable[[tuple[int, ...]], Tensor], pad: int, ends: Collection[int], tau: float
) -> Law:
    """The probability of every sequence of at most three tokens.

    Args:
        logits_after: (V,) of the token behind a prefix, at temperature 1.
        pad: what is never said.
        ends: what ends a sequence.
    """
    found: Law = {}

    def extend(prefix: tuple[int, ...], probability: float) -> None:
        with torch.no_grad():
            logits = logits_after(prefix).clone()
        logits[pad] = -torch.inf
        for token, p in enumerate(torch.softmax(logits / tau, 0).tolist()):
            if token == pad:
                continue
            longer = (*prefix, token)
            if token in ends or len(longer) == LONGEST:
                found[longer] = probability * p
            else:
                extend(longer, probability * p)

    extend((), 1.0)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return found


def said(rollouts: Rollouts, prompt: int = 0) -> list[tuple[int, ...]]:
    """The samples of a prompt."""
    rows = (rollouts.prompt_index == prompt).nonzero()[:, 0]
    lengths = rollouts.lengths[rows].tolist()
    return [tuple(row[:length]) for row, length in zip(rollouts.tokens[rows].tolist(), lengths, strict=True)]


def assert_follow(samples: list[tuple[int, ...]], expected: Law, wrong: Law) -> None:
    """By chi-square; that the samples do not follow ``wrong`` shows what the test can see."""
    draws, observed = len(samples), dict.fromkeys(expected, 0)
    for sample in samples:
        observed[sample] += 1  # KeyError: PAD, or a token behind the end
    # cells with fewer than 5 expected draws are joined
    large = [name for name, p in expected.items() if p * draws >= 5]
    cells = [(observed[name], expected[name] * draws) for name in large]
    rest = [name for name in expected if name not in set(large)]
    if rest:
        cells.append((sum(observed[name] for name in rest), sum(expected[name] for name in rest) * draws))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    assert len(cells) > 30
    assert chi2.sf(statistic, len(cells) - 1) > 1e-3
    off = sum((observed[name] - wrong[name] * draws) ** 2 / (wrong[name] * draws) for name in large)
    assert chi2.sf(off, len(large) - 1) < 1e-9
