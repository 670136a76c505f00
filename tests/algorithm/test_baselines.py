"""Baselines by hand (method.md, section 6)."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from esrl.algorithm.baselines import BaselineConfig, RewardQueue, baseline_values
from esrl.algorithm.groups import Groups

GROUPS = Groups(torch.tensor([0, 0, 0, 1, 2, 2]), 4)  # 3, 1, 2 and 0 rows
REWARDS = torch.tensor([0.1, 0.4, 0.7, 0.5, 0.2, 0.6], dtype=torch.float64)
ONES = torch.ones(6, dtype=torch.int64)


def filled(*rewards: float, size: int = 1000) -> RewardQueue:
    queue = RewardQueue(size)
    queue.push(rewards)
    return queue


def values(kind: str, counts: Tensor = ONES, queue: RewardQueue | None = None) -> list[float]:
    return baseline_values(kind, REWARDS, GROUPS, counts, queue or filled(0.25)).tolist()


def test_queue_drops_the_oldest():
    queue = RewardQueue(3)
    assert (queue.mean(), queue.running_mean(), queue.std()) == (0, 0, 0)
    queue.push([1, 2])
    assert (queue.mean(), queue.running_mean()) == (1.5, 1.5)
    queue.push([3, 6])
    # 1 is out: (2 + 3 + 6) / 3; of all: 12 / 4
    assert list(queue.values) == [2, 3, 6]
    assert (queue.mean(), queue.running_mean()) == (pytest.approx(11 / 3), 3)
    # a step larger than the queue leaves its last three; running: (12 + 4 + 5 + 6 + 7) / 8
    queue.push([4, 5, 6, 7])
    assert (list(queue.values), queue.running_mean()) == ([5, 6, 7], 34 / 8)
    queue.push([])
    assert (queue.mean(), queue.total_count) == (6, 8)


def test_queue_spread():
    # mean 4, squared distances 4 + 0 + 4 over 3 values
    assert filled(2, 4, 6).std() == pytest.approx((8 / 3) ** 0.5)
    assert filled(5).std() == 0
    # one distance of 1e300 and one of -1e300; their squares do not exist in float64, nor those of 1e-300
    assert filled(1e300, -1e300).std() == pytest.approx(1e300)
    assert filled(1e-300, 3e-300).std() == pytest.approx(1e-300)


def test_queue_copy_is_independent():
    queue = filled(1, 2, size=2)
    copy = queue.copy()
    copy.push([5])
    assert (list(copy.values), copy.total_sum, copy.total_count, copy.size) == ([2, 5], 8, 3, 2)
    assert (list(queue.values), queue.total_sum, queue.total_count) == ([1, 2], 3, 2)
    queue.push([7])
    assert list(copy.values) == [2, 5]


def test_queue_survives_json_bit_by_bit():
    queue = filled(*[0.1 * i for i in range(30)], size=7)
    restored = RewardQueue(7)
    state = queue.state_dict()
    restored.load_state_dict(json.loads(json.dumps(state)))
    for both in (queue, restored):
        both.push([1 / 3, 0.7])
    assert restored.state_dict() == queue.state_dict() and restored.mean() == queue.mean()
    assert len(state["values"]) == 7  # a copy
    # resumed with a shorter queue: the newest stay
    short = RewardQueue(2)
    short.load_state_dict(state)
    assert list(short.values) == list(state["values"])[-2:]


def test_constant_baselines():
    queue = filled(9, 1, 2, size=2)  # holds 1, 2; has seen 9, 1, 2
    assert values("none") == [0] * 6
    assert values("fifo", queue=queue) == [1.5] * 6
    assert values("moving_average", queue=queue) == [4] * 6
    assert values("fifo", queue=RewardQueue(5)) == [0] * 6


def test_prompt_mean_and_its_fallback():
    # (.1 + .4 + .7) / 3 = .4; a single sample takes the queue's .25; (.2 + .6) / 2 = .4
    assert values("prompt_mean") == pytest.approx([0.4] * 3 + [0.25] + [0.4] * 2, abs=1e-15)


def test_leave_one_out_and_its_fallback():
    # (.4 + .7) / 2, (.1 + .7) / 2, (.1 + .4) / 2; .25; the other one of two
    assert values("leave_one_out") == pytest.approx([0.55, 0.4, 0.25, 0.25, 0.6, 0.2], abs=1e-15)


def test_counts():
    # prompt 0: .1 twice, .4 abstained, .7 once: mean .9 / 3 = .3; without one .1: (.1 + .7) / 2 = .4; without .7: .1.
    # prompt 1: .5 drawn twice, so it has a mean, and without one of the two .5 is left. Prompt 2: .6 abstained, .2 is
    # alone: the queue's .25. What an abstained row gets is never used
    counts = torch.tensor([2, 0, 1, 2, 1, 0])
    used = [0, 2, 3, 4]
    assert [values("prompt_mean", counts)[i] for i in used] == pytest.approx([0.3, 0.3, 0.5, 0.25], abs=1e-15)
    assert [values("leave_one_out", counts)[i] for i in used] == pytest.approx([0.4, 0.1, 0.5, 0.25], abs=1e-15)
    assert torch.tensor(values("leave_one_out", torch.zeros(6))).isfinite().all()


@pytest.mark.parametrize("kind", ["prompt_mean", "leave_one_out"])
def test_counts_stand_for_copies(kind: str):
    counts = torch.tensor([3, 1, 2, 1, 2, 1])
    copies = baseline_values(
        kind,
        REWARDS.repeat_interleave(counts),
        Groups(GROUPS.index.repeat_interleave(counts), 4),
        torch.ones(10),
        filled(0.25),
    )
    merged = torch.tensor(values(kind, counts), dtype=torch.float64).repeat_interleave(counts)
    assert copies.tolist() == pytest.approx(merged.tolist(), abs=1e-15)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="baseline is 'mean'; choose one of fifo, moving_average"):
        BaselineConfig(kind="mean")
    with pytest.raises(ValueError, match="queue_size is 0"):
        BaselineConfig(queue_size=0)
