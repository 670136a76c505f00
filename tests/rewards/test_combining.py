"""Several rewards as one: weights, normalisation before and after the sum, and over processes."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from esrl.rewards.calling import RewardConfig, build_reward
from esrl.rewards.combining import combine, z_scores

ONES = torch.ones(3, dtype=torch.int64)
FUNCTIONS = str(Path(__file__).with_name("reward_functions.py"))


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_z_scores_worked_by_hand():
    # mean 2, population variance 2/3
    assert z_scores(doubles(1, 2, 3), ONES).tolist() == pytest.approx([-math.sqrt(1.5), 0.0, math.sqrt(1.5)])


def test_counts_stand_for_samples_and_rows_without_any_do_not_count():
    weighted = z_scores(doubles(1, 2, 99), torch.tensor([3, 1, 0]))
    spelt_out = z_scores(doubles(1, 1, 1, 2), torch.ones(4))
    assert weighted[:2].tolist() == pytest.approx([float(spelt_out[0]), float(spelt_out[3])])


@pytest.mark.parametrize("values", [(0.1 + 0.2, 0.3, 0.3), (0, 0, 0), (1e20, 1e20, 1e20)])
def test_equal_rewards_have_z_score_0(values):
    assert z_scores(doubles(*values), ONES).tolist() == [0.0] * 3


def test_before_after_and_without():
    scores = torch.stack([doubles(1, 2, 3), doubles(300, 100, 200)], 1)
    weights, s = doubles(1, 2), math.sqrt(1.5)
    assert combine(scores, weights, "none", ONES).tolist() == [601.0, 202.0, 403.0]
    # z-scores (-s, 0, s) and (s, -s, 0)
    assert combine(scores, weights, "each", ONES).tolist() == pytest.approx([s, -2 * s, s])
    after = combine(scores, weights, "sum", ONES)
    assert after.tolist() == pytest.approx(z_scores(doubles(601, 202, 403), ONES).tolist())
    assert float(after.mean()) == pytest.approx(0, abs=1e-12)


def test_the_scale_of_a_reward_does_not_matter_where_each_is_normalised():
    scores = torch.rand(20, 2, dtype=torch.float64)
    counts, weights = torch.ones(20), doubles(1, 0.3)
    scaled = scores * doubles(1000, 1) + doubles(5, -7)
    assert torch.allclose(combine(scores, weights, "each", counts), combine(scaled, weights, "each", counts))


class Meeting:
    """Three processes, played by threads, one of them without a row."""

    def __init__(self, shares: list[slice]) -> None:
        self.shares = shares
        self.barrier = threading.Barrier(len(shares), timeout=10)
        self.brought: list[list] = [[] for _ in shares]

    def gather(self, rank: int, own: list) -> list:
        self.brought[rank] = own
        self.barrier.wait()
        joined = [row for part in self.brought for row in part]
        self.barrier.wait()  # nobody brings the next before everybody has this one
        return joined


@pytest.mark.parametrize("normalise", ["none", "each", "sum"])
def test_several_processes_equal_one(normalise):
    scores, weights = torch.rand(7, 2, dtype=torch.float64), doubles(1, -0.5)
    counts = torch.tensor([1, 2, 0, 1, 3, 1, 1])
    meeting = Meeting([slice(0, 3), slice(3, 7), slice(7, 7)])

    def one(rank: int) -> list[float]:
        share = meeting.shares[rank]
        return combine(scores[share], weights, normalise, counts[share], partial(meeting.gather, rank)).tolist()

    with ThreadPoolExecutor(3) as threads:
        parts = list(threads.map(one, range(3)))
    assert [len(part) for part in parts] == [3, 4, 0]
    assert [value for part in parts for value in part] == combine(scores, weights, normalise, counts).tolist()


def test_a_reward_function_keeps_the_raw_sum_and_names_each_mean():
    functions = f"{FUNCTIONS}:lengths"
    config = RewardConfig(names=(functions, "exact_match"), weights=(1.0, 10.0), normalise="each")
    with build_reward(config) as reward:
        result = reward.score(["p"] * 3, ["a", "bb", "ccc"], [[1], [1, 2], [1]], {"reference": ["a", "x", "x"]}, {})
    # lengths 1, 2, 3; matches 1, 0, 0 with mean 1/3 and deviation sqrt(2)/3
    assert result.scores.tolist() == [[1.0, 1.0], [2.0, 0.0], [3.0, 0.0]]
    assert result.raw.tolist() == [11.0, 2.0, 3.0]
    s, t = math.sqrt(1.5), math.sqrt(2)
    assert result.values.tolist() == pytest.approx([-s + 10 * t, -10 * t / 2, s - 10 * t / 2])
    assert result.lengths.tolist() == [1, 2, 1]
    assert result.metrics == {"reward_of_lengths": 2.0, "reward_of_exact_match": pytest.approx(1 / 3)}


def test_abstentions_have_no_part_in_the_mean():
    functions = f"{FUNCTIONS}:abstains_from_empty"
    with build_reward(RewardConfig(names=(functions,), normalise="sum")) as reward:
        result = reward.score(["p"] * 3, ["aa", "", "aaaa"], [[1]] * 3, {}, {})
    assert result.values.tolist() == pytest.approx([-1.0, 0.0, 1.0])  # 2 and 4: mean 3, deviation 1
    assert result.abstained.tolist() == [False, True, False]


def test_two_functions_of_one_name_are_told_apart():
    functions = f"{FUNCTIONS}:lengths"
    with build_reward(RewardConfig(names=(functions, functions))) as reward:
        assert reward.score(["p"], ["ab"], [[1]], {}, {}).metrics == {
            "reward_of_lengths": 2.0,
            "reward_of_lengths_2": 2.0,
        }
