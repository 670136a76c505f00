"""The result of `esrl judge`: the figures, the rows of its tables, and a note on what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esrl import __version__
from esrl.judge.inputs import Question, System
from esrl.judge.parsing import Judgment
from esrl.judge.settings import JudgeConfig
from esrl.judge.statistics import (
    Bootstrap,
    Round,
    compared,
    outcome_of_round,
    outcomes_of_scores,
    position_bias,
    rated,
    scores_of_rounds,
    won,
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A question by its index, and the systems (0, 1) whose answers the judge sees, in that order."""

    question: int
    shown: tuple[int, ...]


def signature(config: JudgeConfig, templates: Sequence[str], num_questions: int) -> str:
    """What was judged and how, in sacreBLEU's manner."""
    parts: dict[str, object] = {
        "judge": config.judge,
        "mode": config.mode,
        "template": "+".join(templates),
        "temperature": "unset" if config.request.temperature is None else f"{config.request.temperature:g}",
        "questions": num_questions,
    }
    if config.mode == "pairwise":
        parts["swap"] = "yes" if config.swap else "no"
    parts |= {"bootstrap": config.num_resamples, "seed": config.seed, "v": __version__}
    return "|".join(["esrl-judge", *(f"{name}:{value}" for name, value in parts.items())])


def summarize(
    config: JudgeConfig,
    questions: Sequence[Question],
    systems: Sequence[System],
    judgments: Mapping[Place, Judgment | None],
) -> tuple[Row, list[Row]]:
    """What the judgments come to.

    Args:
        judgments: what was judged; None where there is no reply or no score in it.

    Returns:
        the result (``mode``, ``judge``, ``questions``, ``systems``, ``unparsed``, and with two systems ``difference``,
        ``wins`` and ``position``; ``table`` and ``note`` for reports), and a row for each question.
    """
    make = _single if config.mode == "single" else _pairwise
    result, rows = make(config, questions, systems, judgments)
    unparsed = sorted({place.question for place, judgment in judgments.items() if judgment is None})
    head = {
        "mode": config.mode,
        "judge": config.judge,
        "questions": len(questions),
        "unjudged": [questions[number].id for number in unparsed],
    }
    result = head | result
    return result | {"table": table(result), "note": note(result)}, rows


def _single(
    config: JudgeConfig,
    questions: Sequence[Question],
    systems: Sequence[System],
    judgments: Mapping[Place, Judgment | None],
) -> tuple[Row, list[Row]]:
    bootstrap = Bootstrap(num_resamples=config.num_resamples, seed=config.seed)
    scores = [
        [_score(judgments[Place(question=number, shown=(system,))]) for number in range(len(questions))]
        for system in range(len(systems))
    ]
    result: Row = {"systems": [rated(s, questions, own, bootstrap) for s, own in zip(systems, scores, strict=True)]}
    if len(systems) == 2:
        outcomes = outcomes_of_scores(scores[0], scores[1])
        result["difference"] = compared(scores[0], scores[1], bootstrap)
        result["wins"] = won(outcomes, (systems[0], systems[1]), bootstrap)
    rows = [
        {"question_id": question.id, "category": question.category, "scores": list(own)}
        for question, *own in zip(questions, *scores, strict=True)
    ]
    return result, rows


def _pairwise(
    config: JudgeConfig,
    questions: Sequence[Question],
    systems: Sequence[System],
    judgments: Mapping[Place, Judgment | None],
) -> tuple[Row, list[Row]]:
    bootstrap = Bootstrap(num_resamples=config.num_resamples, seed=config.seed)
    rounds = [
        Round(
            forward=judgments[Place(question=number, shown=(0, 1))],
            backward=judgments[Place(question=number, shown=(1, 0))] if config.swap else None,
        )
        for number in range(len(questions))
    ]
    outcomes = [outcome_of_round(played, config.swap) for played in rounds]
    scores = scores_of_rounds(rounds, config.swap)
    words = [{"name": s.name, "mean_words": sum(len(a.split()) for a in s.answers) / len(questions)} for s in systems]
    result: Row = {"systems": words, "wins": won(outcomes, (systems[0], systems[1]), bootstrap)}
    if scores is not None:
        result["systems"] = [rated(s, questions, own, bootstrap) for s, own in zip(systems, scores, strict=True)]
        result["difference"] = compared(*scores, bootstrap)
    if config.swap:
        result["position"] = position_bias(rounds)
    rows = []
    for number, (question, played) in enumerate(zip(questions, rounds, strict=True)):
        row: Row = {"question_id": question.id, "category": question.category, "outcome": outcomes[number]}
        row["verdicts"] = [_verdict(played.forward)] + ([_verdict(played.backward)] if config.swap else [])
        if scores is not None:
            row["scores"] = [scores[0][number], scores[1][number]]
        rows.append(row)
    return result, rows


def table(result: Row) -> list[Row]:
    """A row for each system, as `esrl report` shows it."""
    rows = []
    for number, system in enumerate(result["systems"]):
        row: Row = {"system": system["name"]}
        if system.get("total") is not None:
            row["total"] = round(system["total"], 2)
            row["95 % interval"] = f"{system['low']:.1f} to {system['high']:.1f}"
            row["of"] = system["of"]
            row["mean"] = round(system["mean"], 3)
        if "wins" in result:
            wins = result["wins"]
            row["wins"], row["ties"] = wins["wins" if number == 0 else "losses"], wins["ties"]
        row["words"] = round(system["mean_words"], 1)
        rows.append(row)
    return rows


def note(result: Row) -> str:
    """What a reader of the totals must know: what is not in them, and what the judge is known to look at."""
    parts = []
    if result["unjudged"]:
        shown = ", ".join(result["unjudged"][:10]) + (", ..." if len(result["unjudged"]) > 10 else "")
        parts.append(
            f"{len(result['unjudged'])} of {result['questions']} questions lack a judgment with a score and are left "
            f"out where it is missing: {shown}."
        )
    position = result.get("position")
    if position is not None and position["questions"]:
        parts.append(
            f"In both orders the same outcome: {position['consistent']:.0%}; won by whichever answer was shown first: "
            f"{position['always_first']}, second: {position['always_second']} (p = {position['sign_test_p']:.2g})."
        )
    wins = result.get("wins")
    if wins is not None and wins["longer_won"] is not None:
        parts.append(
            f"The longer answer won {wins['longer_won']:.0%} of {wins['of_different_length']} decided questions."
        )
    return " ".join(parts)


def _score(judgment: Judgment | None) -> float | None:
    return None if judgment is None else judgment.scores[0]


def _verdict(judgment: Judgment | None) -> str | None:
    return None if judgment is None else judgment.verdict
