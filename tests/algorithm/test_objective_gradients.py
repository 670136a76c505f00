"""MRT's coefficient against its closed form and autograd; what it becomes in the limits; merged duplicates."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from esrl.algorithm.baselines import RewardQueue, baseline_values
from esrl.algorithm.duplicates import handle_duplicates
from esrl.algorithm.groups import Groups
from esrl.algorithm.objectives import ObjectiveConfig, RewardedSamples, coefficients, mrt_losses, objective_loss
from esrl.types import Rollouts

INDEX = [0, 0, 0, 0, 1, 1, 3, 4, 4, 4]  # prompt 2 has no sample, prompt 3 a single one
COUNTS = [1, 3, 1, 0, 2, 1, 1, 1, 1, 1]
LENGTHS = [5, 2, 7, 3, 1, 4, 6, 7, 2, 3]
FLAGS = list(itertools.product([False, True], repeat=5))


def random_step(make_samples: Any, seed: int = 0, counts: list[int] | None = None) -> tuple[Tensor, RewardedSamples]:
    generator = torch.Generator().manual_seed(seed)
    log_probs = -3 * torch.rand(len(INDEX), 7, generator=generator, dtype=torch.float64)
    at_tau = log_probs + torch.rand(len(INDEX), 7, generator=generator, dtype=torch.float64) - 0.6
    rewards = torch.rand(len(INDEX), generator=generator, dtype=torch.float64).tolist()
    samples = make_samples(
        INDEX,
        rewards,
        lengths=LENGTHS,
        counts=COUNTS if counts is None else counts,
        baseline=0.37,
        sampling_log_probs=at_tau,
        planned=[5, 3, 0, 1, 3],
    )
    return log_probs, samples


def config_of(flags: tuple[bool, ...], kind: str = "mrt") -> ObjectiveConfig:
    normalise, inverse, correction, weighted, large = flags
    return ObjectiveConfig(
        kind=kind,
        alpha=0.7 if large else 0.005,
        length_normalise=normalise,
        mrt_scale="inverse_alpha" if inverse else "none",
        group_correction=correction,
        importance_weights=weighted,
    )


def rows_of(samples: RewardedSamples, prompt: int) -> list[int]:
    """The prompt's rows that take part."""
    return [i for i, owner in enumerate(INDEX) if owner == prompt and int(samples.counts[i])]


