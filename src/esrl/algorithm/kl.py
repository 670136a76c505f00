"""The divergence from a reference policy: Schulman's approximations, the penalty they make, and its steering.

With log r = log p_ref - log p of a token drawn from p (Schulman 2020, "Approximating KL divergence"):

    k1 = -log r                    unbiased, signed, of high variance
    k2 = (log r)^2 / 2             biased, never negative; its gradient is unbiased
    k3 = (r - 1) - log r           unbiased, never negative

As a loss on samples of the policy itself, k1 alone has an expected gradient of 0 (it moves nothing but at random), and
k3 that of another divergence. Multiplied by the ratio p / p_old, which is 1 there but has a gradient, k1 and k3 have
that of the divergence (DeepSeek-V3.2, 2025; TRL's ``use_bias_correction_kl``); k2 has it as it is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

_LARGEST_LOG_RATIO = 20.0
"""exp of more says nothing but "far too much", and overflows float32 at 88."""


def kl_estimates(log_probs: Tensor, reference: Tensor, mask: Tensor, how: Estimator) -> Tensor:
    """(R, T) the divergence of each token in nats, 0 outside the mask; differentiable in ``log_probs``."""
    log_ratio = torch.where(mask, reference.to(log_probs.dtype) - log_probs, 0.0)
    if how == "k1":
        return -log_ratio
    if how == "k2":
        return log_ratio.square() / 2
    return log_ratio.clamp_max(_LARGEST_LOG_RATIO).exp() - 1 - log_ratio


def steered(coefficient: float, divergence: float, target: float, num_samples: int, horizon: int) -> float:
    """The next beta (Ziegler et al. 2019, section 2.2): proportional control of log beta, the error cut to 20 %.

    Args:
        divergence: nats per sample, measured on ``num_samples`` samples.
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_samples / horizon)
