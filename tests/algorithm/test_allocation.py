"""Eq. 8 and eq. 9 against numbers worked by hand (method.md, section 2)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from esrl.algorithm.allocation import AllocationConfig, allocate, budget, expected_samples, temperature_of
from esrl.algorithm.streams import plan_uniforms
from esrl.types import SamplingPlan

NAN = math.nan
ONE_EASY = [1.0] + [0.0] * 31


def plan(capability: list[float], *, spread: list[float] | None = None, **settings: Any) -> SamplingPlan:
    return allocate(
        torch.tensor(capability, dtype=torch.float64),
        AllocationConfig(**settings),
        reward_std=None if spread is None else torch.tensor(spread, dtype=torch.float64),
    )


def samples(capability: list[float], **settings: Any) -> list[int]:
    return plan(capability, **settings).num_samples.tolist()


def test_worked_example():
    # share (.2, .8); 10 - .3 * 2 * 10 * share = 10 - 6 * share = (8.8, 5.2); tau = .6 + k * .4 / 10
    result = plan([0.1, 0.4], max_samples=10)
    assert result.num_samples.tolist() == [9, 6]
    assert result.temperature.tolist() == pytest.approx([0.96, 0.84], abs=1e-15)


def test_one_easy_prompt_among_zeros_keeps_one_sample():
    # easy: 20 - .3 * 32 * 20 * 1 = -172, clamped to 1; the others: 20 - 0; tau = .6 + .4 / 20 and 1
    result = plan(ONE_EASY)
    assert result.num_samples.tolist() == [1] + [20] * 31
    assert result.temperature.tolist() == pytest.approx([0.62] + [1.0] * 31, abs=1e-15)


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_sum_zero_means_equally_capable(size: int):
    # (1 - .3) * 20 = 14;  .7 * 5 = 3.5 -> 4
    assert samples([0.0] * size) == [14] * size
    assert samples([0.0] * size, max_samples=5) == [4] * size


def test_clamps_begin_at_mean_over_beta():
    # Cap (10, 0, 0, 0), mean 2.5, beta .25: 10 = mean / beta, 20 - .25 * 4 * 20 * 1 = 0 -> 1; min_samples 3 -> 3
    assert samples([10, 0, 0, 0], elimination_ratio=0.25) == [1, 20, 20, 20]
    assert samples([10, 0, 0, 0], elimination_ratio=0.25, min_samples=3) == [3, 20, 20, 20]


def test_beta_zero_eliminates_nothing():
    assert samples([0.1, 0.9, 0.0], elimination_ratio=0.0, max_samples=7) == [7, 7, 7]


@pytest.mark.parametrize(
    ("rounding", "two", "three"),
    [
        # (.1, .4): (8.8, 5.2). (.2, .3, .5): 10 - 9 * share = (8.2, 7.3, 5.5), budget 21 and floor 20:
        # the largest remainder, .5, gets the missing one
        ("ceil", [9, 6], [9, 8, 6]),
        ("floor", [8, 5], [8, 7, 5]),
        ("nearest", [9, 5], [8, 7, 6]),
        ("largest_remainder", [9, 5], [8, 7, 6]),
    ],
)
def test_roundings(rounding: str, two: list[int], three: list[int]):
    assert samples([0.1, 0.4], max_samples=10, rounding=rounding) == two
    assert samples([0.2, 0.3, 0.5], max_samples=10, rounding=rounding) == three


def test_nearest_rounds_halves_up():
    # .9 * 5 = 4.5 and .9 * 15 = 13.5: more samples rather than fewer, not to the even number
    assert samples([0.3, 0.3], max_samples=5, elimination_ratio=0.1, rounding="nearest") == [5, 5]
    assert samples([0.3, 0.3], max_samples=15, elimination_ratio=0.1, rounding="nearest") == [14, 14]


def test_largest_remainder_shares_out_what_the_clamp_took():
    # budget .7 * 20 * 32 = 448. The easy prompt keeps 1, 447 over 31 are 14.42 each: 31 * 14 = 434, 13 to the first
    assert samples(ONE_EASY, rounding="largest_remainder") == [1] + [15] * 13 + [14] * 18


def test_the_indivisible_rest_goes_to_the_less_capable():
    # eq. 8 gives the last two 2 - 1.8 * 1e-300 and 2 - 0, the same float64; budget 4, 1 to the first, 3 for the two
    capability = [1.0, 1e-300, 0.0]
    assert samples(capability, max_samples=2, rounding="largest_remainder") == [1, 1, 2]
    # the same for spreads so small that both are 0 beside the largest: budget .5 * 9 * 3 = 13.5 -> 14 = 9 + 5
    spread = [1e300, 1e-300, 2e-300]
    settings: dict[str, Any] = {"max_samples": 9, "elimination_ratio": 0.5, "allocator": "variance"}
    assert samples([0.0] * 3, spread=spread, **settings) == [9, 2, 3]


@pytest.mark.parametrize("max_samples", [1, 5, 10, 15, 20])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_largest_remainder_meets_the_budget(max_samples: int, size: int):
    # .7 k n rounded half up, never below one sample each: n = 7, k = 5 gives 24.5 -> 25
    expected = max(size, (7 * max_samples * size + 5) // 10)
    for capability in ([i**3 + 0.1 for i in range(size)], [1.0] + [0.0] * (size - 1), [0.3] * size):
        assert sum(samples(capability, max_samples=max_samples, rounding="largest_remainder")) == expected
    assert budget(size, AllocationConfig(max_samples=max_samples)) == expected


@pytest.mark.parametrize(
    ("max_samples", "share"), [(1, 1.0), (5, 4 / 5), (10, 7.5 / 10), (15, 11 / 15), (20, 14.5 / 20)]
)
def test_ceil_keeps_half_a_sample_more_than_the_budget(max_samples: int, share: float):
    # Capabilities evenly over (.5, 1) have mean .75, so eq. 8 before rounding is even over k (1 - .3 * (.67 .. 1.33))
    # = k * (.6 .. .8): (3, 4) -> 4, (6, 8) -> 7.5, (9, 12) -> 11, (12, 16) -> 14.5 on average: 1.00 .80 .75 .73 .725
    size = 6000
    kept = samples([0.5 + (i + 0.5) / (2 * size) for i in range(size)], max_samples=max_samples)
    assert sum(kept) / size / max_samples == pytest.approx(share, abs=1e-12)
    assert expected_samples(AllocationConfig(max_samples=max_samples)) == pytest.approx(share * max_samples, abs=1e-12)


@pytest.mark.parametrize("rounding", ["ceil", "floor", "nearest"])
@pytest.mark.parametrize(("value", "dtype"), [(0.1, torch.float32), (0.37, torch.float64), (1e300, torch.float64)])
def test_equal_capabilities_round_the_same_in_every_batch_size(rounding: str, value: float, dtype: torch.dtype):
    # 20 - .3 * 20 is exactly 14, whatever n; for 10: 7
    for max_samples, expected in ((20, 14), (10, 7)):
        config = AllocationConfig(max_samples=max_samples, rounding=rounding)
        every = rounding == "ceil" and max_samples == 20 and value == 0.1  # the others in steps, for time
        for size in range(1, 1537, 1 if every else 17):
            num_samples = allocate(torch.full((size,), value, dtype=dtype), config).num_samples
            assert bool((num_samples == expected).all()), size


def test_the_formula_as_printed_is_off_by_one_in_float32():
    # why the slack, the scaling and float64 are there: the same 1,536 batches, computed as eq. 8 is written
    off = 0
    for size in range(1, 1537):
        capability = torch.full((size,), 0.1)
        off += bool((torch.ceil(20 - 0.3 * size * 20 * capability / capability.sum()) != 14).any())
    assert off > 50


@pytest.mark.parametrize(("max_samples", "tau"), [(20, 0.62), (10, 0.64), (5, 0.68), (1, 1.0)])
def test_paper_temperature_never_reaches_the_minimum(max_samples: int, tau: float):
    # .6 + 1 * .4 / k_max, the lowest there is
    config = AllocationConfig(max_samples=max_samples)
    assert temperature_of(torch.tensor([1, max_samples]), config).tolist() == pytest.approx([tau, 1.0], abs=1e-15)


def test_span_and_fixed_temperature():
    # span: (k - 1) / (5 - 1) of the way from .6 to 1; (k - 3) / (5 - 3) with min_samples 3
    span = AllocationConfig(max_samples=5, temperature_rule="span")
    assert temperature_of(torch.tensor([1, 2, 3, 5]), span).tolist() == pytest.approx([0.6, 0.7, 0.8, 1.0], abs=1e-15)
    span = AllocationConfig(max_samples=5, min_samples=3, temperature_rule="span")
    assert temperature_of(torch.tensor([3, 4, 5]), span).tolist() == pytest.approx([0.6, 0.8, 1.0], abs=1e-15)
    # nothing to span at k_max = 1: as hot as eq. 9
    assert temperature_of(torch.tensor([1]), AllocationConfig(max_samples=1, temperature_rule="span")).tolist() == [1]
    fixed = AllocationConfig(temperature_rule="fixed", fixed_temperature=0.95)
    assert plan(ONE_EASY, temperature_rule="fixed", fixed_temperature=0.95).temperature.tolist() == [0.95] * 32
    assert temperature_of(torch.tensor([1, 20]), fixed).tolist() == [0.95, 0.95]


def test_uniform_takes_everything():
    result = plan([0.1, 0.9], allocator="uniform", max_samples=7)
    assert (result.num_samples.tolist(), result.temperature.tolist()) == ([7, 7], [1.0, 1.0])


def test_uniform_budget_spends_what_eq_8_spends():
    # 9 + 6 = 15 over 2; 1 + 31 * 20 = 621 = 19 * 32 + 13
    assert samples([0.1, 0.4], allocator="uniform_budget", max_samples=10) == [8, 7]
    assert samples(ONE_EASY, allocator="uniform_budget") == [20] * 13 + [19] * 19
    for rounding in ("ceil", "floor", "nearest", "largest_remainder"):
        capability = [0.03 * i**2 for i in range(31)]
        spent = sum(samples(capability, rounding=rounding))
        assert sum(samples(capability, rounding=rounding, allocator="uniform_budget")) == spent


@pytest.mark.parametrize(("max_samples", "low"), [(1, 1), (5, 3), (10, 5), (15, 7), (20, 9)])
def test_random_draws_from_the_range_around_what_eq_8_spends(max_samples: int, low: int):
    # m = 4, 7.5, 11, 14.5: 2m - k_max = 3, 5, 7, 9. Even uniforms hit every k equally often, the ends included
    size = 12 * (max_samples - low + 1)
    draws = torch.tensor([[(i + 0.5) / size, i / (size - 1)] for i in range(size)], dtype=torch.float64)
    result = allocate(torch.zeros(size), AllocationConfig(allocator="random", max_samples=max_samples), uniforms=draws)
    assert result.num_samples.tolist() == sorted(list(range(low, max_samples + 1)) * 12)
    # tau ~ U[.6, 1]: .6 + .4 u, whatever k is
    assert result.temperature.tolist() == pytest.approx([0.6 + 0.4 * i / (size - 1) for i in range(size)], abs=1e-15)
    ends = torch.tensor([[0.0, 0.0], [1 - 2.0**-53, 0.0]], dtype=torch.float64)
    extreme = allocate(torch.zeros(2), AllocationConfig(allocator="random", max_samples=max_samples), uniforms=ends)
    assert extreme.num_samples.tolist() == [low, max_samples]


def test_random_with_a_fixed_temperature():
    config = AllocationConfig(allocator="random", temperature_rule="fixed", fixed_temperature=0.9)
    uniforms = torch.full((3, 2), 0.25, dtype=torch.float64)
    # 9 + floor(.25 * 12) = 12
    result = allocate(torch.zeros(3), config, uniforms=uniforms)
    assert (result.num_samples.tolist(), result.temperature.tolist()) == ([12] * 3, [0.9] * 3)


@pytest.mark.parametrize(
    ("spread", "settings", "expected"),
    [
        # budget .7 * 10 * 3 = 21 in shares 1 : 2 : 4 is (3, 6, 12); 12 > 10, and 11 over 1 : 2 are (3.67, 7.33)
        ([1, 2, 4], {"max_samples": 10}, [4, 7, 10]),
        # the unknown one takes the pooled spread sqrt((49 + 1) / 2) = 5 (the plain mean would be 4):
        # budget .5 * 26 * 3 = 39 in shares 7 : 1 : 5
        ([7, 1, NAN], {"max_samples": 26, "elimination_ratio": 0.5}, [21, 3, 15]),
        # the same with spreads whose squares do not exist in float64
        ([7e300, 1e300, NAN], {"max_samples": 26, "elimination_ratio": 0.5}, [21, 3, 15]),
        ([7e-300, 1e-300, NAN], {"max_samples": 26, "elimination_ratio": 0.5}, [21, 3, 15]),
        ([0, 0], {"max_samples": 10}, [7, 7]),
        ([NAN, NAN], {"max_samples": 10}, [7, 7]),
        ([0, NAN], {"max_samples": 10}, [7, 7]),
        # no spread, one sample: 14 = 13 + 1
        ([0, 3], {"max_samples": 14, "elimination_ratio": 0.5}, [1, 13]),
        # the budget is hard: 10 at most for the first, the other 11 go round the rest
        ([1, 0, 0], {"max_samples": 10}, [10, 6, 5]),
    ],
)
def test_variance_is_neyman_allocation(spread: list[float], settings: dict[str, Any], expected: list[int]):
    assert samples([0.0] * len(spread), allocator="variance", spread=spread, **settings) == expected


def test_eliminate_prompts_drops_the_most_capable():
    # floor(.3 * 10) = 3 of 10; .9 at indices 1, 4, 7, 8 tie, and the last ones go
    capability = [0.1, 0.9, 0.2, 0.3, 0.9, 0.0, 0.5, 0.9, 0.9, 0.4]
    result = plan(capability, eliminate="prompts", max_samples=1)
    assert result.num_samples.tolist() == [1, 1, 1, 1, 0, 1, 1, 0, 0, 1]
    assert result.temperature[result.num_samples == 1].tolist() == [1.0] * 7


@pytest.mark.parametrize(
    ("size", "ratio", "dropped"),
    # floor(.9) = 0; floor(1.2) = 1; .7 * 10 is 7.000000000000001 or less, 7 either way; .29 * 100 = 28.999999999999996;
    # 2 * .95 = 1.9; the last two would round to all of them
    [(3, 0.3, 0), (4, 0.3, 1), (10, 0.7, 7), (100, 0.29, 29), (2, 0.95, 1), (1, 1 - 1e-12, 0), (10, 1 - 1e-12, 9)],
)
def test_eliminate_prompts_drops_floor_beta_n_and_never_all(size: int, ratio: float, dropped: int):
    kept = samples(
        [float(i) for i in range(size)], eliminate="prompts", elimination_ratio=ratio, min_samples=2, max_samples=4
    )
    assert kept == [4] * (size - dropped) + [0] * dropped


def test_random_elimination_drops_as_many_by_its_own_numbers():
    # floor(.3 * 4) = 1 of 4: the one with the largest uniform number, whatever the capabilities are
    uniforms = torch.tensor([[0.1, 0.0], [0.9, 0.0], [0.5, 0.0], [0.7, 0.0]], dtype=torch.float64)
    config = AllocationConfig(allocator="random", eliminate="prompts", max_samples=2)
    result = allocate(torch.tensor([0.0, 0.1, 0.2, 0.9]), config, uniforms=uniforms)
    assert result.num_samples.tolist() == [2, 0, 2, 2]
    # eq. 9 as for the prompts that capability would keep
    assert result.temperature[result.num_samples > 0].tolist() == [1.0] * 3
    assert not config.needs_capability


@pytest.mark.parametrize("allocator", ["uniform_budget", "variance"])
def test_elimination_of_prompts_refuses_an_allocator_it_would_override(allocator: str):
    with pytest.raises(ValueError, match=f"so allocator .{allocator}. has no say"):
        AllocationConfig(allocator=allocator, eliminate="prompts")


@pytest.mark.parametrize("eliminate", ["samples", "prompts"])
@pytest.mark.parametrize(
    ("capability", "named"),
    [
        ([0.2, -0.5, -1.0], r"capability\[1\] is -0.5"),
        ([0.2, 0.3, NAN], r"capability\[2\] is nan"),
        ([math.inf, 0.3], r"capability\[0\] is inf"),
        # the paper leaves these four open: inverted, the weakest would get least
        ([-2.0, -1.0, -0.5, -0.1], r"capability\[0\] is -2.0"),
    ],
)
def test_what_eq_8_cannot_take_is_an_error_with_index_and_remedy(capability: list[float], named: str, eliminate: str):
    with pytest.raises(ValueError, match=named + '.*capability_map = "sigmoid_z"'):
        plan(capability, eliminate=eliminate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocator": "best"}, "allocator is 'best'; choose one of esrl, uniform"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"temperature_rule": "hot"}, "temperature_rule is 'hot'"),
        ({"eliminate": "all"}, "eliminate is 'all'"),
        ({"min_samples": 0}, "min_samples is 0"),
        ({"min_samples": 3, "max_samples": 2}, "min_samples is 3 and max_samples 2"),
        ({"elimination_ratio": 1.0}, "elimination_ratio is 1.0"),
        ({"elimination_ratio": -0.1}, "elimination_ratio is -0.1"),
        ({"elimination_ratio": NAN}, "elimination_ratio is nan"),
        ({"min_temperature": 0.0}, "min_temperature is 0.0"),
        ({"min_temperature": 1.1}, "min_temperature is 1.1 and max_temperature 1.0"),
        ({"max_temperature": math.inf}, "max_temperature inf"),
        ({"fixed_temperature": 0.0}, "fixed_temperature is 0.0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        AllocationConfig(**settings)


def test_needs_capability():
    needs = {name: AllocationConfig(allocator=name).needs_capability for name in ("esrl", "uniform_budget")}
    idle = {name: AllocationConfig(allocator=name).needs_capability for name in ("uniform", "random", "variance")}
    assert all(needs.values()) and not any(idle.values())
    assert AllocationConfig(allocator="uniform", eliminate="prompts").needs_capability


@pytest.mark.parametrize(
    ("allocator", "eliminate"),
    [
        *((name, "samples") for name in ("esrl", "uniform", "uniform_budget", "random", "variance")),
        *((name, "prompts") for name in ("esrl", "uniform", "random")),
    ],
)
def test_a_batch_without_prompts_has_an_empty_plan(allocator: str, eliminate: str):
    for rounding in ("ceil", "largest_remainder"):
        config = AllocationConfig(allocator=allocator, eliminate=eliminate, rounding=rounding)
        result = allocate(torch.zeros(0), config, uniforms=plan_uniforms(1, 0, []), reward_std=torch.zeros(0))
        assert (result.num_samples.tolist(), result.temperature.tolist()) == ([], [])
        assert (result.num_samples.dtype, result.temperature.dtype) == (torch.int64, torch.float64)
