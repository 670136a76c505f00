"""Parsing of judges' replies: against the 320 recorded reviews, and by form."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from esrl.judge.parsing import Judgment, bracketed_scores, rating, two_scores, verdict

DATA = Path(__file__).parent / "data"

# GPT-4 wrote "Assistant 2: 4" in both, as it did for gpt35 on the same question, where 4 is recorded; here the record
# says 2. The first line of these reviews holds no scores, so they cannot have been recorded by reading it. Text and
# record contradict each other; the parser goes by the text.
RECORDED_OTHERWISE = {("bard", 70): ((10.0, 4.0), (10.0, 2.0)), ("llama-13b", 70): ((10.0, 4.0), (10.0, 2.0))}


@pytest.fixture(scope="module")
def reviews() -> list[dict[str, Any]]:
    with gzip.open(DATA / "vicuna80_reviews.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_parsed_scores_equal_the_recorded_ones_of_all_320_reviews(reviews):
    assert len(reviews) == 320
    different = {}
    for review in reviews:
        judgment = two_scores(review["review"])
        assert judgment is not None, review
        if judgment.scores != tuple(review["scores"]):
            different[review["model_1"], review["question_id"]] = (judgment.scores, tuple(review["scores"]))
    assert different == RECORDED_OTHERWISE
    for model, question in RECORDED_OTHERWISE:
        text = next(r["review"] for r in reviews if (r["model_1"], r["question_id"]) == (model, question))
        assert "\nAssistant 1: 10\nAssistant 2: 4\n" in text


def test_the_reviews_that_reason_first_are_read_from_their_end(reviews):
    """12 of the 320, all of mathematics: the first line is a sentence."""
    reasoned = [review for review in reviews if not review["review"][0].isdigit()]
    assert len(reasoned) == 12 and {review["question_id"] for review in reasoned} == {68, 69, 70}
    for review in reasoned:
        cut = review["review"].split("\n\n", 2)[0]  # what stands before the scores gives none
        assert two_scores(cut) is None


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9\nBoth did well.", (8, 9)),
        ("8.5, 9\nBoth.", (8.5, 9)),
        ("\n 7\t10 \n", (7, 10)),
        ("8 9 10\nthree", None),
        ("8\n9", None),
        ("In 2023, 8 9 were", None),
        ("0 9\nfor an empty answer", (0, 9)),
        ("8 11\nabove it", None),
        ("Assistant 1: 3/10\nAssistant 2: 4/10 (wrong)", (3, 4)),
        ("**Assistant 1:** 3\n**Assistant 2:** 4", (3, 4)),
        ("Assistant 1: 3\nAssistant 2: 4\nAfter another look:\nAssistant 1: 5\nAssistant 2: 6", (5, 6)),
        ("Assistant 1: 3\nnothing about the other", None),
        ("Assistant 1:\n1. Simplify\nAssistant 2:\n2. Divide", None),  # steps, not scores
        ("Assistant 1: 40 apples\nAssistant 2: 4 apples", None),
        ("Given points (2, 3) and (10, 4): no scores (yet)", None),
        ("The scores are (1, 5) for Assistant 1 and 2.", (1, 5)),
        ("", None),
    ],
)
def test_two_scores(text, scores):
    judgment = two_scores(text)
    assert (judgment and judgment.scores) == scores


@pytest.mark.parametrize(
    ("scores", "expected"), [("8 9", "second"), ("9 8.5", "first"), ("9 9", "tie"), ("9 8.9", "tie")]
)
def test_two_scores_make_a_verdict_with_a_tie_within_a_tenth(scores, expected):
    assert two_scores(scores).verdict == expected


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good. Rating: [[8]]", 8),
        ("Rating: [[8.5]]", 8.5),
        ("[[rating: 7]]", 7),
        ("**[[ 9/10 ]]**", 9),
        ('The format is "[[5]]". The answer begs for [[10]]. Rating: [[2]]', 2),  # the last one
        ("<think>maybe [[3]]</think>Rating: [[6]]", 6),
        ("<think>maybe [[3]]</think>I cannot say.", None),
        ("Good.\nRating: 8", 8),
        ("Good.\n**Score:** 8/10.", 8),
        ("Rating: 8\nbut then I went on", None),
        ("see [8] in the list", None),  # a citation
        ("[[11]]", None),
        ("[[0]]", 0),
        ("[[8]] was my first thought, but [[80]]", None),
        ("[[-3]]", None),
        ("Rating: [[", None),
        ("", None),
    ],
)
def test_rating(text, score):
    expected = None if score is None else Judgment(scores=(float(score),))
    assert rating(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A is better: [[A]]", "first"),
        ("[[B]]", "second"),
        ("a tie [[C]]", "tie"),
        ('Not "[[A]]" as Assistant A itself demands, but [[B]]', "second"),
        ("<think>[[A]]</think>\n[[B]]", "second"),
        ("My verdict: [A]", "first"),
        ("My verdict:\n[C].", "tie"),
        ("Assistant A is better.", None),
        ("[A] is the first, [B] the second one, and both are fine", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_verdict(text, expected):
    judgment = verdict(text)
    assert (judgment and judgment.verdict) == expected


def test_bracketed_scores():
    assert bracketed_scores("First [[1,2]], then [[8, 6.5]]") == Judgment(scores=(8.0, 6.5), verdict="first")
    assert bracketed_scores("[[8]]") is None