def log_weight(i: int, log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> float:
    if not config.importance_weights:
        return 0.0
    ratio = (log_probs.detach()[i] - samples.sampling_log_probs[i])[: LENGTHS[i]].sum()
    return min(float(ratio), math.log(config.importance_clip))


@pytest.mark.parametrize("flags", FLAGS)
def test_mrt_coefficient_is_its_closed_form(make_samples: Any, flags: tuple[bool, ...]):
    # c_i = -alpha Q_i (r_i - sum_j Q_j r_j), Q_i ~ count_i w_i exp(alpha l_i); with mean log-probabilities alpha / n_i;
    # the loss may be divided by alpha and multiplied by k / (k - 1)
    log_probs, samples = random_step(make_samples)
    config = config_of(flags)
    expected = torch.zeros_like(log_probs)
    for prompt in range(5):
        rows = rows_of(samples, prompt)
        number = sum(COUNTS[i] for i in rows)
        slopes = {i: config.alpha / (LENGTHS[i] if config.length_normalise else 1) for i in rows}
        weights = {
            i: COUNTS[i]
            * math.exp(slopes[i] * float(log_probs[i, : LENGTHS[i]].sum()) + log_weight(i, log_probs, samples, config))
            for i in rows
        }
        q = {i: weight / sum(weights.values()) for i, weight in weights.items()}
        mean = sum(q[i] * float(samples.rewards[i]) for i in rows)
        scale = 1 / config.alpha if config.mrt_scale == "inverse_alpha" else 1.0
        scale *= number / (number - 1) if config.group_correction and number > 1 else 1.0
        for i in rows:
            expected[i, : LENGTHS[i]] = -scale * slopes[i] * q[i] * (float(samples.rewards[i]) - mean)
    _, c = coefficients(log_probs, samples, config)
    torch.testing.assert_close(c, expected, rtol=1e-12, atol=1e-12)
    assert float(c.abs().max()) > 1e-5


@pytest.mark.parametrize("flags", FLAGS)
def test_mrt_matches_autograd_through_every_drawn_copy(make_samples: Any, flags: tuple[bool, ...]):
    # the slow twin: eq. 4 and 5 as printed, one prompt at a time, a row repeated as often as it was drawn
    log_probs, samples = random_step(make_samples, seed=1)
    config = config_of(flags)
    leaf = log_probs.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for prompt in range(5):
        copies = [i for i in rows_of(samples, prompt) for _ in range(COUNTS[i])]
        if not copies:
            continue
        lengths = torch.tensor([LENGTHS[i] if config.length_normalise else 1 for i in copies])
        sums = torch.stack([leaf[i, : LENGTHS[i]].sum() for i in copies]) / lengths
        weights = torch.tensor([log_weight(i, log_probs, samples, config) for i in copies], dtype=torch.float64).exp()
        powers = sums.exp() ** config.alpha * weights  # p ** alpha
        loss = (powers / powers.sum() * (0.37 - samples.rewards[copies])).sum()
        if config.mrt_scale == "inverse_alpha":
            loss = loss / config.alpha
        if config.group_correction and len(copies) > 1:
            loss = loss * len(copies) / (len(copies) - 1)
        total = total + loss
    (expected,) = torch.autograd.grad(total, leaf)
    loss, c = coefficients(log_probs, samples, config)
    torch.testing.assert_close(c, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, total.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["inverse_alpha", "none"])
def test_a_constant_baseline_cancels_in_mrt_and_shifts_its_loss(make_samples: Any, scale: str):
    # sum of Q is 1: each of the 4 prompts with samples adds b (/ alpha) to the loss, and nothing to the gradient
    log_probs, samples = random_step(make_samples)
    config = ObjectiveConfig(kind="mrt", mrt_scale=scale)
    loss, c = coefficients(log_probs, replace(samples, baseline=torch.zeros(10, dtype=torch.float64)), config)
    for constant in (0.37, -2.0, 100.0):
        moved = replace(samples, baseline=torch.full((10,), constant, dtype=torch.float64))
        shifted_loss, shifted = coefficients(log_probs, moved, config)
        torch.testing.assert_close(shifted, c, rtol=0, atol=1e-12 * max(1, abs(constant) * 10))
        shift = 4 * constant / (0.005 if scale == "inverse_alpha" else 1)
        assert float(shifted_loss - loss) == pytest.approx(shift, rel=1e-10)
    # where REINFORCE does change
    reinforce = ObjectiveConfig(kind="reinforce")
    assert not torch.allclose(
        coefficients(log_probs, samples, reinforce)[1], coefficients(log_probs, moved, reinforce)[1]
    )


@pytest.mark.parametrize("counts", [COUNTS, [1] * 10])
def test_small_alpha_is_the_mean_baselined_policy_gradient(make_samples: Any, counts: list[int]):
    # c_i -> -(1/k) (r_i - mean r) = (k-1)/k times REINFORCE with the mean of the *other* samples as baseline, which is
    # the unbiased gradient: r_i - mean of the others = k/(k-1) (r_i - mean). group_correction takes the factor away
    log_probs, samples = random_step(make_samples, counts=counts)
    queue = RewardQueue(1)
    single = torch.tensor([owner == 3 for owner in INDEX])  # REINFORCE has the queue's baseline there, MRT no gradient
    reinforce = {
        kind: coefficients(
            log_probs,
            replace(samples, baseline=baseline_values(kind, samples.rewards, samples.groups, samples.counts, queue)),
            ObjectiveConfig(kind="reinforce"),
        )[1]
        for kind in ("prompt_mean", "leave_one_out")
    }
    number = samples.groups.spread(samples.groups.sum(samples.counts.to(torch.float64)))[:, None]
    _, plain = coefficients(log_probs, samples, ObjectiveConfig(kind="mrt", alpha=1e-9))
    _, corrected = coefficients(log_probs, samples, ObjectiveConfig(kind="mrt", alpha=1e-9, group_correction=True))
    # what is left out is of order alpha * spread of l, 1e-9 * 20
    close = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(plain[~single], reinforce["prompt_mean"][~single], **close)
    unbiased = (number - 1) / number * reinforce["leave_one_out"]
    torch.testing.assert_close(plain[~single], unbiased[~single], **close)
    torch.testing.assert_close(corrected[~single], reinforce["leave_one_out"][~single], **close)
    assert float(plain[single].abs().max()) == 0


@pytest.mark.parametrize(
    ("alpha", "normalise", "expected"), [(0.005, False, 14.0), (0.1, False, 10.0), (1.0, False, 1.5), (1.0, True, 13.2)]
)
def test_effective_sample_size(make_samples: Any, alpha: float, normalise: bool, expected: float):
    # 1 / sum Q^2 over 14 samples of 25 tokens with a spread of 1.3 each, 3,000 prompts. Q_i is read off the loss with
    # reward 1 for sample i alone: -loss = Q_i
    size, prompts = 14, 3000
    noise = torch.randn(prompts * size, 25, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    log_probs = -2 + 1.3 * noise
    index = [p for p in range(prompts) for _ in range(size)]
    samples = make_samples(index, [0.0] * len(index), lengths=[25] * len(index))
    config = ObjectiveConfig(kind="mrt", alpha=alpha, length_normalise=normalise, mrt_scale="none")
    posterior = [
        -mrt_losses(
            log_probs, replace(samples, rewards=torch.eye(size, dtype=torch.float64)[i].repeat(prompts)), config
        )
        for i in range(size)
    ]
    total = torch.stack(posterior)
    torch.testing.assert_close(total.sum(0), torch.ones(prompts, dtype=torch.float64))
    assert float((1 / total.square().sum(0)).mean()) == pytest.approx(expected, abs=0.1)


def test_mrt_weighs_little_beside_reinforce_unless_scaled(make_samples: Any):
    # 14 samples at alpha .005: |c| = alpha / 14 |r - mean| = 3.6e-4 |r - mean| against REINFORCE's 1 |r - b| at k = 1
    rewards = [0.0, 1.0] * 7
    samples = make_samples([0] * 14, rewards)
    log_probs = torch.full((14, 1), -20.0, dtype=torch.float64)
    _, plain = coefficients(log_probs, samples, ObjectiveConfig(kind="mrt", mrt_scale="none"))
    assert plain.abs().flatten().tolist() == pytest.approx([0.5 * 0.005 / 14] * 14)
    _, scaled = coefficients(log_probs, samples, ObjectiveConfig(kind="mrt"))
    assert scaled.abs().flatten().tolist() == pytest.approx([0.5 / 14] * 14)


def step_with_copies() -> tuple[Rollouts, Tensor]:
    """Prompts with repeated samples, and the reward of each row (copies agree)."""
    #         prompt tokens      length reward
    table = [
        (0, [4, 5, 2], 3, 0.9),
        (0, [4, 2, 9], 2, 0.1),
        (0, [4, 5, 2], 3, 0.9),
        (0, [4, 5, 2], 3, 0.9),
        (0, [6, 2, 0], 2, 0.4),
        (1, [4, 5, 2], 3, 0.7),
        (1, [4, 5, 2], 3, 0.7),  # one unique sample
        (2, [8, 2, 0], 2, 0.6),  # k = 1
        (3, [2, 0, 0], 1, 0.3),
        (3, [8, 2, 0], 2, 0.8),
    ]
    tokens = torch.tensor([row[1] for row in table])
    mask = torch.arange(3) < torch.tensor([[row[2]] for row in table])
    # a function of prompt, token and position, as a model's would be: copies have the same log-probabilities
    owner = torch.tensor([row[0] for row in table])
    log_probs = -((tokens * 1.7 + owner[:, None] * 0.9 + torch.arange(3) * 0.31) % 2.3).double() * mask
    rollouts = Rollouts(
        prompt_index=owner,
        sample_index=torch.arange(10),
        tokens=tokens,
        mask=mask,
        finished=torch.ones(10, dtype=torch.bool),
        log_probs=log_probs,
        sampling_log_probs=log_probs * 0.8 - 0.05 * mask,
    )
    return rollouts, torch.tensor([row[3] for row in table], dtype=torch.float64)


def rewarded(rollouts: Rollouts, rewards: Tensor, counts: Tensor, kind: str) -> RewardedSamples:
    groups = Groups(rollouts.prompt_index, 4)
    queue = RewardQueue(100)
    queue.push(rewards.repeat_interleave(counts).tolist())
    return RewardedSamples(
        mask=rollouts.mask,
        groups=groups,
        counts=counts,
        rewards=rewards,
        baseline=baseline_values(kind, rewards, groups, counts, queue),
        sampling_log_probs=rollouts.sampling_log_probs,
        planned=torch.tensor([5, 2, 1, 2]),
    )


@pytest.mark.parametrize("kind", ["reinforce", "mrt", "fused"])
@pytest.mark.parametrize("baseline", ["fifo", "leave_one_out", "prompt_mean", "moving_average"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("flags", [(False, True, False, False, False), (True, False, True, True, True)])
def test_merged_duplicates_have_the_loss_and_gradient_of_kept_ones(
    kind: str, baseline: str, reduction: str, flags: tuple[bool, ...]
):
    rollouts, rewards = step_with_copies()
    config = replace(config_of(flags, kind), reinforce_reduction=reduction)
    kept, ones = handle_duplicates(rollouts, "keep")
    loss, c = coefficients(kept.log_probs, rewarded(kept, rewards, ones, baseline), config)
    merged, counts = handle_duplicates(rollouts, "merge")
    leaders = merged.sample_index  # the number of each kept row
    merged_loss, merged_c = coefficients(merged.log_probs, rewarded(merged, rewards[leaders], counts, baseline), config)
    # a kept row's coefficient is the sum over its copies
    copies = [[0, 2, 3], [1], [4], [5, 6], [7], [8], [9]]
    assert (leaders.tolist(), counts.tolist()) == ([rows[0] for rows in copies], [len(rows) for rows in copies])
    expected = torch.stack([c[rows].sum(0) for rows in copies])
    torch.testing.assert_close(merged_c, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged_loss, loss, rtol=1e-12, atol=1e-12)
    assert float(merged_c.abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["reinforce", "mrt", "fused"])
def test_dropped_duplicates_are_as_if_never_drawn(kind: str):
    rollouts, rewards = step_with_copies()
    dropped, counts = handle_duplicates(rollouts, "drop")
    unique = dropped.sample_index
    loss = objective_loss(
        dropped.log_probs, rewarded(dropped, rewards[unique], counts, "fifo"), ObjectiveConfig(kind=kind)
    )
    merged, number = handle_duplicates(rollouts, "merge")
    same = objective_loss(
        merged.log_probs,
        rewarded(merged, rewards[unique], torch.ones_like(number), "fifo"),
        ObjectiveConfig(kind=kind),
    )
    weighted = objective_loss(
        merged.log_probs, rewarded(merged, rewards[unique], number, "fifo"), ObjectiveConfig(kind=kind)
    )
    assert float(loss) == float(same) != pytest.approx(float(weighted))


@pytest.mark.parametrize("rule", ["merge", "keep", "drop"])
def test_one_unique_sample_has_no_mrt_gradient(rule: str):
    rollouts, rewards = step_with_copies()
    left, counts = handle_duplicates(rollouts, rule)
    samples = rewarded(left, rewards[left.sample_index], counts, "fifo")
    _, c = coefficients(left.log_probs, samples, ObjectiveConfig(kind="mrt", group_correction=True))
    single = (left.prompt_index == 1) | (left.prompt_index == 2)
    assert float(c[single].abs().max()) < 1e-15
    assert float(c[~single].abs().max()) > 1e-3
