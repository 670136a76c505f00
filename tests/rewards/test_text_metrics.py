"""The text metrics against sacreBLEU and rouge-score, which are the definition, and against numbers by hand."""

from __future__ import annotations

import json
import math
import random
import string
import subprocess
import sys
import time

import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from esrl.kernels import kernels, why_not
from esrl.rewards import rouge
from esrl.rewards.common import MAX_CACHED_CHARACTERS, ReferenceCache
from esrl.rewards.text import BLEU, MAX_CHARACTERS, ChrF, ExactMatch, RougeL

EXACT = 1e-9

REAL = [
    ("Two men are standing in front of a house.", "Two young men are standing outside near a large house."),
    ("Ein kleines Mädchen klettert in ein Spielhaus aus Holz.", "Ein kleines Mädchen klettert in ein Spielhaus."),
    ("A man in a blue shirt is standing on a ladder, cleaning a window.", "A man in a blue shirt cleans a window."),
    ("He said: \"It's 3.14, isn't it?\" - 1,000-fold.", "He said: \"It's 3.14 isn't it\" -- 1,000 fold"),
    ("the the the the the the the", "The cat is on the mat the"),
    ("I do n't know &quot;that&quot; &amp; this <skipped>", 'I don\'t know "that" & this'),
    ("state-of-the-\nart\nresults", "state-of-the-art results"),
]
ODD = [
    *[("", ""), ("", "word"), ("word", ""), ("   \t\n ", "word"), ("word", " \u00a0\u2003 "), ("word", "word")],
    *[("我爱自然语言处理。", "我喜欢自然语言处理"), ("我", "我"), ("يحب القطط", "يحب القطط السوداء")],
    *[
        ("🙂🙂🙃", "🙂🙃🙃"),
        ("👩‍👩‍👧 x", "👩‍👩‍👧 y"),
        ("...,,,", ",.,.,."),
        ("1.2.3,4-5", "1.2.3,4-6"),
        ("İstanbul K", "istanbul k"),
    ],
    *[
        ("a a a a a b", "a b a a"),
        ("a\x1cb\x85c", "a b c"),
        ("e\u0301te\u0301", "été"),
        ("\ud800 x", "x"),
        ("a.b,c", "a . b , c"),
    ],
]
PAIRS = REAL + ODD

alphabet = "abAB01 .,-'&;<>(/\n\tÄé中🙂\u00a0\u2028\x1c"
messy = st.text(alphabet, max_size=40) | st.text(max_size=30)
worded = st.lists(
    st.sampled_from(["a", "b", "the", "cat", "cats", "running", "x.", "3,5", "\n", "中"]), max_size=15
).map(" ".join)
texts = messy | worded


def long_pair() -> tuple[str, str]:
    draw = random.Random(1)
    words = [draw.choice(["der", "Hund", "läuft", "1.5", "schnell,", "über", "Wiese."]) for _ in range(1800)]
    changed = [draw.choice(words) if draw.random() < 0.2 else word for word in words]
    return " ".join(words)[:10_000], " ".join(changed)[:10_000]


# ---- by hand


def test_bleu_by_hand():
    # "the cat sat on a mat" / "the cat sat on the mat": 1-grams 5/6 (a is wrong), 2-grams the-cat, cat-sat, sat-on
    # 3/5, 3-grams 2/4, 4-grams the-cat-sat-on 1/3; equal lengths, so no brevity penalty.
    by_hand = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert BLEU().sentence_score("the cat sat on a mat", "the cat sat on the mat") == pytest.approx(by_hand, abs=1e-12)
    assert BLEU().statistics("the cat sat on a mat", "the cat sat on the mat") == [6, 6, 5, 3, 2, 1, 6, 5, 4, 3]


