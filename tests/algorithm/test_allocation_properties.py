"""What holds of every plan, for any capabilities: zeros, ties, 1e300, denormals, sizes 1 to 200.

``ESRL_VECTORS=100000`` tries as many capability vectors (reliability goal R6); the default takes a few seconds.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from esrl.algorithm.allocation import AllocationConfig, allocate, budget

VECTORS = int(os.environ.get("ESRL_VECTORS", "1500"))
SPECIAL = [0.0, 5e-324, 1e-320, 2.2e-308, 1e-12, 0.1, 0.2, 0.3, 1 / 3, 0.5, 0.7, 1.0, 3.0, 1e12, 1e300, 1.7e308]


def vectors(share: float):
    """Examples of one property, as a share of all vectors."""
    return settings(
        max_examples=max(1, round(VECTORS * share)),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def random_vector(size: int, seed: int, kind: int) -> list[float]:
    """Many values are cheaper to make from a seed than to draw one by one."""
    generator = np.random.default_rng(seed)
    uniform = generator.random(size)
    if kind == 0:
        return uniform.tolist()
    if kind == 1:  # all magnitudes
        return (10.0 ** (600 * uniform - 320).clip(-323, 308)).tolist()
    if kind == 2:  # ties
        return (np.floor(uniform * 4) / 10).tolist()
    if kind == 3:  # a hair apart
        return (0.5 + np.floor(uniform * 8) * 2.0**-53).tolist()
    return generator.choice(SPECIAL, size).tolist()


small_vectors = st.lists(
    st.sampled_from(SPECIAL) | st.floats(0, 1.7e308, allow_subnormal=True) | st.floats(0, 1), min_size=1, max_size=8
)
large_vectors = st.builds(random_vector, st.integers(1, 200), st.integers(0, 2**32), st.integers(0, 4))
capabilities = (small_vectors | large_vectors).map(lambda values: torch.tensor(values, dtype=torch.float64))
ROUNDINGS = ["ceil", "floor", "nearest", "largest_remainder"]


@st.composite
def configs(draw: st.DrawFn, **fixed: st.SearchStrategy[str]) -> AllocationConfig:
    max_samples = draw(st.sampled_from([1, 2, 5, 10, 15, 20, 64]))
    low = draw(st.floats(0.05, 1))
    return AllocationConfig(
        max_samples=max_samples,
        min_samples=draw(st.just(1) | st.integers(1, max_samples)),
        elimination_ratio=draw(st.sampled_from([0.3, 0.0, 0.999999]) | st.floats(0, 0.99)),
        min_temperature=low,
        max_temperature=draw(st.sampled_from([low, 1.0, 1.7]).filter(lambda high: high >= low)),
        temperature_rule=draw(st.sampled_from(["paper", "span"])),
        **{name: draw(values) for name, values in fixed.items()},
    )


def draws_of(capability: Tensor) -> Tensor:
    generator = np.random.default_rng(len(capability))
    return torch.from_numpy(generator.choice([0.0, 0.25, 0.5, 0.999, 1 - 2.0**-53], (len(capability), 2)))


def check_bounds(capability: Tensor, config: AllocationConfig) -> None:
    # the capabilities double as recorded spreads, with some of them unknown
    spread = torch.where(torch.arange(len(capability)) % 3 == 1, math.nan, capability)
    plan = allocate(capability, config, uniforms=draws_of(capability), reward_std=spread)
    assert plan.num_samples.dtype == torch.int64
    assert plan.num_samples.shape == plan.temperature.shape == capability.shape
    assert config.min_samples <= int(plan.num_samples.min())
    assert int(plan.num_samples.max()) <= config.max_samples
    assert config.min_temperature <= float(plan.temperature.min())
    assert float(plan.temperature.max()) <= config.max_temperature


@vectors(0.3)
@given(
    capability=capabilities,
    config=configs(
        allocator=st.sampled_from(["esrl", "uniform", "uniform_budget", "random"]), rounding=st.sampled_from(ROUNDINGS)
    ),
)
def test_samples_and_temperatures_stay_within_bounds(capability: Tensor, config: AllocationConfig):
    check_bounds(capability, config)


@vectors(0.08)
@given(capability=capabilities, config=configs(allocator=st.just("variance"), rounding=st.sampled_from(ROUNDINGS)))
def test_variance_stays_within_bounds_and_meets_its_budget(capability: Tensor, config: AllocationConfig):
    check_bounds(capability, config)
    num_samples = allocate(capability, config, reward_std=capability).num_samples
    assert int(num_samples.sum()) == budget(len(capability), config)
    # more spread, never fewer samples
    in_order = num_samples[torch.argsort(capability, stable=True)]
    rising = torch.sort(capability).values
    assert bool(((in_order[1:] >= in_order[:-1]) | (rising[1:] == rising[:-1])).all())


@vectors(0.3)
@given(
    capability=capabilities,
    config=configs(rounding=st.sampled_from(ROUNDINGS), eliminate=st.sampled_from(["samples", "samples", "prompts"])),
)
def test_more_capability_never_gets_more(capability: Tensor, config: AllocationConfig):
    plan = allocate(capability, config)
    order = torch.argsort(capability, stable=True)
    num_samples, temperature, rising = plan.num_samples[order], plan.temperature[order], capability[order]
    distinct = rising[1:] > rising[:-1]
    assert bool((num_samples[1:] <= num_samples[:-1])[distinct].all())
    assert bool((temperature[1:] <= temperature[:-1])[distinct].all())
    step = (num_samples[1:] - num_samples[:-1]).abs()[~distinct]
    if config.eliminate == "prompts":
        kept = int((plan.num_samples == config.max_samples).sum())
        assert kept >= 1 and kept + int((plan.num_samples == 0).sum()) == len(capability)
    elif config.rounding == "largest_remainder":  # equals may have to share an indivisible rest
        assert bool((step <= 1).all())
        assert int(num_samples.sum()) == budget(len(capability), config)
    else:
        assert bool((step == 0).all())


@vectors(0.2)
@given(
    capability=capabilities,
    config=configs(rounding=st.sampled_from(["ceil", "floor", "nearest"])),
    scale=st.sampled_from([3.0, 0.1, 1e-9, 7e11, 2.0**-30]),
    seed=st.integers(0, 2**32),
)
def test_order_and_scale_do_not_matter(capability: Tensor, config: AllocationConfig, scale: float, seed: int):
    plan = allocate(capability, config)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(capability)))
    shuffled = allocate(capability[order], config)
    assert shuffled.num_samples.tolist() == plan.num_samples[order].tolist()
    assert shuffled.temperature.tolist() == plan.temperature[order].tolist()
    scaled = capability * scale
    exact = (capability == 0) | ((scaled > 1e-290) & (scaled < math.inf))
    if bool(exact.all()):
        assert allocate(scaled, config).num_samples.tolist() == plan.num_samples.tolist()


@vectors(0.04)
@given(capability=capabilities, config=configs(rounding=st.just("largest_remainder")), shift=st.integers(-30, 30))
def test_largest_remainder_ignores_a_power_of_two(capability: Tensor, config: AllocationConfig, shift: int):
    # exact in floating point, so that even ties between remainders stay what they are
    scaled = capability * 2.0**shift
    if bool(torch.isfinite(scaled).all()) and bool((scaled * 2.0**-shift == capability).all()):
        plan = allocate(capability, config)
        assert allocate(scaled, config).num_samples.tolist() == plan.num_samples.tolist()


@vectors(0.08)
@given(capability=capabilities, config=configs(rounding=st.sampled_from(ROUNDINGS)))
def test_uniform_budget_spends_as_much_as_eq_8(capability: Tensor, config: AllocationConfig):
    even = allocate(capability, replace(config, allocator="uniform_budget")).num_samples
    assert int(even.sum()) == int(allocate(capability, config).num_samples.sum())
    assert int(even.max()) - int(even.min()) <= 1
