"""Which loss, and what it is given: the settings of all objectives and the constants of their samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from torch import Tensor

from esrl.algorithm.groups import Groups
from esrl.algorithm.kl import Estimator

ObjectiveKind = Literal["fused", "reinforce", "mrt", "grpo", "rloo", "ppo"]
Normalise = Literal["sequence", "token", "constant"]
StdNormalise = Literal["group", "batch", "none"]
KLPlace = Literal["sequence", "token", "loss"]

CLIPPED: tuple[ObjectiveKind, ...] = ("grpo", "rloo", "ppo")
"""The objectives with a clipped ratio to the policy that has sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticConfig:
    """The value head of PPO and what it is used for."""

    gamma: float = 1.0
    """Discount of later rewards (method.md: 1)."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantage estimate (Schulman et al. 2016); 1 is reward to go minus value."""
    value_clip: float | None = 0.2
    """A value may move this far from the sampling policy's before its loss stops falling; unset: no bound."""
    value_coefficient: float = 0.1
    """Weight of the value loss beside the policy's (TRL's value)."""
    whiten: bool = True
    """Bring advantages to mean 0 and spread 1 over the real tokens of the step."""
    reward_clip: float | None = 10.0
    """Rewards are cut to [-c, c] before the KL penalty (the paper's RLHF setting: 10); unset: they are not."""

    def __post_init__(self) -> None:
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"critic.{name} is {getattr(self, name)}; it must lie in [0, 1].")
        for name in ("value_clip", "reward_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"critic.{name} is {value}; it must be above 0, or false for none.")
        if not 0 <= self.value_coefficient < math.inf:
            raise ValueError(f"critic.value_coefficient is {self.value_coefficient}; it must be 0 or more, and finite.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Which loss, and its constants."""

    kind: ObjectiveKind = "fused"
    """`fused` (paper: MRT where k_x > 1, REINFORCE where k_x = 1), `reinforce`, `mrt`, `grpo`, `rloo` or `ppo`."""
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
    """Weigh samples by exp(l - l at tau_x), for sampling at tau_x and scoring at 1, and for later updates."""
    importance_clip: float = 10.0
    """Upper bound of an importance weight."""
    clip_low: float = 0.2
    """grpo, rloo, ppo: a ratio below 1 - clip_low no longer pushes a bad sample down."""
    clip_high: float = 0.2
    """grpo, rloo, ppo: a ratio above 1 + clip_high no longer pushes a good sample up (DAPO: 0.28)."""
    normalise: Normalise | None = None
    """grpo, ppo: `sequence` (a sample's tokens are averaged: GRPO), `token` (one denominator for all tokens of the
    step: DAPO) or `constant` (divided by the longest answer allowed: Dr. GRPO). Unset: sequence for grpo, token for
    ppo."""
    std_normalise: StdNormalise | None = None
    """grpo, rloo: divide advantages by the spread of the prompt's rewards (`group`), of all rewards of the step
    (`batch`) or by nothing (`none`). Unset: group for grpo, none for rloo."""
    mask_truncated: bool = False
    """grpo, rloo, ppo: samples cut at the length limit count for the baseline, but are not learnt from."""
    kl_coefficient: float = 0.0
    """beta: the weight of the divergence from the reference policy; 0 needs no reference."""
    kl_place: KLPlace | None = None
    """Where beta KL goes: off the reward of the `sequence`, off that of each `token` (ppo), or into the `loss`. Unset:
    loss for grpo, token for ppo, sequence for the others."""
    kl_estimator: Estimator | None = None
    """`k1` (signed), `k2` or `k3`, Schulman's approximations. Unset: k1 in rewards, k3 in the loss."""
    kl_correction: bool = True
    """Multiply k1 and k3 in the loss by the ratio to the policy that has sampled: their gradient is then unbiased."""
    kl_target: float | None = None
    """Nats per sample that beta is steered to (Ziegler et al. 2019); unset: beta stays."""
    kl_horizon: int = 10_000
    """Samples over which the steering takes effect."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """ppo: its value head."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ObjectiveKind):
            raise ValueError(f"objective is {self.kind!r}; choose one of {', '.join(get_args(ObjectiveKind))}.")
        for name, choices in (
            ("mrt_scale", ("inverse_alpha", "none")),
            ("reinforce_reduction", ("mean", "sum")),
            ("score_temperature", ("one", "sampling")),
            ("normalise", (None, *get_args(Normalise))),
            ("std_normalise", (None, *get_args(StdNormalise))),
            ("kl_place", (None, *get_args(KLPlace))),
            ("kl_estimator", (None, *get_args(Estimator))),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {known}.")
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0 and finite.")
        if not self.importance_clip > 0:
            raise ValueError(f"importance_clip is {self.importance_clip}; it must be above 0.")
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low is {self.clip_low}; it must lie in (0, 1]: 1 is no lower bound.")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high is {self.clip_high}; it must be above 0.")
        if not 0 <= self.kl_coefficient < math.inf:
            raise ValueError(f"kl_coefficient is {self.kl_coefficient}; it must be 0 or more, and finite.")
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl_coefficient > 0):
            raise ValueError(
                f"kl_target is {self.kl_target} and kl_coefficient {self.kl_coefficient}; both must be above 0: the "
                "coefficient is what the steering starts from."
            )
        if self.kl_horizon < 1:
            raise ValueError(f"kl_horizon is {self.kl_horizon}; it must be 1 or more.")

    def _check_combinations(self) -> None:
        if self.importance_weights and self.score_temperature == "sampling" and not self.is_clipped:
            raise ValueError(
                'importance_weights correct for scoring at temperature 1; with score_temperature = "sampling" '
                "they would all be 1. Drop one of the two."
            )
        if self.importance_weights and self.is_clipped:
            raise ValueError(f"objective {self.kind!r} has its own ratio; set importance_weights to false.")
        if self.kl_place == "token" and self.kind != "ppo":
            raise ValueError(
                f'kl_place is "token", which needs rewards of tokens, and objective {self.kind!r} has none; '
                'use "sequence" or "loss", or objective "ppo".'
            )
        if self.kind == "rloo" and self.normalise is not None:
            raise ValueError(
                f"normalise is {self.normalise!r}, but rloo takes a sequence as one action; leave it out, or use grpo."
            )
        if self.kind == "ppo" and self.std_normalise is not None:
            raise ValueError(
                f"std_normalise is {self.std_normalise!r}, but ppo takes its advantages from the critic; leave it out "
                "(critic.whiten scales them)."
            )

    @property
    def is_clipped(self) -> bool:
        """Whether the objective has a ratio to the sampling policy, so that several updates are sound."""
        return self.kind in CLIPPED

    @property
    def length_norm(self) -> Normalise:
        """``normalise``, resolved."""
        return self.normalise or ("token" if self.kind == "ppo" else "sequence")

    @property
    def std_norm(self) -> StdNormalise:
        """``std_normalise``, resolved."""
        return self.std_normalise or ("group" if self.kind == "grpo" else "none")

    @property
    def place(self) -> KLPlace:
        """``kl_place``, resolved."""
        usual: dict[str, KLPlace] = {"grpo": "loss", "ppo": "token"}
        return self.kl_place or usual.get(self.kind, "sequence")

    @property
    def estimator(self) -> Estimator:
        """``kl_estimator``, resolved."""
        return self.kl_estimator or ("k3" if self.place == "loss" else "k1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardedSamples:
    """Everything an objective needs besides the log-probabilities themselves (and values, where there is a critic).

    A row with ``counts`` 0 takes no part (its reward function abstained). What comes after ``planned`` is needed by the
    objectives with a ratio, or with a reference policy, alone.
    """

    mask: Tensor  # (R, T) bool
    groups: Groups
    counts: Tensor  # (R,) how often the row was drawn, after merging duplicates
    rewards: Tensor  # (R,)
    baseline: Tensor  # (R,)
    sampling_log_probs: Tensor  # (R, T) at the row's temperature, as recorded in stage one
    planned: Tensor  # (P,) k_x
    shares: Tensor | None = None  # (R,) of its prompt's samples, copies included; the whole batch's, unlike `counts`
    advantages: Tensor | None = None  # (R,), or (R, T) from a critic
    old_log_probs: Tensor | None = None  # (R, T) of the policy that has sampled
    reference_log_probs: Tensor | None = None  # (R, T)
    learnt: Tensor | None = None  # (R,) bool: False for a truncated sample that is masked; None: all are learnt from
    old_values: Tensor | None = None  # (R, T) of the policy that has sampled
    returns: Tensor | None = None  # (R, T) what values are to predict
    max_tokens: int = 1  # the longest answer allowed
    kl_coefficient: float = 0.0  # beta of the loss, as it stands

    def select(self, rows: Tensor) -> RewardedSamples:
        """Some rows (int64) of the same prompts; their shares and advantages stay those of the whole batch."""
        changes = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor) and entry.name != "planned":
                changes[entry.name] = value[rows]
        kept = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return RewardedSamples(**{**kept, **changes, "groups": Groups(self.groups.index[rows], self.groups.num_groups)})