def test_bleu_smoothing_and_effective_order_by_hand():
    # "a b c d" / "a b x y": 2/4, 1/3, then 0/2 and 0/1, which count as (1/2)/2 and (1/4)/1.
    assert BLEU().sentence_score("a b c d", "a b x y") == pytest.approx(
        (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25, abs=1e-12
    )
    # "thank you" / "thank you .": 2/2 and 1/1, no longer n-grams; 2 tokens for 3: exp(1 - 3/2).
    assert BLEU().sentence_score("thank you", "thank you .") == pytest.approx(math.exp(-0.5), abs=1e-12)
    assert BLEU(effective_order=False).sentence_score("thank you", "thank you .") == 0.0


def test_rouge_l_by_hand():
    # "the cat on mat" (4) / "the cat sat on the mat" (6): all four in order, so P = 1, R = 4/6, F = 2 PR / (P + R).
    assert RougeL().sentence_score("The cat on mat!", "the cat sat on the mat") == pytest.approx(0.8, abs=1e-12)


def test_summary_rouge_l_by_hand():
    # Lin (2004), section 3.2: reference w1 w2 w3 w4 w5; candidates w1 w2 w6 w7 w8 and w1 w3 w8 w9 w5. The union of the
    # matches is w1 w2 w3 w5: R = 4/5, P = 4/10, F = 8/15.
    score = RougeL(summary_level=True).sentence_score("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    assert score == pytest.approx(8 / 15, abs=1e-12)


def test_chrf_by_hand():
    # "ab" / "abc" up to 2-grams: P = 2/2 and 1/1, R = 2/3 and 1/2, mean 1 and 7/12; F2 = 5 PR / (4 P + R) = 7/11.
    assert ChrF(char_order=2).sentence_score("ab", "abc") == pytest.approx(7 / 11, abs=1e-12)


def test_exact_match_by_hand():
    metric = ExactMatch()
    assert metric([" 42\n", "42.", "b"], reference=["42", "42", ["a", "b"]]) == [1.0, 0.0, 1.0]
    assert metric.corpus_score(np.array([3.0, 4.0])) == 75.0


# ---- equal to the references

BLEU_OPTIONS = [
    {},
    {"lowercase": True},
    {"smoothing": "floor"},
    {"smoothing": "floor", "smooth_value": 0.0},
    {"smoothing": "add-k"},
    {"smoothing": "add-k", "smooth_value": 0.5},
    {"smoothing": "none"},
    {"effective_order": False},
    *({"tokenize": name} for name in ("none", "zh", "intl", "char")),
]
CHRF_OPTIONS = [{}, {"word_order": 2}, {"lowercase": True}, {"whitespace": True}, {"char_order": 3, "beta": 1}]
ROUGE_OPTIONS = [{}, {"stemming": True}, {"summary_level": True}, {"stemming": True, "summary_level": True}]


def bleu_oracle(completion, references, *, smoothing="exp", effective_order=True, **options):
    options = {"smooth_method": smoothing, "use_effective_order": effective_order, **options}
    return sacrebleu.sentence_bleu(completion, references, **options).score / 100


def chrf_oracle(completion, references, **options):
    return sacrebleu.CHRF(**options).sentence_score(completion, references).score / 100


def rouge_oracle(completion, references, *, stemming=False, summary_level=False):
    kind = "rougeLsum" if summary_level else "rougeL"
    return RougeScorer([kind], use_stemmer=stemming).score_multi(references, completion)[kind].fmeasure


CASES = [
    *((BLEU, bleu_oracle, options) for options in BLEU_OPTIONS),
    *((ChrF, chrf_oracle, options) for options in CHRF_OPTIONS),
    *((RougeL, rouge_oracle, options) for options in ROUGE_OPTIONS),
]
case = pytest.mark.parametrize(
    ("metric", "oracle", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)


@case
def test_equals_the_reference_library(metric, oracle, options):
    ours = metric(**options)
    for completion, reference in [*PAIRS, *(pair[::-1] for pair in PAIRS)]:
        score = ours.sentence_score(completion, reference)
        assert score == pytest.approx(oracle(completion, [reference], **options), abs=EXACT), (completion, reference)
        assert 0.0 <= score <= 1.0


@case
@settings(max_examples=40, deadline=None)
@given(completion=texts, reference=texts, other=texts)
@example(completion="a.\n-b", reference="a .", other="")
def test_equals_the_reference_library_on_anything(metric, oracle, options, completion, reference, other):
    ours = metric(**options)
    one, both = ours.sentence_score(completion, reference), ours.sentence_score(completion, [reference, other])
    assert one == pytest.approx(oracle(completion, [reference], **options), abs=EXACT)
    assert both == pytest.approx(oracle(completion, [reference, other], **options), abs=EXACT)


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [(BLEU, bleu_oracle), (ChrF, chrf_oracle), (RougeL, rouge_oracle)],
    ids=["bleu", "chrf", "rouge"],
)
def test_equals_the_reference_library_on_long_text(metric, oracle):
    completion, reference = long_pair()
    assert metric().sentence_score(completion, reference) == pytest.approx(oracle(completion, [reference]), abs=EXACT)


@pytest.fixture(scope="module")
def native():
    found = kernels()
    if found is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    return found


def compiled_scores(native, completions: list[str], references: list[str]) -> list[float]:
    """By the compiled kernel, and surely by it."""
    scores = RougeL()._compiled(completions, references)
    assert scores is not None
    return scores


def test_compiled_rouge_l_is_the_single_scores(native):
    single = RougeL().sentence_score
    pairs = [
        *PAIRS,
        *(pair[::-1] for pair in PAIRS),
        *PAIRS[:3],
        *PAIRS[:3],
    ]  # references that come again, side by side too
    pairs = sorted(pairs, key=lambda pair: pair[1]) + pairs
    pairs += [
        long_pair(),
        ("a " * 64 + "b", "a " * 63 + "b a"),
        ("x " * 200, "x " * 128),
        ("\u212aelvin \u0130x", "kelvin ix"),
    ]
    completions, references = map(list, zip(*pairs, strict=True))
    assert compiled_scores(native, completions, references) == [single(*pair) for pair in pairs]
    assert RougeL()(completions, references) == [single(*pair) for pair in pairs]


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_compiled_rouge_l_is_the_single_scores_on_anything(native, pairs):
    completions, references = map(list, zip(*pairs, strict=True))
    expected = [RougeL().sentence_score(*pair) for pair in pairs]
    if any("\0" in text for text in completions + references):
        assert RougeL()._compiled(completions, references) is None
    else:
        assert compiled_scores(native, completions, references) == expected
    assert RougeL()(completions, references) == expected


def test_compiled_rouge_l_leaves_to_python_what_is_not_for_it(native):
    metric = RougeL()
    assert metric([], []) == []
    assert metric(["a b"], [["a", "a b"]]) == [1.0]
    assert metric(["a\0b"], ["a b"]) == [1.0]
    assert RougeL(tokenizer="unicode")(["да нет"], ["да"]) == [pytest.approx(2 / 3)]
    assert RougeL(stemming=True)(["running"], ["run"]) == [1.0]
    for completions, wanted in (
        ([3], "needs? strings"),
        (["x" * (MAX_CHARACTERS + 1)], "characters"),
        (["a", "b"], "1 references"),
    ):
        with pytest.raises(ValueError, match=wanted):
            metric(completions, ["a"])


def test_characters_that_become_ascii_in_lower_case():
    found = [chr(code) for code in range(128, 0x110000) if any(map(str.isascii, chr(code).lower()))]
    assert sorted(found) == sorted(rouge._ASCII_IN_LOWER_CASE)


def test_summary_rouge_l_of_many_lines():
    draw = random.Random(2)
    pick = lambda: "\n".join(" ".join(draw.choices("abcdefgh", k=draw.randrange(9))) for _ in range(12))  # noqa: E731
    for _ in range(10):
        completion, reference = pick(), pick()
        ours = RougeL(summary_level=True).sentence_score(completion, reference)
        assert ours == pytest.approx(rouge_oracle(completion, [reference], summary_level=True), abs=EXACT)


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [
        *((BLEU(**options), options) for options in BLEU_OPTIONS[:7]),
        *((ChrF(**options), options) for options in CHRF_OPTIONS),
    ],
    # not the object itself, whose text holds its address: parallel test processes must agree on names
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_corpus_scores_equal_sacrebleu_and_vectorise(metric, oracle):
    options = {{"smoothing": "smooth_method"}.get(name, name): value for name, value in oracle.items()}
    library = (sacrebleu.BLEU if metric.name == "bleu" else sacrebleu.CHRF)(**options)
    statistics = np.array([metric.statistics(*pair) for pair in PAIRS])
    draws = [np.arange(len(PAIRS)), *np.random.default_rng(3).integers(len(PAIRS), size=(40, 4)), np.array([7, 8, 9])]
    scores = metric.corpus_score(np.stack([statistics[draw].sum(0) for draw in draws]).reshape(6, 7, -1))
    assert scores.shape == (6, 7)
    for draw, score in zip(draws, scores.reshape(-1), strict=True):
        completions, references = zip(*(PAIRS[i] for i in draw), strict=True)
        assert score == pytest.approx(library.corpus_score(completions, [references]).score, abs=EXACT)
    assert metric.corpus_score(statistics.sum(0)) == pytest.approx(scores[0, 0], abs=EXACT)


def test_rouge_l_corpus_score_is_the_mean():
    metric = RougeL()
    # F-measures 0.8 (see above) and 1, mean 0.9
    sums = np.array(metric.statistics("the cat on mat", "the cat sat on the mat")) + metric.statistics("a", "a")
    assert metric.corpus_score(sums) == pytest.approx(90.0, abs=1e-12)


def test_signatures_are_those_of_sacrebleus_command(tmp_path):
    for name in ("completions", "references"):
        (tmp_path / name).write_text("ein Satz\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "references"), "-i", str(tmp_path / "completions")]
    printed = subprocess.run([*command, "-m", "bleu", "chrf"], capture_output=True, text=True, check=True).stdout
    assert [one["signature"] for one in json.loads(printed)] == [BLEU().signature, ChrF().signature]
    lowered = BLEU(lowercase=True, smoothing="floor", tokenize="zh").signature
    assert lowered == f"nrefs:1|case:lc|eff:no|tok:zh|smooth:floor[0.10]|version:{sacrebleu.__version__}"
    assert RougeL(stemming=True).signature.startswith(
        "nrefs:1|case:lc|stem:porter|tok:ascii|level:sentence|version:esrl"
    )


# ---- other scripts


def test_rouge_l_of_other_scripts():
    with pytest.raises(ValueError, match="rouge_l_unicode"):
        RougeL().check_reference("он читает книгу")
    for fine in ("", "42", "...", "читает book", "été"):
        RougeL().check_reference(fine)
    metric = RougeL(tokenizer="unicode")
    metric.check_reference("он читает книгу")
    # 2 of 3 words on both sides
    assert metric.sentence_score("Он читает газету", "он читает книгу") == pytest.approx(2 / 3, abs=1e-12)


# ---- use as a reward, errors, limits


@pytest.mark.parametrize("metric", [BLEU(), ChrF(), RougeL(), ExactMatch()], ids=lambda metric: metric.name)
def test_call_scores_row_by_row(metric):
    completions, references = map(list, zip(*REAL, strict=True))
    scores = metric(completions=completions, reference=references, source=references, trainer_state={})
    assert scores == [metric.sentence_score(*pair) for pair in REAL]
    assert len(metric.statistics(*REAL[0])) == metric.num_statistics
    with pytest.raises(ValueError, match="7 completions but 6 references"):
        metric(completions, references[1:])
    for wrong in (None, [], [None], 3):
        with pytest.raises(ValueError, match="reference is"):
            metric.sentence_score("a", wrong)
    with pytest.raises(ValueError, match="completion is None"):
        metric.sentence_score(None, "a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BLEU(tokenize="13b"), "tokenize is '13b'.*did you mean '13a'"),
        (lambda: BLEU(smoothing="exponential"), "smoothing is 'exponential'"),
        (lambda: BLEU(smoothing="floor", smooth_value=-1.0), "smooth_value is -1.0"),
        (lambda: ChrF(char_order=0), "char_order is 0"),
        (lambda: RougeL(tokenizer="latin"), "tokenizer is 'latin'"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_nltk_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    with pytest.raises(ValueError, match="stemming needs nltk"):
        RougeL(stemming=True)
    RougeL()


LONG_METRICS = [
    BLEU(),
    BLEU(tokenize="zh"),
    ChrF(word_order=2),
    RougeL(),
    RougeL(stemming=True),
    RougeL(summary_level=True),
]


@pytest.mark.parametrize("metric", LONG_METRICS, ids=lambda metric: metric.signature)
def test_long_text_takes_under_a_second_or_is_refused(metric):
    draw = random.Random(4)
    size = MAX_CHARACTERS
    longest = {
        "one word": "y" * size,
        "punctuation": ".," * (size // 2),
        "lines": "\n".join(f"a {draw.randrange(9999)}" for _ in range(size))[:size],
        "letters": "".join(draw.choices(string.ascii_letters + "  .", k=size)),
    }
    for name, text in longest.items():
        start = time.process_time()
        try:
            score = metric.sentence_score(text, text)
        except ValueError as error:
            assert metric.name == "rouge_l" and metric.summary_level and "takes too long" in str(error)
        else:
            assert score == pytest.approx(0.0 if metric.name == "rouge_l" and name == "punctuation" else 1.0), name
        assert time.process_time() - start < 1.0, name
    for completion, reference, role in (("a" * (size + 1), "a", "completion"), ("a", "a" * (size + 1), "reference")):
        with pytest.raises(ValueError, match=f"a {role} has 100001 characters, at most 100000"):
            metric.sentence_score(completion, reference)


def test_references_are_prepared_once_and_forgotten_in_the_end():
    prepared = []
    cache = ReferenceCache(lambda references: prepared.append(references) or references)
    assert cache("a") == cache("a") == ("a",)
    assert cache(["a", "b"]) == cache(("a", "b"))
    assert prepared == [("a",), ("a", "b")]
    for i in range(3):
        cache(str(i) * (MAX_CACHED_CHARACTERS // 2))
    cache("a")
    assert prepared[-1] == ("a",) and len(prepared) == 6
