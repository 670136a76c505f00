"""Draws are functions of names: fixed for all time, independent of order, uniform."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from esrl.algorithm.streams import (
    permutation,
    plan_uniforms,
    sample_uniforms,
    seed_of,
    stream_key,
    stream_uniforms,
)

GOLDEN_KEY = 0xA7A2C7A535510CBFEEBAE14467BAF77A
GOLDEN = [0.6662140221878134, 0.20347474562117962, 0.8637334371361279, 0.9673318406259457]
GOLDEN_SAMPLES = [[0.3988327205427762, 0.20400035736626332], [0.003916418375349728, 0.44941402508098294]]
GOLDEN_PLAN = [[0.9878938158289509, 0.2650883380516388], [0.8211510148141213, 0.31424829925674647]]
GOLDEN_ORDER = [3, 9, 8, 5, 6, 4, 7, 2, 1, 0]
GOLDEN_SEED = 4239848633391137061


def philox(key: int, blocks: int) -> list[int]:
    """Philox4x64-10 as Salmon et al. (2011) print it, in plain integers; NumPy starts at counter 1."""
    word = 2**64 - 1
    values = []
    for block in range(1, blocks + 1):
        a, b, c, d = block, 0, 0, 0
        first, second = key & word, key >> 64
        for _ in range(10):
            product, other = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b, c, d = (other >> 64) ^ b ^ first, other & word, (product >> 64) ^ d ^ second, product & word
            first, second = (first + 0x9E3779B97F4A7C15) & word, (second + 0xBB67AE8584CAA73B) & word
        values += [a, b, c, d]
    return values


@pytest.mark.parametrize("name", [("golden", 1), ("sample", 7, 0, "a1b2", 19), ("", "ü", -1)])
def test_values_are_philox_of_the_hashed_name(name: tuple[object, ...]):
    expected = [(raw >> 11) / 2**53 for raw in philox(stream_key(*name), 3)]
    assert stream_uniforms(12, *name).tolist() == expected


def test_golden_values():
    # Recorded once. If this fails, every run with a fixed seed draws something else than it did: do not update
    # the numbers, restore the stream, or raise the checkpoint's format version so that old runs are not resumed.
    assert stream_key("golden", 1) == GOLDEN_KEY
    assert stream_uniforms(4, "golden", 1).tolist() == GOLDEN
    assert sample_uniforms(3, 2, ["x", "y"], [0, 5], 2).tolist() == GOLDEN_SAMPLES
    assert plan_uniforms(3, 2, ["x", "y"]).tolist() == GOLDEN_PLAN
    assert permutation(10, 3, 2) == GOLDEN_ORDER
    assert seed_of("stage two", 3, 2) == GOLDEN_SEED


def test_a_longer_draw_begins_with_the_shorter_one():
    long = stream_uniforms(101, "prefix", 5)
    assert all(stream_uniforms(n, "prefix", 5).tolist() == long[:n].tolist() for n in (0, 1, 3, 4, 5, 100))


def test_a_sample_draws_the_same_in_any_batch_and_order():
    examples, numbers = ["a", "a", "b", "c"], [0, 1, 0, 7]
    together = sample_uniforms(9, 4, examples, numbers, 6)
    for order in itertools.permutations(range(4)):
        shuffled = sample_uniforms(9, 4, [examples[i] for i in order], [numbers[i] for i in order], 6)
        assert torch.equal(shuffled, together[list(order)])
    alone = [sample_uniforms(9, 4, [example], [number], 6) for example, number in zip(examples, numbers, strict=True)]
    assert torch.equal(torch.cat(alone), together)
    plans = plan_uniforms(9, 4, ["a", "b", "c"])
    assert torch.equal(plan_uniforms(9, 4, ["c", "a"]), plans[[2, 0]])


def test_names_do_not_run_together():
    names = [(1, 11), (11, 1), (111,), (1, 1, 1), ("1 11",), (1, "1", "1", ""), ("", 111), ("plan", 1), ("sample", 1)]
    keys = {stream_key(*name) for name in names}
    assert len(keys) == len(names)
    assert stream_uniforms(1, 1, 11) != stream_uniforms(1, 11, 1)
    # seed, epoch, example and sample each matter
    base = sample_uniforms(1, 2, ["x"], [3], 4)
    others = [
        sample_uniforms(2, 1, ["x"], [3], 4),
        sample_uniforms(1, 3, ["x"], [3], 4),
        sample_uniforms(1, 2, ["y"], [3], 4),
        sample_uniforms(1, 2, ["x"], [4], 4),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_every_example_needs_its_sample_number():
    with pytest.raises(ValueError, match="zip"):
        sample_uniforms(1, 1, ["a", "b"], [0], 3)


def test_an_empty_batch_draws_nothing():
    assert sample_uniforms(1, 1, [], [], 5).shape == (0, 5)
    assert plan_uniforms(1, 1, []).shape == (0, 2)
    assert permutation(0, "x") == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniforms_are_uniform_and_independent_between_streams(seed: int):
    # deterministic, so a p-value above .001 is a fact about these streams, not luck of the day
    along = stream_uniforms(20_000, "uniform", seed)
    across = sample_uniforms(seed, 0, [f"id{i}" for i in range(4_000)], [i % 20 for i in range(4_000)], 3).numpy()
    for values in (along, across[:, 0], across[:, 2]):
        assert values.min() >= 0 and values.max() < 1
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    # values are multiples of 2**-53: every bit of the mantissa is used
    assert np.all(along * 2.0**53 == np.floor(along * 2.0**53))
    assert (along * 2.0**53 % 2).mean() == pytest.approx(0.5, abs=0.02)
    # neighbours within a stream, and first values of neighbouring streams, on a 10 x 10 grid
    for pairs in (along.reshape(-1, 2), np.stack([across[:-1, 0], across[1:, 0]], 1)[::2]):
        cells = np.histogram2d(*pairs.T, bins=10, range=[[0, 1], [0, 1]])[0].ravel()
        assert stats.chisquare(cells).pvalue > 1e-3


def test_permutations_are_fair():
    # 6 orders of 3, 3,000 times: 500 each
    orders = [tuple(permutation(3, "epoch", i)) for i in range(3_000)]
    counts = [orders.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 3_000 and stats.chisquare(counts).pvalue > 1e-3
    for size in (1, 2, 17, 1000):
        assert sorted(permutation(size, 5, 1)) == list(range(size))
    assert permutation(1000, 5, 1) != permutation(1000, 5, 2)


def test_seeds_fit_into_63_bits():
    seeds = {seed_of("dropout", i) for i in range(2_000)}
    assert len(seeds) == 2_000
    assert min(seeds) >= 0 and max(seeds) < 2**63
    assert torch.Generator().manual_seed(max(seeds)).initial_seed() == max(seeds)
