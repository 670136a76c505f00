"""Losses as functions of the log-probabilities of samples (eq. 3, 4, 5; method.md, section 5).

All are sums; the one division, by the number of prompts of the step or of tokens (``denominator``), happens in the
training step. The settings and the samples are in ``objective_config``, the losses with a clipped ratio in ``clipped``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esrl.algorithm.clipped import clipped_loss, num_tokens, ratios, row_weights
from esrl.algorithm.kl import kl_estimates
from esrl.algorithm.objective_config import ObjectiveConfig, RewardedSamples

__all__ = [
    "ObjectiveConfig",
    "RewardedSamples",
    "coefficients",
    "denominator",
    "mrt_losses",
    "mrt_prompts",
    "objective_loss",
    "reinforce_losses",
]


def objective_loss(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> Tensor:
    """The step's loss, a sum over prompts or over tokens: (R, T) -> scalar."""
    loss = clipped_loss(log_probs, samples, config) if config.is_clipped else _plain_loss(log_probs, samples, config)
    if config.place == "loss" and samples.reference_log_probs is not None:
        loss = loss + samples.kl_coefficient * kl_loss(log_probs, samples, config)
    return loss


def denominator(samples: RewardedSamples, config: ObjectiveConfig, num_prompts: float) -> float:
    """What the loss is divided by, this process's part of it: prompts, or tokens (``normalise = "token"``)."""
    per_token = config.kind in ("grpo", "ppo") and config.length_norm == "token"
    return num_tokens(samples) if per_token else num_prompts


def kl_loss(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> Tensor:
    """The divergence from the reference policy, weighted as the objective weighs tokens: (R, T) -> scalar.

    Where the objective takes a sequence as one action, that of the sequence: the sum over its tokens.
    """
    assert samples.reference_log_probs is not None
    divergence = kl_estimates(log_probs, samples.reference_log_probs, samples.mask, config.estimator)
    if config.kl_correction and config.estimator != "k2" and samples.old_log_probs is not None:
        divergence = divergence * ratios(log_probs, samples)
    return (row_weights(samples, config).to(log_probs.dtype) * divergence.sum(1)).sum()


def _plain_loss(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> Tensor:
    log_weights = _importance_log_weights(log_probs, samples, config)
    uses_mrt = mrt_prompts(samples.planned, config)
    losses = log_probs.new_zeros(samples.groups.num_groups)
    if bool(uses_mrt.any()):
        losses = torch.where(uses_mrt, mrt_losses(log_probs, samples, config, log_weights), losses)
    if not bool(uses_mrt.all()):
        losses = torch.where(uses_mrt, losses, reinforce_losses(log_probs, samples, config, log_weights))
    return losses.sum()


def mrt_prompts(planned: Tensor, config: ObjectiveConfig) -> Tensor:
    """(P,) bool: which prompts are optimized by MRT; the others by REINFORCE."""
    if config.kind == "fused":
        return planned > 1
    return torch.full_like(planned, config.kind == "mrt", dtype=torch.bool)


def reinforce_losses(
    log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig, log_weights: Tensor | None = None
) -> Tensor:
    """Eq. 3: (P,) -sum over the prompt's samples of (r - b) l, or their mean."""
    counts = samples.counts.to(log_probs.dtype)
    # w_i / sum w by softmax: of a long sample, exp(l - l at tau_x) itself underflows (float32: below e^-103)
    share = samples.groups.softmax(counts.log() if log_weights is None else counts.log() + log_weights)
    if config.reinforce_reduction == "sum":
        # with importance weights w_i / mean(w), so that the scale stays that of a plain sum
        share = share * samples.groups.spread(samples.groups.sum(counts))
    advantage = (samples.rewards - samples.baseline).to(log_probs.dtype)
    return samples.groups.sum(-share * advantage * _sequence_log_probs(log_probs, samples.mask))


def mrt_losses(
    log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig, log_weights: Tensor | None = None
) -> Tensor:
    """Eq. 4 and 5: (P,) sum over the prompt's samples of Q (b - r), divided by alpha by default.

    A merged row enters Q with log(count) added to alpha * l: the loss over all its copies, for the work of one.
    """
    rows = _sequence_log_probs(log_probs, samples.mask)
    if config.length_normalise:
        rows = rows / samples.mask.sum(1).clamp_min(1)
    scores = config.alpha * rows + samples.counts.to(log_probs.dtype).log()
    if log_weights is not None:
        scores = scores + log_weights
    posterior = samples.groups.softmax(scores)
    risk = (samples.baseline - samples.rewards).to(log_probs.dtype)
    losses = samples.groups.sum(posterior * risk)
    if config.mrt_scale == "inverse_alpha":
        losses = losses / config.alpha
    if config.group_correction:
        number = samples.groups.sum(samples.counts.to(log_probs.dtype))
        losses = losses * torch.where(number > 1, number / (number - 1).clamp_min(1), 1.0)
    return losses


def coefficients(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """The loss and c = dL/dl, (R, T): all that stage two needs to know about the objective (method.md, section 4)."""
    leaf = log_probs.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = objective_loss(leaf, samples, config)
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True) if loss.requires_grad else (None,)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    return loss.detach(), torch.where(samples.mask, gradient, 0.0)


def _sequence_log_probs(log_probs: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, log_probs, 0.0).sum(1)


def _importance_log_weights(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> Tensor | None:
    """(R,) log of the clipped w = exp(l - l at tau_x), constants of the objective."""
    if not config.importance_weights:
        return None
    difference = log_probs.detach() - samples.sampling_log_probs.to(log_probs.dtype)
    return _sequence_log_probs(difference, samples.mask).clamp_max(
        torch.tensor(config.importance_clip, dtype=log_probs.dtype).log().item()
    )
