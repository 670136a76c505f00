"""What a reward model's report says, by hand, by simulation, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from esrl.evaluation.reward_model import calibration, correlation, preference_report, sign_test, wilson_interval


def test_a_report_by_hand():
    # margins 2, -1, 0, 1; the chosen answer is longer, shorter, as long, shorter
    report = preference_report([2, 0, 1, 3], [0, 1, 1, 2], [10, 4, 5, 9], [2, 8, 5, 10])
    assert report.pairs == 4
    assert report.accuracy == (1 + 0 + 0.5 + 1) / 4
    assert report.margin == (2 - 1 + 0 + 1) / 4
    losses = [math.log1p(math.exp(-m)) for m in (2, -1, 0, 1)]
    assert report.loss == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert (report.chosen_shorter, report.accuracy_chosen_shorter) == (2, 0.5)
    assert (report.chosen_longer, report.accuracy_chosen_longer) == (1, 1.0)
    # as long up to a fifth: 5 to 5 and 9 to 10
    assert (report.matched, report.accuracy_matched) == (2, 0.75)
    assert report.length_accuracy == (1 + 0 + 0.5 + 0) / 4
    # they differ on the last pair alone, where the model wins: p = 2 * 1/2
    assert report.length_p_value == 1.0
    rewards, tokens = [2, 0, 1, 3, 0, 1, 1, 2], [10, 4, 5, 9, 2, 8, 5, 10]
    assert report.length_correlation == pytest.approx(stats.pearsonr(rewards, tokens).statistic, rel=1e-12)
    expected = stats.pearsonr([2, -1, 0, 1], [8, -4, 0, -1]).statistic
    assert report.margin_length_correlation == pytest.approx(expected, rel=1e-12)
    assert report.scores()["dev_accuracy"] == 0.625


def test_a_model_of_nothing_but_length_is_unmasked():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 100, (2, 400))
    better_longer = rng.random(400) < 0.7
    chosen = np.where(better_longer, tokens.max(0), tokens.min(0))
    rejected = np.where(better_longer, tokens.min(0), tokens.max(0))
    report = preference_report(chosen / 10, rejected / 10, chosen, rejected)
    assert report.accuracy == report.length_accuracy > 0.6 and report.length_p_value == 1.0
    assert report.accuracy_chosen_shorter == 0.0 and report.accuracy_chosen_longer == 1.0
    assert report.length_correlation == pytest.approx(1.0)
    assert report.margin_length_correlation == pytest.approx(1.0)


def test_calibration_by_hand():
    # confidences .9, .9 (one wrong), .55: bins [.9, .95) and [.55, .6)
    margin = np.log(np.array([9.0, 1 / 9.0, 0.551 / 0.449]))
    error, bins = calibration(margin * (1 + 1e-9))
    assert [(b.count, b.accuracy) for b in bins if b.count] == [(1, 1.0), (2, 0.5)]
    assert error == pytest.approx((2 * abs(0.9 - 0.5) + abs(0.551 - 1)) / 3, rel=1e-6)
    assert (bins[1].low, bins[1].high) == (0.55, 0.6) and bins[0].confidence is None


def test_the_error_is_that_of_bins_over_both_orders():
    margin = np.random.default_rng(2).normal(0.5, 1.5, 200)
    p = 1 / (1 + np.exp(-np.concatenate([margin, -margin])))
    outcome = np.repeat([1.0, 0.0], 200)
    place = np.minimum((p * 20).astype(int), 19)
    expected = sum(
        (place == b).mean() * abs(p[place == b].mean() - outcome[place == b].mean()) for b in set(place.tolist())
    )
    assert calibration(margin)[0] == pytest.approx(expected, rel=1e-9)


def test_a_model_that_draws_from_its_own_probabilities_is_calibrated():
    # 20,000 pairs in ten bins: an error of about sqrt(.25 / 2000) * .8 = .01 is chance
    rng = np.random.default_rng(3)
    margin = np.abs(rng.normal(0, 2, 20_000))
    right = rng.random(20_000) < 1 / (1 + np.exp(-margin))
    signed = np.where(right, margin, -margin)
    assert calibration(signed)[0] < 0.015
    assert calibration(signed * 3)[0] > 0.08  # three times too sure


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_sign_test_is_scipys(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_interval_is_scipys(successes, more):
    trials = successes + more
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_what_there_is_none_of_is_none():
    report = preference_report([1.0], [1.0], [3], [4])
    assert report.accuracy == 0.5 and report.accuracy_chosen_longer is None and report.length_correlation is None
    assert "dev_accuracy_chosen_longer" not in report.scores()
    assert correlation(np.array([1.0, 2.0]), np.array([3.0, 3.0])) is None
    extreme = preference_report([1000.0, -1000.0], [-1000.0, 1000.0], [1, 2], [2, 1])
    assert extreme.loss == 1000.0 and extreme.ece == 0.5


@pytest.mark.parametrize(
    ("chosen", "tokens", "message"), [([], [], "N >= 1"), ([1.0], [1, 2], "N >= 1"), ([math.nan], [1], "pair 0")]
)
def test_what_cannot_be_judged_is_refused(chosen, tokens, message):
    with pytest.raises(ValueError, match=message):
        preference_report(chosen, chosen, tokens, tokens)
