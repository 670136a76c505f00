"""How well the model handles a prompt, and the memory of it (eq. 6, eq. 7; method.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from esrl.algorithm.groups import Groups

Estimator = Literal["metric", "reward", "entropy", "random"]
EntropyForm = Literal["paper", "full_normalised", "sampled_logp", "max_prob"]
CapabilityMap = Literal["identity", "sigmoid_z", "minmax", "rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityConfig:
    """How the capability of a prompt is estimated from its samples."""

    estimator: Estimator = "metric"
    """`metric` (eq. 6: the mean reward of the prompt's samples), `reward` (the same of a reward model, whose scores
    have no bounds: ESRL-Reward), `entropy` (eq. 7) or `random` (ESRL-Random)."""
    entropy_form: EntropyForm = "paper"
    """`paper` (1 + mean p ln p of the sampled token, in [0.632, 1]), `full_normalised` (1 - H / ln V), `sampled_logp`
    (mean log-probability, as a probability) or `max_prob`."""
    average: Literal["tokens", "sequences"] = "tokens"
    """Whether eq. 7 averages over all tokens of a prompt's samples, or over the means of its sequences."""
    contrast: Literal["none", "minmax"] = "none"
    """`minmax` spreads the batch's capabilities over [0, 1] before eq. 8."""
    capability_map: CapabilityMap | None = None
    """Maps unbounded scores into [0, 1]: `identity`, `sigmoid_z` (z-score against the reward queue), `minmax` or `rank`
    (within the batch). Unset: sigmoid_z for `reward`, identity for the others."""
    scope: Literal["step", "process"] = "step"
    """Whether eq. 8 sums over all prompts of the step or over those of one process."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("estimator", get_args(Estimator)),
            ("entropy_form", get_args(EntropyForm)),
            ("average", ("tokens", "sequences")),
            ("contrast", ("none", "minmax")),
            ("capability_map", (None, *get_args(CapabilityMap))),
            ("scope", ("step", "process")),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {known}.")

    @property
    def mapping(self) -> CapabilityMap:
        """``capability_map``, resolved."""
        return self.capability_map or ("sigmoid_z" if self.estimator == "reward" else "identity")

    @property
    def records(self) -> tuple[str, ...]:
        """What the sampler must record per token for this estimator."""
        if self.estimator != "entropy":
            return ()
        return {"full_normalised": ("entropy",), "max_prob": ("max_prob",)}.get(self.entropy_form, ())


def metric_capability(rewards: Tensor, groups: Groups, counts: Tensor) -> Tensor:
    """Eq. 6: (R,) rewards -> (P,) their mean per prompt, a merged row counting as often as it was drawn."""
    return groups.mean(rewards.to(torch.float64), counts.to(torch.float64))


def entropy_capability(
    values: Tensor, mask: Tensor, groups: Groups, counts: Tensor, config: CapabilityConfig, vocabulary: int
) -> Tensor:
    """Eq. 7 and its variants: (P,) how sure the model is of its own samples.

    Args:
        values: (R, T) log-probabilities at temperature 1; for ``full_normalised`` the entropy in nats of each
            distribution, for ``max_prob`` its largest probability.
        mask: (R, T).
        counts: (R,) how often each row was drawn.
        vocabulary: V, for ``full_normalised``.
    """
    values = values.to(torch.float64)
    if config.entropy_form == "paper":
        values = values.exp() * values
    values = torch.where(mask, values, 0.0)
    lengths = mask.sum(1).to(torch.float64).clamp_min(1)
    counts = counts.to(torch.float64)
    if config.average == "tokens":
        mean = groups.mean(values.sum(1) / lengths, counts * lengths)
    else:
        mean = groups.mean(values.sum(1) / lengths, counts)
    if config.entropy_form == "paper":
        return 1 + mean
    if config.entropy_form == "full_normalised":
        return (1 - mean / math.log(vocabulary)).clamp_min(0)  # a float32 entropy can exceed ln V by rounding
    if config.entropy_form == "sampled_logp":
        return mean.exp()
    return mean


def map_capability(scores: Tensor, how: CapabilityMap, queue_mean: float = 0.0, queue_std: float = 1.0) -> Tensor:
    """Map (P,) unbounded scores into [0, 1], order kept; eq. 8 cannot take negative ones (method.md, section 2).

    Raises:
        ValueError: a score is not finite; every map but ``identity`` would hide it from eq. 8's own check.
    """
    if how != "identity":
        _check_finite(scores, f'capability_map = "{how}"')
    if how == "sigmoid_z":
        return torch.sigmoid((scores - queue_mean) / (queue_std if queue_std > 0 else 1.0))
    if how == "minmax":
        return _minmax(scores)
    if how == "rank":
        smaller = (scores[None, :] < scores[:, None]).sum(1)  # ties share a rank, so equal prompts stay equal
        return smaller.to(torch.float64) / max(1, len(scores) - 1)
    return scores


def contrast(capability: Tensor, how: Literal["none", "minmax"]) -> Tensor:
    """Spread (P,) capabilities of a batch over [0, 1], or leave them; ValueError for one that is not finite."""
    if how == "none":
        return capability
    _check_finite(capability, 'contrast = "minmax"')
    return _minmax(capability)


def _check_finite(scores: Tensor, user: str) -> None:
    bad = ~torch.isfinite(scores)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"capability[{i}] is {float(scores[i])}; {user} needs finite scores. "
            "Look at what this prompt's capability was computed from: its rewards or log-probabilities."
        )


def _minmax(scores: Tensor) -> Tensor:
    if len(scores) == 0:
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.full_like(scores, 0.5)


@dataclass(slots=True)
class CapabilityRecord:
    """What is remembered of one prompt."""

    score: float
    """Cap_x before any mapping."""
    greedy: bool
    """True for a first estimate from one greedy decode, False once it was sampled."""
    epoch: int
    """The epoch it was recorded in."""
    num_rewards: int = 0
    reward_std: float | None = None
    """Sample standard deviation of the rewards; None below two."""


class CapabilityMemory:
    """Cap_x of the last visit, by example id; read in the next epoch (paper, "Dynamic Sampling")."""

    def __init__(self) -> None:
        self.records: dict[str, CapabilityRecord] = {}

    def __len__(self) -> int:
        return len(self.records)

    def missing(self, example_ids: Sequence[str], epoch: int) -> list[int]:
        """Indices of the prompts without a record of the epoch before or of this one.

        An older one says little of the model of today: its prompt was left out since (``eliminate = "prompts"``), and
        would be for ever, or its rewards abstained.
        """
        known = [self.records.get(example) for example in example_ids]
        return [i for i, record in enumerate(known) if record is None or record.epoch < epoch - 1]

    def reward_std(self, example_ids: Sequence[str]) -> Tensor:
        """(P,) float64 spread of each prompt's rewards, NaN below two recorded rewards."""
        known = [self.records.get(example) for example in example_ids]
        spread = [math.nan if record is None or record.reward_std is None else record.reward_std for record in known]
        return torch.tensor(spread, dtype=torch.float64)

    def write(self, example_ids: Sequence[str], records: Sequence[CapabilityRecord | None]) -> None:
        """Record prompts; None leaves what is known (a prompt without a single valid sample)."""
        for example, record in zip(example_ids, records, strict=True):
            if record is not None:
                self.records[example] = record

    def state_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return {example: list(asdict(record).values()) for example, record in self.records.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records = {example: CapabilityRecord(*values) for example, values in state.items()}
