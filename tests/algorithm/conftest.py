"""Samples for the tests of objectives: ragged groups of rows with rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from esrl.algorithm.groups import Groups
from esrl.algorithm.objectives import RewardedSamples

MakeSamples = Callable[..., RewardedSamples]


@pytest.fixture
def make_samples() -> MakeSamples:
    """Build ``RewardedSamples`` from plain lists; what is not given is 1 token, drawn once, baseline 0, on-policy."""

    def make(
        index: Sequence[int],
        rewards: Sequence[float],
        *,
        lengths: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        baseline: float | Sequence[float] = 0.0,
        sampling_log_probs: torch.Tensor | None = None,
        planned: Sequence[int] | None = None,
    ) -> RewardedSamples:
        number, size = len(index), max(index) + 1 if planned is None else len(planned)
        each = torch.tensor([1] * number if lengths is None else list(lengths))
        width = int(each.max())
        drawn = torch.tensor([1] * number if counts is None else list(counts))
        groups = Groups(torch.tensor(list(index)), size)
        return RewardedSamples(
            mask=torch.arange(width) < each[:, None],
            groups=groups,
            counts=drawn,
            rewards=torch.tensor(list(rewards), dtype=torch.float64),
            baseline=torch.as_tensor(baseline, dtype=torch.float64).expand(number),
            sampling_log_probs=torch.zeros(number, width) if sampling_log_probs is None else sampling_log_probs,
            planned=groups.sum(drawn) if planned is None else torch.tensor(list(planned)),
        )

    return make
