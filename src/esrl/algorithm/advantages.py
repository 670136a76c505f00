"""How much better than expected a sample, or a token of it, was (method.md, section 5).

GRPO: Shao et al. 2024; RLOO: Ahmadian et al. 2024; GAE: Schulman et al. 2016. A merged row stands for all its copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esrl.algorithm.groups import Groups
from esrl.algorithm.objective_config import CriticConfig, StdNormalise

EPSILON = 1e-4
"""Added to a spread before it divides (TRL's value)."""

Reduce = Callable[[Sequence[float]], list[float]]
"""Adds up numbers over processes, place by place."""


def group_shares(groups: Groups, counts: Tensor) -> Tensor:
    """(R,) float64 counts -> each row's share of its prompt's samples; they sum to 1 for a prompt with any."""
    counts = counts.to(torch.float64)
    total = groups.sum(counts)
    return counts / groups.spread(torch.where(total > 0, total, 1.0))


def equal_groups(rewards: Tensor, groups: Groups, counts: Tensor) -> Tensor:
    """(P,) bool: whether all of the prompt's samples, two or more of them, have the same reward."""
    drawn = counts > 0
    top, bottom = (
        rewards.new_full((groups.num_groups,), -sign * torch.inf).scatter_reduce(
            0, groups.index, torch.where(drawn, rewards, -sign * torch.inf), reduce=reduce
        )
        for sign, reduce in ((1, "amax"), (-1, "amin"))
    )
    return (top == bottom) & (groups.sum(counts) > 1)


def group_advantages(
    rewards: Tensor, baseline: Tensor, groups: Groups, counts: Tensor, how: StdNormalise, batch_std: float = 0.0
) -> Tensor:
    """(R,) r - b, divided by a spread plus 1e-4.

    Args:
        baseline: (R,) the prompt's mean (GRPO) or that of its other samples (RLOO); the queue's where k_x = 1.
        batch_std: of all rewards of the step, for ``how = "batch"``.

    Of a prompt with one sample there is no spread: its r - b is not divided. A prompt whose rewards are all equal has
    advantage 0 exactly, whatever the rounding of its mean. Spreads are those of a sample, with n - 1.
    """
    weights = counts.to(rewards.dtype)
    number = groups.sum(weights)
    advantage = rewards - baseline
    if how == "group":
        mean = groups.mean(rewards, weights)
        squares = groups.sum(weights * (rewards - groups.spread(mean)).square())
        spread = (squares / (number - 1).clamp_min(1)).sqrt() + EPSILON
    else:
        spread = torch.full_like(number, batch_std + EPSILON if how == "batch" else 1.0)
    advantage = advantage / groups.spread(torch.where(number > 1, spread, 1.0))
    nothing = groups.spread(equal_groups(rewards, groups, counts)) | (counts == 0)
    return torch.where(nothing, 0.0, advantage)


def token_rewards(rewards: Tensor, mask: Tensor, penalty: Tensor | None, clip: float | None) -> Tensor:
    """(R, T) the reward at a sample's last real token, and the penalty off that of each token.

    Args:
        penalty: (R, T) beta times the divergence, 0 outside the mask.
        clip: rewards are cut to [-clip, clip] first.
    """
    rewards = rewards if clip is None else rewards.clamp(-clip, clip)
    result = torch.zeros(mask.shape, dtype=torch.float64) if penalty is None else -penalty.to(torch.float64)
    lengths = mask.sum(1)
    real = (lengths > 0).nonzero()[:, 0]
    result[real, lengths[real] - 1] += rewards[real].to(torch.float64)
    return result


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, config: CriticConfig
) -> tuple[Tensor, Tensor]:
    """A_t = sum over s >= t of (gamma lambda)^(s - t) delta_s, delta_t = r_t + gamma V_{t+1} - V_t.

    V beyond the end is 0.

    Args:
        rewards: (R, T) of tokens.
        values: (R, T) V_t, before token t is drawn.

    Returns:
        (R, T) advantages and (R, T) returns A + V, both 0 outside the mask.
    """
    values = torch.where(mask, values.to(torch.float64), 0.0)
    advantages = torch.zeros_like(values)
    ahead = later = torch.zeros_like(values[:, 0]) if values.shape[1] else values.new_zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + config.gamma * later - values[:, t]
        ahead = torch.where(mask[:, t], delta + config.gamma * config.gae_lambda * ahead, 0.0)
        later = values[:, t]
        advantages[:, t] = ahead
    return advantages, torch.where(mask, advantages + values, 0.0)


def whitened(values: Tensor, mask: Tensor, counts: Tensor, reduce: Reduce) -> Tensor:
    """(R, T) values with mean 0 and spread 1 over the real tokens of the step, each as often as its row was drawn.

    Padding takes no part and stays 0. A single token is left as it is.
    """
    weights = mask.to(torch.float64) * counts.to(torch.float64)[:, None]
    number, total = reduce([float(weights.sum()), float((weights * values).sum())])
    if number < 2:
        return values
    mean = total / number
    (squares,) = reduce([float((weights * (values - mean).square()).sum())])
    # the n - 1 and the 1e-8 are TRL's
    return torch.where(mask, (values - mean) * (squares / (number - 1) + 1e-8) ** -0.5, 0.0)
