"""Reward at matched length, on answers whose reward is known to come from length or not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esrl.evaluation.matched_length import matched_length


def test_worked_by_hand():
    # lengths 1: (2, 4) against (1); lengths 2: (5) against (1, 3); length 9 has no partner
    found = matched_length([2, 4, 5, 100], [1, 1, 2, 9], [1, 1, 3], [1, 2, 2])
    # both bins weigh 2/3; differences 3 - 1 = 2 and 5 - 2 = 3
    assert found.difference == pytest.approx(2.5)
    assert found.unmatched == pytest.approx(111 / 4 - 5 / 3)
    assert (found.length_difference, found.num_bins, found.matched_share) == (0.0, 2, 6 / 7)
    # squared deviations 2 (of 2, 4) and 2 (of 1, 3), 6 - 4 degrees of freedom, weights 4/3 in all
    assert found.standard_error == pytest.approx(math.sqrt(4 / 2 / (4 / 3)))


def test_a_gain_by_length_alone_vanishes_and_a_real_one_stays():
    rng = np.random.default_rng(0)
    short, long = rng.integers(10, 100, 4000), rng.integers(40, 160, 4000)
    noise, other_noise = rng.normal(0, 0.1, 4000), rng.normal(0, 0.1, 4000)
    by_length = matched_length(0.02 * long + noise, long, 0.02 * short + other_noise, short, num_bins=1000)
    assert by_length.unmatched > 0.8  # .02 * 45
    assert abs(by_length.difference) < 4 * by_length.standard_error < 0.02
    real = matched_length(0.02 * long + noise + 0.3, long, 0.02 * short + other_noise, short, num_bins=1000)
    assert real.difference == pytest.approx(by_length.difference + 0.3)


def test_wide_bins_say_what_length_they_leave():
    rng = np.random.default_rng(0)
    short, long = rng.integers(10, 100, 4000), rng.integers(40, 160, 4000)
    found = matched_length(long.tolist(), long.tolist(), short.tolist(), short.tolist(), num_bins=4)
    assert found.difference == pytest.approx(found.length_difference)
    assert 0 < found.length_difference < found.unmatched
    narrow = matched_length(long.tolist(), long.tolist(), short.tolist(), short.tolist(), num_bins=50)
    assert narrow.length_difference < found.length_difference / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1], [1.0], [2]), "no length is shared: answers of 1 to 1 tokens against 2 to 2"),
        (([], [], [1.0], [2]), "rewards"),
        (([1.0], [1], [1.0, 2.0], [2]), r"other_rewards: \(2,\) rewards for \(1,\) lengths"),
        (([float("nan")], [1], [1.0], [1]), "not all finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        matched_length(*arguments)


def test_one_answer_a_side_has_no_error():
    assert math.isnan(matched_length([1.0], [5], [0.0], [5]).standard_error)
