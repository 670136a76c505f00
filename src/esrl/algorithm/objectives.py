"""Losses as functions of the log-probabilities of samples (eq. 3, 4, 5; method.md, section 5).

All are sums over prompts; the one division by the number of prompts of the step happens in the training step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from esrl.algorithm.groups import Groups

ObjectiveKind = Literal["fused", "reinforce", "mrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Which loss, and its constants."""

    kind: ObjectiveKind = "fused"
    """`fused` (paper: MRT where k_x > 1, REINFORCE where k_x = 1), `reinforce` or `mrt`."""
    alpha: float = 0.005
    """MRT smoothness (eq. 4). Shen et al. use 0.005 with summed log-probabilities; the ESRL paper gives none."""
    length_normalise: bool = False
    """Q from mean instead of summed log-probabilities; alpha = 1 is then sane."""
    mrt_scale: Literal["inverse_alpha", "none"] = "inverse_alpha"
    """`inverse_alpha` divides the MRT loss by alpha: at .005 an MRT sample would weigh 3.6e-4 against REINFORCE's 1."""
    group_correction: bool = False
    """Multiply a prompt's MRT loss by k / (k - 1)."""
    reinforce_reduction: Literal["mean", "sum"] = "mean"
    """Over a prompt's samples; `sum` (as eq. 3 is printed) re-weights prompts as soon as k_x varies."""
    score_temperature: Literal["one", "sampling"] = "one"
    """Score samples at temperature 1 (paper) or at the temperature they were drawn with."""
    importance_weights: bool = False
    """Weigh samples by exp(l - l at tau_x), for sampling at tau_x and scoring at 1."""
    importance_clip: float = 10.0
    """Upper bound of an importance weight."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ObjectiveKind):
            raise ValueError(f"objective is {self.kind!r}; choose one of {', '.join(get_args(ObjectiveKind))}.")
        for name, choices in (
            ("mrt_scale", ("inverse_alpha", "none")),
            ("reinforce_reduction", ("mean", "sum")),
            ("score_temperature", ("one", "sampling")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0 and finite.")
        if not self.importance_clip > 0:
            raise ValueError(f"importance_clip is {self.importance_clip}; it must be above 0.")
        if self.importance_weights and self.score_temperature == "sampling":
            raise ValueError(
                'importance_weights correct for scoring at temperature 1; with score_temperature = "sampling" '
                "they would all be 1. Drop one of the two."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardedSamples:
    """Everything an objective needs besides the log-probabilities themselves.

    A row with ``counts`` 0 takes no part (its reward function abstained).
    """

    mask: Tensor  # (R, T) bool
    groups: Groups
    counts: Tensor  # (R,) how often the row was drawn, after merging duplicates
    rewards: Tensor  # (R,)
    baseline: Tensor  # (R,)
    sampling_log_probs: Tensor  # (R, T) at the row's temperature, as recorded in stage one
    planned: Tensor  # (P,) k_x


def objective_loss(log_probs: Tensor, samples: RewardedSamples, config: ObjectiveConfig) -> Tensor:
    """The step's loss, a sum over prompts: (R, T) -> scalar."""
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
