"""Advantages of groups of any size, and of tokens by GAE, against numbers worked by hand and plain loops."""

from __future__ import annotations

import itertools
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from esrl.algorithm.advantages import (
    EPSILON,
    equal_groups,
    generalised_advantages,
    group_advantages,
    group_shares,
    token_rewards,
    whitened,
)
from esrl.algorithm.baselines import RewardQueue, baseline_values
from esrl.algorithm.groups import Groups
from esrl.algorithm.objective_config import CriticConfig
from esrl.algorithm.objectives import ObjectiveConfig

# a prompt of four samples, one of one, one of two, one without any, one of three equal ones
INDEX = torch.tensor([0, 0, 0, 0, 1, 2, 2, 4, 4, 4])
REWARDS = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.7, 0.2, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
GROUPS = Groups(INDEX, 5)
ONCE = torch.ones(10, dtype=torch.int64)
QUEUE_MEAN = 0.25


def queue() -> RewardQueue:
    found = RewardQueue(10)
    found.push([0.0, 0.5])
    return found


def advantages(
    kind: str, how: Any, rewards: Tensor = REWARDS, groups: Groups = GROUPS, counts: Tensor = ONCE
) -> Tensor:
    baseline = baseline_values(kind, rewards, groups, counts, queue())  # type: ignore[arg-type]
    everyone = rewards.repeat_interleave(counts)
    return group_advantages(rewards, baseline, groups, counts, how, float(everyone.std()))


def by_hand(kind: str, how: str) -> list[float]:
    result = []
    for prompt in (0, 1, 2, 4):
        own = REWARDS[prompt == INDEX].tolist()
        for i, reward in enumerate(own):
            if len(own) == 1:
                result.append(reward - QUEUE_MEAN)  # and no spread divides it
                continue
            others = own[:i] + own[i + 1 :]
            difference = reward - (fmean(own) if kind == "prompt_mean" else fmean(others))
            spread = {"group": stdev(own), "batch": stdev(REWARDS.tolist())}.get(how)
            result.append(difference if spread is None else difference / (spread + EPSILON))
    return result


@pytest.mark.parametrize("how", ["group", "batch", "none"])
@pytest.mark.parametrize("kind", ["prompt_mean", "leave_one_out"])
def test_groups_of_every_size(kind: str, how: str):
    assert advantages(kind, how).tolist() == pytest.approx(by_hand(kind, how), abs=1e-12)


@pytest.mark.parametrize("how", ["group", "batch", "none"])
@pytest.mark.parametrize("kind", ["prompt_mean", "leave_one_out"])
def test_equal_rewards_have_advantage_0_exactly(kind: str, how: str):
    """.1 + .1 + .1 is not .3 in floating point, and 1e-4 divides the difference."""
    assert (REWARDS[7:].sum() / 3 - 0.1).abs() > 0
    assert advantages(kind, how)[7:].tolist() == [0, 0, 0]
    assert equal_groups(REWARDS, GROUPS, ONCE).tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("how", ["group", "batch", "none"])
@pytest.mark.parametrize("kind", ["prompt_mean", "leave_one_out"])
def test_merged_copies_have_the_advantage_of_each(kind: str, how: str):
    """Rows 1 and 2 are one sample drawn twice; so are the three of the last prompt."""
    rows = torch.tensor([0, 1, 3, 4, 5, 6, 7])
    counts = torch.tensor([1, 2, 1, 1, 1, 1, 3])
    merged = advantages(kind, how, REWARDS[rows], Groups(INDEX[rows], 5), counts)
    torch.testing.assert_close(merged, advantages(kind, how)[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["prompt_mean", "leave_one_out"])
def test_abstained_rows_take_no_part(kind: str):
    """A prompt of which one of two samples is left is one of a single sample."""
    rewards = torch.tensor([0.5, 0.0, 0.9, 0.0, 0.3], dtype=torch.float64)
    groups, counts = Groups(torch.tensor([0, 0, 1, 1, 1]), 2), torch.tensor([1, 0, 1, 0, 1])
    found = advantages(kind, "group", rewards, groups, counts)
    alone = advantages(kind, "group", torch.tensor([0.9, 0.3]).double(), Groups(torch.tensor([0, 0]), 1), ONCE[:2])
    assert found.tolist() == pytest.approx([0.5 - QUEUE_MEAN, 0, float(alone[0]), 0, float(alone[1])])
    assert equal_groups(rewards, groups, counts).tolist() == [False, False]


def test_a_shift_moves_the_queue_s_mean_alone():
    values = baseline_values("leave_one_out", REWARDS, GROUPS, ONCE, queue(), -0.05)
    assert float(values[4]) == pytest.approx(QUEUE_MEAN - 0.05)
    assert float(values[5]) == pytest.approx(0.3)


def test_shares_sum_to_one_where_there_is_a_sample():
    counts = torch.tensor([1, 2, 0, 1, 0, 1, 1, 1, 1, 1])
    shares = group_shares(GROUPS, counts)
    assert shares.tolist() == pytest.approx([0.25, 0.5, 0, 0.25, 0, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3])


MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])


