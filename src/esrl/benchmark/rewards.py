"""The section ``rewards``: sentences scored per second, ours and the reference libraries', and whether they agree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from esrl.benchmark.measure import Meter, Row, installed, spread
from esrl.data.demo import make_examples
from esrl.rewards.text import BLEU, ChrF, RougeL

_SECONDS = 0.5
_SENTENCES = 400
_SAMPLES = 5  # of each reference, as in training: the reference's side is prepared once
_SUMMARY = 6  # sentences joined to the length of a news summary, which ROUGE-L is made for

Pair = tuple[str, str]
Score = Callable[[str, str], float]


def rewards(models: list[str], samples: tuple[int, ...] | None, meter: Meter) -> tuple[list[Row], list[Row]]:
    """Every metric on sentences, ROUGE-L also on summaries; one process, one thread, in turns."""
    rows, not_run = [], []
    for name, make in {"bleu": BLEU, "chrf": ChrF, "rouge_l": RougeL}.items():
        reference = _reference(name)
        if reference is None:
            not_run.append({"contestant": "rouge-score", "reason": "not installed; pip install 'esrl[bench]'"})
            continue
        for text, joined in {"sentence": 1, "summary": _SUMMARY}.items():
            if text == "summary" and name != "rouge_l":
                continue
            meter.progress(f"rewards: {name}, {text}")
            library, score = reference
            rows.append({"metric": name, "text": text, "reference": library} | _compare(make(), score, joined, meter))
    return rows, not_run


def _compare(ours: Any, theirs: Score, joined: int, meter: Meter) -> Row:
    pairs = _pairs(joined)
    completions, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    values = ours(completions, references)
    difference = max(abs(value - theirs(*pair)) for value, pair in zip(values, pairs, strict=True))
    own, other = [], []
    for _ in range(meter.repetitions):
        own.append(len(pairs) * _per_second(lambda: ours(completions, references)))
        other.append(len(pairs) * _per_second(lambda: [theirs(*pair) for pair in pairs]))
    return {
        "words": statistics.fmean(len(reference.split()) for reference in references),
        "sentences_per_second": spread(own),
        "reference_per_second": spread(other),
        "ratio": statistics.median(us / them for us, them in zip(own, other, strict=True)),
        "largest_difference": difference,
    }


def _per_second(work: Callable[[], Any]) -> float:
    """How often it can be done, in half a second: ROUGE-L has all pairs in 1 or 2 ms, which is the luck of a moment."""
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < _SECONDS:
        work()
        count += 1
    return count / seconds


def _pairs(joined: int) -> list[Pair]:
    """References of the built-in task; completions that share a part of them, five to a reference."""
    texts = [example.columns["reference"] for example in make_examples(_SENTENCES, 1, "train")]
    texts = [" ".join(texts[i : i + joined]) for i in range(0, len(texts), joined)]
    pairs = []
    for i, reference in enumerate(texts):
        words, others = reference.split(), texts[(i + 1) % len(texts)].split()
        for sample in range(_SAMPLES):
            cut = len(words) * sample // _SAMPLES
            pairs.append((" ".join(words[cut:] + others[:cut]), reference))
    return pairs


def _reference(metric: str) -> tuple[str, Score] | None:
    """The library that defines the metric, used as fast as it can be: one scorer for all sentences."""
    if metric == "rouge_l":
        if not installed("rouge_score"):
            return None
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"])
        return "rouge-score", lambda text, reference: rouge.score(reference, text)["rougeL"].fmeasure
    from sacrebleu.metrics import BLEU as SacreBLEU
    from sacrebleu.metrics import CHRF as SacreCHRF

    scorer = SacreBLEU(effective_order=True) if metric == "bleu" else SacreCHRF()
    return "sacreBLEU", lambda text, reference: scorer.sentence_score(text, [reference]).score / 100
