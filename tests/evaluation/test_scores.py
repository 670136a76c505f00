"""Corpus scores against sacreBLEU, and the bootstrap against sacreBLEU's and against numbers worked by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU as SacreBLEU
from sacrebleu.significance import PairedTest

from esrl.evaluation import scores
from esrl.evaluation.scores import metrics_by_name, paired_bootstrap, score_corpus

REFERENCES = [
    "A man in a blue shirt is standing on a ladder cleaning a window.",
    "Two young, White males are outside near many bushes.",
    "Several men in hard hats are operating a giant pulley system.",
    "A little girl climbing into a wooden playhouse.",
    "A man in green holds a guitar while the other man observes his shirt.",
    "A child in a pink dress is climbing up a set of stairs in an entry way.",
    "Some people are sitting at tables outside a café in the old town.",
    "Three dogs run across a green meadow.",
] * 8


def _noisy(seed: int, loss: float) -> list[str]:
    """The references with words lost and swapped; the more, the worse the system."""
    rng = random.Random(seed)
    texts = []
    for reference in REFERENCES:
        words = [word for word in reference.split() if rng.random() > loss] or ["."]
        if rng.random() < loss:
            words.reverse()
        texts.append(" ".join(words))
    return texts


GOOD, POOR = _noisy(1, 0.12), _noisy(2, 0.2)


def test_corpus_scores_equal_sacrebleu():
    found = score_corpus(metrics_by_name(["bleu", "chrf"]), GOOD, REFERENCES)
    assert list(found) == ["bleu", "chrf"]
    assert found["bleu"].score == pytest.approx(sacrebleu.corpus_bleu(GOOD, [REFERENCES]).score, abs=1e-9)
    assert found["chrf"].score == pytest.approx(sacrebleu.corpus_chrf(GOOD, [REFERENCES]).score, abs=1e-9)


def test_several_references_count_and_are_signed():
    both = list(zip(REFERENCES, POOR, strict=True))
    found = score_corpus(metrics_by_name(["bleu", "chrf"]), GOOD, both, num_resamples=10)
    assert found["bleu"].score == pytest.approx(sacrebleu.corpus_bleu(GOOD, [REFERENCES, POOR]).score, abs=1e-9)
    assert found["chrf"].score == pytest.approx(sacrebleu.corpus_chrf(GOOD, [REFERENCES, POOR]).score, abs=1e-9)
    assert found["bleu"].signature.startswith("nrefs:2|")
    mixed = [REFERENCES[0], *both[1:]]
    assert score_corpus(metrics_by_name(["bleu"]), GOOD, mixed)["bleu"].signature.startswith("nrefs:var|")


def test_exact_match_and_its_interval_worked_by_hand():
    # 3 of 4 match: 75. A resample has Binomial(4, 3/4) matches; P(0 matches) = 1/256, P(<= 1) = 13/256 = 5.1 % and
    # P(4) = 81/256 = 32 %: the 2.5 % and 97.5 % percentiles are 1 and 4 matches.
    [metric] = metrics_by_name(["exact_match"])
    found = score_corpus([metric], ["a", "b", "c", "x"], ["a", "b", "c", "d"], num_resamples=4000)["exact_match"]
    assert (found.score, found.low, found.high) == (75.0, 25.0, 100.0)


def test_paired_bootstrap_equals_sacrebleu():
    names = {"bleu": SacreBLEU(), "chrf": sacrebleu.metrics.CHRF()}
    # PairedTest's first system is the baseline; the p-value is symmetric in the two.
    _, theirs = PairedTest([("poor", POOR), ("good", GOOD)], names, [REFERENCES], test_type="bs", n_samples=500)()
    for metric, key in zip(metrics_by_name(["bleu", "chrf"]), ["BLEU", "chrF2"], strict=True):
        ours = paired_bootstrap(metric, GOOD, POOR, REFERENCES, num_resamples=500)
        other, score = theirs[key]
        assert ours.score == pytest.approx(score.score, abs=1e-9)
        assert ours.other_score == pytest.approx(other.score, abs=1e-9)
        # The same resamples from the same seed: apart from ties within float32, the count is the same.
        assert ours.p_value == pytest.approx(score.p_value, abs=2 / 501)


def test_a_doubtful_difference_agrees_within_monte_carlo_error():
    near = [*POOR[:52], *GOOD[52:]]
    _, theirs = PairedTest(
        [("near", near), ("poor", POOR)], {"bleu": SacreBLEU()}, [REFERENCES], test_type="bs", n_samples=500
    )()
    [metric] = metrics_by_name(["bleu"])
    expected = theirs["BLEU"][1].p_value
    ours = paired_bootstrap(metric, near, POOR, REFERENCES, num_resamples=2000, seed=7)
    assert 0.02 < expected < 0.6  # a doubtful case, or the test tests nothing
    # Standard error of a share of 500: sqrt(.25 / 500) = .022 at most; four of them.
    assert ours.p_value == pytest.approx(expected, abs=0.09)


def test_a_clear_difference_is_significant_and_its_interval_holds_it():
    [metric] = metrics_by_name(["chrf"])
    found = paired_bootstrap(metric, REFERENCES, POOR, REFERENCES)
    assert found.p_value == 1 / 1001  # no resample exceeds it
    assert 0 < found.low < found.difference < found.high
    assert found.difference == pytest.approx(found.score - found.other_score)


def test_turning_the_systems_round_turns_the_sign_only():
    [metric] = metrics_by_name(["bleu"])
    one, two = (paired_bootstrap(metric, *pair, REFERENCES, num_resamples=200) for pair in [(GOOD, POOR), (POOR, GOOD)])
    assert (two.difference, two.low, two.high) == pytest.approx((-one.difference, -one.high, -one.low))
    assert two.p_value == one.p_value


def test_equal_outputs_are_no_evidence():
    [metric] = metrics_by_name(["bleu"])
    found = paired_bootstrap(metric, GOOD, GOOD, REFERENCES, num_resamples=50)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


@settings(max_examples=30, deadline=None)
@given(num_segments=st.integers(1, 40), num_resamples=st.integers(1, 30), at_once=st.integers(1, 200))
def test_resamples_are_those_of_one_draw_however_they_are_cut(num_segments, num_resamples, at_once):
    whole = np.random.default_rng(5).choice(num_segments, size=(num_resamples, num_segments), replace=True)
    expected = np.stack([np.bincount(row, minlength=num_segments) for row in whole])
    kept, scores._WEIGHTS_AT_ONCE = scores._WEIGHTS_AT_ONCE, at_once
    try:
        found = np.concatenate(list(scores._weights(num_segments, num_resamples, 5)))
    finally:
        scores._WEIGHTS_AT_ONCE = kept
    np.testing.assert_array_equal(found, expected)


def test_lengths_must_agree():
    [metric] = metrics_by_name(["bleu"])
    with pytest.raises(ValueError, match="64 completions, 63 references"):
        score_corpus([metric], GOOD, REFERENCES[1:])
    with pytest.raises(ValueError, match="64 completions, 62 others, 64 references"):
        paired_bootstrap(metric, GOOD, POOR[2:], REFERENCES)
    with pytest.raises(ValueError, match="at least one segment"):
        score_corpus([metric], [], [])
    with pytest.raises(ValueError, match="num_resamples is 0"):
        paired_bootstrap(metric, GOOD, POOR, REFERENCES, num_resamples=0)


def test_metrics_by_name_suggests_the_nearest():
    assert [metric.name for metric in metrics_by_name(["rouge_l", "bleu"])] == ["rouge_l", "bleu"]
    with pytest.raises(ValueError, match="metric 'blue' is unknown; did you mean 'bleu'"):
        metrics_by_name(["blue"])
    with pytest.raises(ValueError, match="two metrics are called 'bleu'"):
        score_corpus(metrics_by_name(["bleu", "bleu"]), GOOD, REFERENCES)
