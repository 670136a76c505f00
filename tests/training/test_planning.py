"""ESRL-Reward: capability from scores without bounds, mapped as method.md, section 2, says."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch
from run_helpers import make_task, own_reward, rl_config

from esrl.algorithm.allocation import AllocationConfig, allocate
from esrl.algorithm.baselines import RewardQueue
from esrl.algorithm.capability import CapabilityConfig
from esrl.errors import RewardError
from esrl.training.planning import mapped_capability

SCORES = [-7.5, 3.0, 0.25, -1.0]
IDS = ["a", "b", "c", "d"]

# as a reward model's: below and above 0, of any size
MODEL = """
def model(source, completions, **columns):
    return [7 * (len(text) - 30) / 10 - len(one) for one, text in zip(source, completions)]
"""


def queue_of(*rewards: float) -> RewardQueue:
    queue = RewardQueue(100)
    queue.push(rewards)
    return queue


def mapped(config: CapabilityConfig, *rewards: float) -> list[float]:
    scores = torch.tensor(SCORES, dtype=torch.float64)
    return mapped_capability(scores, IDS, config, queue_of(*rewards)).tolist()


def test_scores_are_compared_with_the_queue_by_default():
    # mean 1, spread 3
    expected = [1 / (1 + math.exp(-(score - 1) / 3)) for score in SCORES]
    assert mapped(CapabilityConfig(estimator="reward"), -2.0, 4.0) == pytest.approx(expected)
    plan = allocate(torch.tensor(expected), AllocationConfig(max_samples=10))
    order = sorted(range(4), key=SCORES.__getitem__)  # the less capable, the more samples
    samples = plan.num_samples[order].tolist()
    assert samples == sorted(samples, reverse=True) and samples[0] > samples[-1]


def test_while_the_queue_is_empty_the_step_s_own_scores_say_what_is_usual():
    """Or scores far from 0 would all be mapped to 0 or to 1, and the first epoch have no plan."""
    expected = [1 / (1 + math.exp(-(score - fmean(SCORES)) / pstdev(SCORES))) for score in SCORES]
    assert mapped(CapabilityConfig(estimator="reward")) == pytest.approx(expected)
    one = mapped_capability(torch.tensor([88.0]).double(), ["a"], CapabilityConfig(estimator="reward"), queue_of())
    assert one.tolist() == [0.5]


def test_an_explicit_map_wins():
    assert mapped(CapabilityConfig(estimator="reward", capability_map="rank"), 1.0) == [0, 1, 2 / 3, 1 / 3]
    with pytest.raises(RewardError, match="needs 0 or more"):
        mapped(CapabilityConfig(estimator="reward", capability_map="identity"), 1.0)
    assert CapabilityConfig().mapping == "identity" == CapabilityConfig(estimator="entropy").mapping


@pytest.mark.parametrize("estimator", ["reward", "entropy"])
def test_one_sample_a_prompt_drops_the_most_capable_prompts(assets: Path, tmp_path: Path, estimator: str):
    """ESRL-Reward and ESRL-Entropy at k_max 1: floor(.3 * 6) = 1 prompt of each batch is left out, before sampling."""
    one = {"allocation": {"max_samples": 1, "eliminate": "prompts"}, "capability": {"estimator": estimator}}
    with make_task(assets, own_reward(tmp_path, MODEL, "model"), one) as task:
        prompts = task.prompts(0, 0)
        scores, _ = task.capability(prompts, 0, 0)
        update = task.compute(0, 0)
        lines = update.commit()
        assert update.metrics["num_samples_histogram"] == {"0": 1, "1": 5}
        dropped = [i for i, line in enumerate(lines) if line["num_samples"] == 0]
        assert dropped == [int(scores.argmax())] and lines[dropped[0]]["samples"] == []
        if estimator == "reward":
            assert float(scores.min()) < 0
        # the reward pushed for each of the five; nothing is remembered of the sixth but its greedy estimate
        assert task.queue.total_count == 5
        assert task.memory.records[prompts.example_ids[dropped[0]]].greedy


def test_esrl_random_drops_any(assets: Path, tmp_path: Path):
    one = {"allocation": {"max_samples": 1, "eliminate": "prompts"}, "capability": {"estimator": "random"}}
    with make_task(assets, own_reward(tmp_path, MODEL, "model"), one) as task:
        update = task.compute(0, 0)
        assert update.metrics["num_samples_histogram"] == {"0": 1, "1": 5}
        assert update.metrics["planned_from_memory"] == 0


def test_the_signature_names_the_estimator(assets: Path):
    from esrl.fingerprint import signature

    config = rl_config(assets, Path("unused"), {"capability": {"estimator": "reward"}, "method": "rloo"})
    assert "|method:rloo|" in signature(config) and "|cap:reward|" in signature(config)
    assert "|clip:0.2-0.2|std:none|kl:0.05-k1-sequence|" in signature(config)
    config = rl_config(assets, Path("unused"), {"method": "ppo", "step": {"updates_per_batch": 2, "minibatches": 3}})
    assert "|clip:0.2-0.2|norm:token|kl:0.1-k1-token|updates:2x3|" in signature(config)