def test_rewards_of_tokens():
    penalty = torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.0, 0.0], [0.0, 0.4, 0.0]])
    found = token_rewards(torch.tensor([2.0, -20.0, 1.0]), MASK, penalty, 10.0)
    # the score, cut to 10, at the last real token; the penalty off each
    expected = [[-0.1, 0.2, 1.7], [-10.5, 0, 0], [0, 0.6, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    unbounded = token_rewards(torch.tensor([2.0, -20.0, 1.0]), MASK, None, None)
    assert unbounded.tolist() == [[0, 0, 2], [-20, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_generalised_advantages_are_their_definition(gamma: float, lam: float):
    """The sum over all later temporal differences, row by row; what lies beyond the mask is not looked at."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    rewards = torch.where(MASK, rewards, 0.0)
    advantages, returns = generalised_advantages(rewards, values, MASK, CriticConfig(gamma=gamma, gae_lambda=lam))
    for row, length in enumerate([3, 1, 2]):
        for t in range(3):
            if t >= length:
                assert float(advantages[row, t]) == 0 == float(returns[row, t])
                continue
            total = 0.0
            for s in range(t, length):
                ahead = float(values[row, s + 1]) if s + 1 < length else 0.0
                delta = float(rewards[row, s]) + gamma * ahead - float(values[row, s])
                total += (gamma * lam) ** (s - t) * delta
            assert float(advantages[row, t]) == pytest.approx(total)
            assert float(returns[row, t]) == pytest.approx(total + float(values[row, t]))


def test_lambda_one_is_reward_to_go():
    rewards = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    config = CriticConfig(gae_lambda=1.0)
    _, returns = generalised_advantages(rewards, torch.full((1, 3), 0.7), torch.ones(1, 3, dtype=torch.bool), config)
    assert returns.tolist() == [pytest.approx([6, 5, 3])]


def no_other(values: Any) -> list[float]:
    return list(values)


def test_whitening_sees_real_tokens_alone_each_as_often_as_drawn():
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 99.0, 99.0], [0.5, 0.0, 99.0]], dtype=torch.float64)
    counts = torch.tensor([1, 3, 0])
    drawn = [1.0, 2.0, 9.0, 4.0, 4.0, 4.0]
    found = whitened(values, MASK, counts, no_other)
    expected = [(value - fmean(drawn)) / stdev(drawn) for value in (1.0, 2.0, 9.0, 4.0)]
    assert found[MASK][:4].tolist() == pytest.approx(expected, rel=1e-6)
    assert found[1].tolist()[1:] == [0, 0] and float(found[2, 2]) == 0


def test_whitening_over_processes_is_whitening_of_all():
    """Two halves, each told the sums of both."""
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask, counts = values > -1, torch.tensor([1, 2, 1, 3, 1, 1])
    whole = whitened(values, mask, counts, no_other)
    asked: list[list[list[float]]] = [[], []]
    sums: list[list[float]] = []
    for turn, half in itertools.product(range(3), (0, 1)):  # the first turns find out what each half asks for

        def reduce(own: Any, half: int = half, sums: list[list[float]] = sums) -> list[float]:
            asked[half].append(list(own))
            place = len(asked[half]) - 1
            return sums[place] if place < len(sums) else list(own)

        asked[half] = []
        rows = slice(3 * half, 3 * half + 3)
        found = whitened(values[rows], mask[rows], counts[rows], reduce)
        if half == 1:
            sums = [[sum(pair) for pair in zip(*both, strict=True)] for both in zip(*asked, strict=True)][: turn + 1]
        if turn == 2:
            torch.testing.assert_close(found, whole[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_tokens_to_whiten_are_left(number: int):
    values = torch.tensor([[3.0]], dtype=torch.float64)
    assert float(whitened(values, torch.ones(1, 1, dtype=torch.bool), torch.tensor([number]), no_other)) == 3


def test_no_rows():
    nothing = torch.zeros(0, 4, dtype=torch.float64)
    mask = torch.zeros(0, 4, dtype=torch.bool)
    assert generalised_advantages(nothing, nothing, mask, CriticConfig())[0].shape == (0, 4)
    assert token_rewards(torch.zeros(0), mask, None, 1.0).shape == (0, 4)
    empty = Groups(torch.zeros(0, dtype=torch.int64), 2)
    found = group_advantages(torch.zeros(0), torch.zeros(0), empty, torch.zeros(0, dtype=torch.int64), "group")
    assert found.shape == (0,)
    assert ObjectiveConfig(kind="grpo").std_norm == "group" and ObjectiveConfig(kind="rloo").std_norm == "none"
