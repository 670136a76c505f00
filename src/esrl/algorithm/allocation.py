"""How many samples each prompt gets, and at what temperature (eq. 8, eq. 9; method.md, section 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from esrl.types import SamplingPlan

Allocator = Literal["esrl", "uniform", "uniform_budget", "random", "variance"]
Rounding = Literal["ceil", "floor", "nearest", "largest_remainder"]
TemperatureRule = Literal["paper", "span", "fixed"]
Elimination = Literal["samples", "prompts"]

# ceil(14 + 1e-15) must not be 15: equal capabilities at beta .3 are off by one in 64 of 1,536 batches otherwise
_ROUNDING_SLACK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationConfig:
    """Plain settings of the sampling plan; the paper's ablations are values of these."""

    allocator: Allocator = "esrl"
    """`esrl` (eq. 8), `uniform` (everyone gets max_samples), `uniform_budget` (as many samples as eq. 8 would spend,
    spread evenly), `random` (ESRL-Random) or `variance` (Neyman: by the recorded spread of a prompt's rewards)."""
    max_samples: int = 20
    """k_max. The paper uses 1, 5, 10, 15, 20."""
    min_samples: int = 1
    """Lower clamp of k_x; the paper implies 1."""
    elimination_ratio: float = 0.3
    """beta in [0, 1): the share of samples that eq. 8 takes away. The paper uses 0.3."""
    rounding: Rounding = "ceil"
    """`ceil` (paper) spends about half a sample per prompt more than the budget; `largest_remainder` meets it
    exactly."""
    temperature_rule: TemperatureRule = "paper"
    """`paper` (eq. 9, which never reaches tau_min), `span` (k from min to max maps onto the whole interval) or
    `fixed`."""
    min_temperature: float = 0.6
    """tau_min. The paper uses 0.6."""
    max_temperature: float = 1.0
    """tau_max. The paper uses 1.0."""
    fixed_temperature: float = 1.0
    """The temperature of the rule `fixed` (the ablation without temperature adjustment; REINFORCE in the paper:
    0.95)."""
    eliminate: Elimination = "samples"
    """`samples` (paper) shrinks k_x; `prompts`, for k_max = 1, drops the floor(beta n) most capable prompts of a batch
    and gives the others max_samples. The allocator `uniform` is then the same as `esrl`, `random` drops any prompts,
    and the other two are refused."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("allocator", Allocator),
            ("rounding", Rounding),
            ("temperature_rule", TemperatureRule),
            ("eliminate", Elimination),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}.")
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(
                f"min_samples is {self.min_samples} and max_samples {self.max_samples}; need 1 <= min <= max."
            )
        if not 0 <= self.elimination_ratio < 1:
            raise ValueError(f"elimination_ratio is {self.elimination_ratio}; it must lie in [0, 1).")
        if not 0 < self.min_temperature <= self.max_temperature < math.inf:
            raise ValueError(
                f"min_temperature is {self.min_temperature} and max_temperature {self.max_temperature}; "
                "need 0 < min <= max."
            )
        if not 0 < self.fixed_temperature < math.inf:
            raise ValueError(f"fixed_temperature is {self.fixed_temperature}; it must be above 0.")
        if self.eliminate == "prompts" and self.allocator not in ("esrl", "uniform", "random"):
            raise ValueError(
                f'eliminate = "prompts" gives every prompt it keeps max_samples, so allocator {self.allocator!r} has '
                'no say; take "esrl" or "random", or eliminate = "samples".'
            )

    @property
    def needs_capability(self) -> bool:
        """Whether the plan depends on what the model is capable of."""
        if self.eliminate == "prompts":
            return self.allocator != "random"
        return self.allocator in ("esrl", "uniform_budget")


def allocate(
    capability: Tensor, config: AllocationConfig, *, uniforms: Tensor | None = None, reward_std: Tensor | None = None
) -> SamplingPlan:
    """Turn per-prompt capability into a sampling plan (eq. 8, eq. 9).

    Args:
        capability: (P,) how well the model handles each prompt, 0 or more; only ratios matter.
        uniforms: (P, 2) in [0, 1), what the allocator ``random`` draws from.
        reward_std: (P,) the recorded spread of each prompt's rewards for ``variance``; NaN where it is not known.

    Returns:
        ``num_samples`` lies in [min_samples, max_samples] and, for ``esrl``, never rises as capability rises;
        ``eliminate = "prompts"`` gives 0 to the prompts it drops. ``temperature`` follows ``temperature_rule``.

    Raises:
        ValueError: a capability is negative or not finite.

    The paper leaves two cases open. A prompt whose share would drive eq. 8 to zero or below keeps
    ``min_samples``; a batch whose capabilities are all zero is treated as equally capable.
    """
    capability = capability.detach().to("cpu", torch.float64)
    _check_capability(capability)
    temperature = None
    if config.eliminate == "prompts" and config.allocator == "random":
        assert uniforms is not None, "the random allocator draws from `uniforms`"
        num_samples = _without_highest(uniforms[:, 0], config)
    elif config.eliminate == "prompts":
        num_samples = _without_highest(capability, config)
    elif config.allocator == "esrl":
        num_samples = _by_capability(capability, config)
    elif config.allocator == "uniform":
        num_samples = torch.full_like(capability, config.max_samples, dtype=torch.int64)
    elif config.allocator == "uniform_budget":
        num_samples = _evenly(int(_by_capability(capability, config).sum()), len(capability))
    elif config.allocator == "random":
        assert uniforms is not None, "the random allocator draws from `uniforms`"
        num_samples, temperature = _at_random(uniforms, config)
    else:
        assert reward_std is not None, "the variance allocator reads `reward_std`"
        num_samples = _by_spread(reward_std.detach().to("cpu", torch.float64), config)
    if temperature is None or config.temperature_rule == "fixed":
        temperature = temperature_of(num_samples, config)
    return SamplingPlan(num_samples=num_samples, temperature=temperature)


def temperature_of(num_samples: Tensor, config: AllocationConfig) -> Tensor:
    """tau_x from k_x (eq. 9): (P,) int64 -> (P,) float64 in [min_temperature, max_temperature]."""
    samples = num_samples.to(torch.float64)
    if config.temperature_rule == "fixed":
        return torch.full_like(samples, config.fixed_temperature)
    if config.temperature_rule == "paper":
        share = samples / config.max_samples
    else:
        span = config.max_samples - config.min_samples
        share = (samples - config.min_samples) / span if span else torch.ones_like(samples)
    tau = config.min_temperature + share.clamp(0, 1) * (config.max_temperature - config.min_temperature)
    return tau.clamp(config.min_temperature, config.max_temperature)


def expected_samples(config: AllocationConfig) -> float:
    """The mean k_x that eq. 8 is expected to spend: ceil adds about half a sample per prompt."""
    extra = {"ceil": 0.5, "floor": -0.5}.get(config.rounding, 0.0)
    mean = (1 - config.elimination_ratio) * config.max_samples + (extra if config.elimination_ratio else 0.0)
    return min(max(mean, config.min_samples), config.max_samples)


def budget(num_prompts: int, config: AllocationConfig) -> int:
    """The number of samples eq. 8 sums to before rounding, clamped to what is possible."""
    exact = (1 - config.elimination_ratio) * config.max_samples * num_prompts
    return max(num_prompts * config.min_samples, math.floor(exact + 0.5))


def _check_capability(capability: Tensor) -> None:
    bad = ~torch.isfinite(capability) | (capability < 0)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"capability[{i}] is {float(capability[i])}; eq. 8 needs finite values of 0 or more. "
            'Map unbounded scores first: capability_map = "sigmoid_z".'
        )


def _unrounded(capability: Tensor, config: AllocationConfig) -> Tensor:
    """Eq. 8 before rounding and clamping, in float64 with a fixed order of summation."""
    top = float(capability.max()) if len(capability) else 0.0
    scaled = capability / top if top > 0 else torch.ones_like(capability)
    # 5e-324 / 1e-323 and the like lose all digits; what is left after scaling is a plain number in [0, 1]
    share = scaled / math.fsum(scaled.tolist())
    return config.max_samples * (1 - config.elimination_ratio * len(capability) * share)


def _by_capability(capability: Tensor, config: AllocationConfig) -> Tensor:
    if len(capability) == 0:
        return torch.zeros(0, dtype=torch.int64)
    raw = _unrounded(capability, config)
    if config.rounding == "largest_remainder":
        level = _water_level(raw, config, multiply=False)
        return _largest_remainder(level, torch.argsort(capability, stable=True), config)
    if config.rounding == "ceil":
        rounded = torch.ceil(raw - _ROUNDING_SLACK)
    elif config.rounding == "floor":
        rounded = torch.floor(raw + _ROUNDING_SLACK)
    else:
        rounded = torch.floor(raw + 0.5 + _ROUNDING_SLACK)
    return rounded.clamp(config.min_samples, config.max_samples).to(torch.int64)


def _evenly(total: int, num_prompts: int) -> Tensor:
    """``total`` samples over the prompts; the first ones of the (shuffled) batch get the remainder."""
    if num_prompts == 0:
        return torch.zeros(0, dtype=torch.int64)
    base, rest = divmod(total, num_prompts)
    return torch.tensor([base + (i < rest) for i in range(num_prompts)], dtype=torch.int64)


def _at_random(uniforms: Tensor, config: AllocationConfig) -> tuple[Tensor, Tensor]:
    """ESRL-Random: k uniform on {2m - k_max .. k_max} with m the mean that eq. 8 is expected to spend."""
    low = math.ceil(2 * expected_samples(config) - config.max_samples - _ROUNDING_SLACK)
    low = min(max(low, config.min_samples), config.max_samples)
    num_samples = low + torch.floor(uniforms[:, 0] * (config.max_samples - low + 1)).to(torch.int64)
    temperature = config.min_temperature + uniforms[:, 1] * (config.max_temperature - config.min_temperature)
    return num_samples, temperature


def _by_spread(reward_std: Tensor, config: AllocationConfig) -> Tensor:
    """Neyman allocation: k proportional to the recorded spread, within the hard budget of eq. 8."""
    if len(reward_std) == 0:
        return torch.zeros(0, dtype=torch.int64)
    known = torch.isfinite(reward_std)
    top = float(reward_std[known].max()) if bool(known.any()) else 0.0
    if top > 0:
        scaled = reward_std / top  # first, or the squares of 1e300 and 1e-300 are inf and 0
        pooled = float(scaled[known].square().mean().sqrt())
        spread = torch.where(known, scaled, pooled)
        order = torch.argsort(torch.where(known, reward_std, pooled * top), descending=True, stable=True)
    else:
        spread, order = torch.ones_like(reward_std), torch.arange(len(reward_std))
    return _largest_remainder(_water_level(spread, config, multiply=True), order, config)


def _water_level(values: Tensor, config: AllocationConfig, *, multiply: bool) -> Tensor:
    """Shift (or scale) the values until their clamped sum is the budget; found by bisection."""
    total = budget(len(values), config)
    # a scale of 0 or a shift of -inf gives the least possible sum, the upper end the greatest
    low, high = (0.0, 1.0) if multiply else (-float(values.max()), config.max_samples - float(values.min()))

    def fill(level: float) -> Tensor:
        moved = values * level if multiply else values + level
        return moved.clamp(config.min_samples, config.max_samples)

    while multiply and float(fill(high).sum()) < total and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:  # neighbours in floating point
            break
        low, high = (middle, high) if float(fill(middle).sum()) < total else (low, middle)
    return fill(high)


def _largest_remainder(values: Tensor, priority: Tensor, config: AllocationConfig) -> Tensor:
    """Round down, then give what is missing from the budget to the largest remainders.

    ``priority`` (P,) lists the prompts by who goes first in ties: values that differ in capability by less than
    floating point can tell would otherwise be served in the order of the batch, the more capable one before the other.
    """
    whole = torch.floor(values + _ROUNDING_SLACK)
    order = priority[torch.argsort((whole - values)[priority], stable=True)].tolist()
    samples = [int(x) for x in whole]
    missing = budget(len(values), config) - sum(samples)
    while missing > 0 and min(samples) < config.max_samples:
        for i in order:
            if missing and samples[i] < config.max_samples:
                samples[i] += 1
                missing -= 1
    return torch.tensor(samples, dtype=torch.int64)


def _without_highest(values: Tensor, config: AllocationConfig) -> Tensor:
    """Drop the floor(beta n) prompts of the highest values, never all; among equals the last of the batch goes."""
    num_samples = torch.full_like(values, config.max_samples, dtype=torch.int64)
    dropped = min(math.floor(config.elimination_ratio * len(values) + _ROUNDING_SLACK), len(values) - 1)
    order = torch.argsort(values, stable=True)
    num_samples[order[len(values) - max(dropped, 0) :]] = 0
    return num_samples
