"""From judgments to totals and wins, and what these are worth: intervals by question, bias of position and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esrl.judge.inputs import Question, System
from esrl.judge.parsing import HIGHEST, TIE, Judgment

CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 4_000_000  # resamples x questions held at a time: 32 MB

Row = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Resampling of questions, the same resamples for everything that is asked of it."""

    num_resamples: int = 10_000
    seed: int = 1

    def sums(self, values: Array) -> Array:
        """(num_resamples, M): the column sums of as many rows of ``values`` (N, M), drawn with replacement."""
        rng = np.random.default_rng(self.seed)
        num_rows = len(values)
        block = max(1, _DRAWN_AT_ONCE // num_rows)
        parts = []
        for start in range(0, self.num_resamples, block):
            count = min(block, self.num_resamples - start)
            drawn = rng.integers(0, num_rows, size=(count, num_rows)) + np.arange(count)[:, None] * num_rows
            weights = np.bincount(drawn.ravel(), minlength=count * num_rows).reshape(count, num_rows)
            parts.append(weights.astype(np.float64) @ values)
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One question's judgments of a pair: ``forward`` with the first system's answer shown first, ``backward`` with the
    second's; None where a reply is missing or holds no score. Without a swap there is only ``forward``."""

    forward: Judgment | None
    backward: Judgment | None = None


def rated(system: System, questions: Sequence[Question], scores: Sequence[float | None], bootstrap: Bootstrap) -> Row:
    """A system's total as in the paper's Table 3: the sum of its ratings over the questions.

    Args:
        scores: (N,) its rating for each question, None where there is none; those are left out and counted.

    Returns:
        ``total`` with its interval ``low``, ``high`` and the most it could be, ``of``; ``mean``; ``judged``;
        ``unjudged``; ``mean_words`` of its answers; ``categories``.
    """
    known = np.array([score for score in scores if score is not None], dtype=np.float64)
    categories: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        if score is not None:
            categories.setdefault(question.category or "all", []).append(score)
    return {
        "name": system.name,
        "total": _sum(known),
        **_interval(bootstrap.sums(known[:, None])[:, 0] if len(known) else None),
        "of": HIGHEST * len(known),
        "mean": _sum(known) / len(known) if len(known) else None,
        "judged": len(known),
        "unjudged": len(scores) - len(known),
        "mean_words": sum(len(answer.split()) for answer in system.answers) / len(system.answers),
        "categories": {
            name: {"judged": len(values), "total": float(sum(values)), "mean": float(sum(values)) / len(values)}
            for name, values in sorted(categories.items())
        },
    }


def compared(first: Sequence[float | None], second: Sequence[float | None], bootstrap: Bootstrap) -> Row:
    """Two systems' scores, question by question, over the questions where both have one.

    Returns:
        ``questions``; ``difference`` of the totals (first less second) with its interval; ``p_value``, two-sided, the
        share of resamples whose difference lies as far from the observed one as that lies from 0.
    """
    pairs = np.array([(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None])
    if not len(pairs):
        return {"questions": 0, "difference": None, "low": None, "high": None, "p_value": None}
    gaps = pairs[:, 0] - pairs[:, 1]
    difference = _sum(gaps)
    drawn = bootstrap.sums(gaps[:, None])[:, 0]
    beyond = int(np.sum(np.abs(drawn - difference) >= abs(difference) - 1e-9))
    p_value = (beyond + 1) / (bootstrap.num_resamples + 1)
    return {"questions": len(pairs), "difference": difference, **_interval(drawn), "p_value": min(1.0, p_value)}


def outcomes_of_scores(first: Sequence[float | None], second: Sequence[float | None]) -> list[float | None]:
    """1 where the first system won, -1 where the second did, 0 for a tie (at most ``TIE`` apart), None if unknown."""
    return [
        None if a is None or b is None else 0.0 if abs(a - b) <= TIE else float(np.sign(a - b))
        for a, b in zip(first, second, strict=True)
    ]


def outcome_of_round(played: Round, swapped: bool) -> float | None:
    """1, 0 or -1 as above. Verdicts of the two orders that do not agree are a tie; one that is missing leaves none."""
    values = [_signed(played.forward)]
    if swapped:
        turned = _signed(played.backward)
        values.append(None if turned is None else -turned)
    if None in values:
        return None
    return values[0] if len(set(values)) == 1 else 0.0


def scores_of_rounds(rounds: Sequence[Round], swapped: bool) -> tuple[list[float | None], list[float | None]] | None:
    """Each system's score for each question, the mean over both orders; None if the template asks for no scores."""
    judgments = [judgment for played in rounds for judgment in (played.forward, played.backward) if judgment]
    if not judgments or any(len(judgment.scores) != 2 for judgment in judgments):
        return None
    first: list[float | None] = []
    second: list[float | None] = []
    for played in rounds:
        pairs = [played.forward.scores if played.forward else None]
        if swapped:
            pairs.append(played.backward.scores[::-1] if played.backward else None)
        known = [pair for pair in pairs if pair is not None]
        whole = len(known) == len(pairs)
        first.append(sum(pair[0] for pair in known) / len(known) if whole else None)
        second.append(sum(pair[1] for pair in known) / len(known) if whole else None)
    return first, second


def won(outcomes: Sequence[float | None], systems: tuple[System, System], bootstrap: Bootstrap) -> Row:
    """Wins, ties and losses of the first system.

    Returns:
        ``win_rate``: (wins + ties / 2) / questions, with its interval; ``sign_test_p``: the exact two-sided sign test
        of wins against losses; ``longer_won``: the share of decided questions that the longer answer won (an even judge
        of answers whose quality has nothing to do with length has .5), and of how many.
    """
    known = np.array([outcome for outcome in outcomes if outcome is not None], dtype=np.float64)
    wins, losses = int(np.sum(known > 0)), int(np.sum(known < 0))
    rates = bootstrap.sums((known[:, None] + 1) / 2)[:, 0] / len(known) if len(known) else None
    lengths = [len(a.split()) - len(b.split()) for a, b in zip(systems[0].answers, systems[1].answers, strict=True)]
    longer = [gap * outcome > 0 for gap, outcome in zip(lengths, outcomes, strict=True) if gap and outcome]
    return {
        "questions": len(known),
        "wins": wins,
        "ties": len(known) - wins - losses,
        "losses": losses,
        "unjudged": len(outcomes) - len(known),
        "win_rate": float(known.mean() + 1) / 2 if len(known) else None,
        **_interval(rates),
        "sign_test_p": sign_test(wins, losses),
        "longer_won": sum(longer) / len(longer) if longer else None,
        "of_different_length": len(longer),
    }


def position_bias(rounds: Sequence[Round]) -> Row:
    """What the order did, over the questions that have both orders' verdicts.

    Returns:
        ``consistent``: the share with the same outcome in both orders; ``always_first`` and ``always_second``: the
        questions where the answer shown first (second) won both times, whichever it was; ``bias``: their difference
        over the questions, 0 for an even judge, positive if the first place helps; ``sign_test_p`` of the two.
    """
    both = [(f, b) for played in rounds if (f := _signed(played.forward)) is not None
            and (b := _signed(played.backward)) is not None]  # fmt: skip
    first = sum(1 for forward, backward in both if forward > 0 and backward > 0)
    second = sum(1 for forward, backward in both if forward < 0 and backward < 0)
    return {
        "questions": len(both),
        "consistent": sum(forward == -backward for forward, backward in both) / len(both) if both else None,
        "always_first": first,
        "always_second": second,
        "bias": (first - second) / len(both) if both else None,
        "sign_test_p": sign_test(first, second),
    }


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of ``wins`` against ``losses`` if either were as likely; 1 for none of either."""
    total, most = wins + losses, max(wins, losses)
    tail = sum(comb(total, k) for k in range(most, total + 1))
    return float(min(1.0, 2 * tail / 2**total))


def _signed(judgment: Judgment | None) -> float | None:
    """Seen from the answer shown first."""
    if judgment is None or judgment.verdict is None:
        return None
    return {"first": 1.0, "tie": 0.0, "second": -1.0}[judgment.verdict]


def _sum(values: Array) -> float:
    return float(values.sum())


def _interval(values: Array | None) -> dict[str, float | None]:
    """The 95 % interval by percentiles."""
    if values is None:
        return {"low": None, "high": None}
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"low": float(low), "high": float(high)}
