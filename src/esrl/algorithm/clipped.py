"""Clipped policy gradients: GRPO, RLOO and PPO as losses of log-probabilities, and PPO's loss of values.

The ratio is that of the policy to the one that has sampled, exp(l - l_old); at a batch's first update it is exactly 1.
PPO: Schulman et al. 2017; GRPO: Shao et al. 2024; DAPO: Yu et al. 2025; Dr. GRPO: Liu et al. 2025; RLOO: Ahmadian et
al. 2024, in TRL's form with a ratio of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esrl.algorithm.advantages import group_shares
from esrl.algorithm.objective_config import ObjectiveConfig, RewardedSamples

_LARGEST_LOG_RATIO = 20.0
"""A larger ratio is taken as this: its exp would overflow, and 0 * inf in the clipped branch be a NaN gradient."""


def row_weights(samples: RewardedSamples, config: ObjectiveConfig) -> Tensor:
    """(R,) float64: what a row's tokens weigh in the loss, before the step's one denominator.

    ``token``: as often as it was drawn. The others: its share of its prompt's samples (a prompt's samples are averaged,
    so that prompts weigh the same whatever k_x), divided by its length or by the longest answer allowed. A sequence
    that is one action (rloo, and the objectives without a ratio) has its share.
    """
    shares = group_shares(samples.groups, samples.counts) if samples.shares is None else samples.shares
    weights = shares.to(torch.float64)
    if config.kind in ("grpo", "ppo"):
        lengths = samples.mask.sum(1).clamp_min(1)
        if config.length_norm == "token":
            weights = samples.counts.to(torch.float64)
        else:
            weights = weights / (lengths if config.length_norm == "sequence" else samples.max_tokens)
    return weights if samples.learnt is None else torch.where(samples.learnt, weights, 0.0)


def num_tokens(samples: RewardedSamples) -> float:
    """Real tokens that are learnt from, each as often as its row was drawn: what ``token`` divides by."""
    counts = samples.counts if samples.learnt is None else torch.where(samples.learnt, samples.counts, 0)
    return float((samples.mask.sum(1) * counts).sum())


def ratios(log_probs: Tensor, samples: RewardedSamples) -> Tensor:
    """(R, T) the chance of each token now, divided by that when it was sampled; 1 outside the mask."""
    assert samples.old_log_probs is not None
    difference = torch.where(samples.mask, log_probs - samples.old_log_probs.to(log_probs.dtype), 0.0)
    return difference.clamp_max(_LARGEST_LOG_RATIO).exp()


def clipped_loss(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> Tensor:
    """sum of w_i * -min(ratio A, clip(ratio) A): over tokens (grpo, ppo) or over sequences (rloo); (R, T) -> scalar."""
    log_ratio, advantages = _log_ratio(log_probs, samples, config)
    ratio = log_ratio.clamp_max(_LARGEST_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    weights = row_weights(samples, config).to(log_probs.dtype)
    if config.kind == "rloo":
        return -(weights * gain[:, 0]).sum()
    return -(weights * torch.where(samples.mask, gain, 0.0).sum(1)).sum()


def value_loss(values: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> Tensor:
    """PPO's clipped value loss, weighted like the policy's: (R, T) -> scalar.

    max((V - R)^2, (V' - R)^2) / 2, V' being V within ``value_clip`` of the sampling policy's.
    """
    assert samples.returns is not None and samples.old_values is not None, "a critic's samples have both"
    returns, old = samples.returns.to(values.dtype), samples.old_values.to(values.dtype)
    errors = (values - returns).square()
    if (bound := config.critic.value_clip) is not None:
        errors = torch.maximum(errors, (old + (values - old).clamp(-bound, bound) - returns).square())
    weights = config.critic.value_coefficient * row_weights(samples, config).to(values.dtype)
    return (weights * torch.where(samples.mask, errors, 0.0).sum(1)).sum() / 2


def value_coefficients(values: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """The value loss and dL/dV, (R, T)."""
    leaf = values.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = value_loss(leaf, samples, config)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), torch.where(samples.mask, gradient, 0.0)


@dataclass(frozen=True, slots=True)
class RatioSums:
    """Sums over what is clipped, tokens or sequences, each as often as it was drawn; to be added up over processes."""

    number: float
    ratio: float
    below: float  # held by the lower bound
    above: float
    divergence: float  # of the policy from the one that has sampled, by k3

    def figures(self) -> dict[str, float]:
        """What is logged."""
        number = max(self.number, 1.0)
        return {
            "ratio_mean": self.ratio / number if self.number else 1.0,
            "clip_low_share": self.below / number,
            "clip_high_share": self.above / number,
            "approx_kl": self.divergence / number,
        }


def ratio_sums(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> RatioSums:
    """How far the policy has moved from the one that has sampled, and how much of the loss is clipped."""
    log_ratio, advantages = _log_ratio(log_probs.detach(), samples, config)
    log_ratio, advantages = log_ratio.to(torch.float64), advantages.to(torch.float64)
    ratio = log_ratio.clamp_max(_LARGEST_LOG_RATIO).exp()
    counts = samples.counts if samples.learnt is None else torch.where(samples.learnt, samples.counts, 0)
    weights = counts.to(torch.float64)[:, None]
    if config.kind != "rloo":
        weights = weights * samples.mask
    below = (ratio < 1 - config.clip_low) & (advantages < 0)
    above = (ratio > 1 + config.clip_high) & (advantages > 0)
    parts = (torch.ones_like(ratio), ratio, below, above, ratio - 1 - log_ratio)
    return RatioSums(*(float((weights * part).sum()) for part in parts))


def _log_ratio(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """log of the ratio and the advantage: (R, T) each, or (R, 1) where a sequence is one action."""
    assert samples.advantages is not None and samples.old_log_probs is not None, (
        "a clipped objective's samples have both"
    )
    difference = torch.where(samples.mask, log_probs - samples.old_log_probs.to(log_probs.dtype), 0.0)
    advantages = samples.advantages.to(log_probs.dtype)
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    if config.kind == "rloo":
        return difference.sum(1, keepdim=True), advantages
    return difference, advantages.expand(difference.shape)
