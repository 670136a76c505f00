"""The page of a benchmark: what ``esrl benchmark --json`` printed, as figures and tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esrl.report.figures import COLOURS, Series, bar_chart, line_chart
from esrl.report.markup import Html, element, join, table

Row = dict[str, Any]
Figure = tuple[str, str, Html]

SECTIONS = ("stage_one", "step", "memory", "scale", "rewards", "limit", "language_model")


def read_benchmark(path: Path) -> dict[str, Any]:
    """The JSON object of a benchmark.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable JSON ({error}). Give what `esrl benchmark --json` printed.") from error
    if not isinstance(result, dict) or not isinstance(result.get("machine"), dict):
        raise ValueError(f"{path} is no benchmark: it has no machine. Give what `esrl benchmark --json` printed.")
    return result


def benchmark_parts(result: dict[str, Any]) -> list[Html]:
    """The page's sections, those that were measured."""
    parts = [
        _section(title, lead, figures(result[name]), _rows_table(result[name], columns))
        for name, (title, lead, figures, columns) in _PARTS.items()
        if result.get(name)
    ]
    left_out = [
        f"{row['contestant']} ({row['model']}, {row['samples']} samples): {row['reason']}"
        if "model" in row
        else f"{row['contestant']}: {row['reason']}"
        for row in result.get("not_run", [])
    ]
    if left_out:
        parts.append(element("section", element("h2", "Not run"), join(element("p", line) for line in left_out)))
    facts = [(key, value) for key, value in result["machine"].items()]
    parts.append(element("section", element("h2", "The machine"), table([], facts)))
    return parts


def _section(title: str, lead: str, figures: Sequence[Figure], rows: Html) -> Html:
    drawn = [
        element("figure", element("figcaption", element("b", name), caption), svg) for name, caption, svg in figures
    ]
    return element(
        "section",
        element("h2", title),
        element("p", lead, class_="lead"),
        element("div", *drawn, class_="figures"),
        rows,
    )


def _rows_table(rows: Sequence[Row], columns: dict[str, Callable[[Row], object]]) -> Html:
    return table(list(columns), [[value(row) for value in columns.values()] for row in rows])


def _bars(rows: Sequence[Row], key: str, unit: str) -> list[Figure]:
    """A figure per workload: its contestants."""
    figures = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        group = [row for row in rows if row["workload"] == workload]
        title = f"{group[0]['model']}, {group[0]['samples']} samples a prompt"
        if "source_tokens" in group[0]:
            title += f" of {group[0]['source_tokens']} tokens"
        bars = [(row["contestant"], {unit: row[key]["median"]}) for row in group]
        figures.append((title, workload, bar_chart(title, bars, unit=unit)))
    return figures


def _lines(rows: Sequence[Row], x: str, y: Callable[[Row], float], unit: str) -> list[Figure]:
    """A figure per model: one line for each contestant over ``x``."""
    figures = []
    for model in dict.fromkeys(row["model"] for row in rows):
        series = []
        names = list(dict.fromkeys(row["contestant"] for row in rows if row["model"] == model))
        for i, name in enumerate(names):
            points = sorted((row[x], y(row)) for row in rows if (row["model"], row["contestant"]) == (model, name))
            xs, ys = (np.array(values, dtype=float) for values in zip(*points, strict=True))
            series.append(Series(label=name, colour=COLOURS[i], x=xs, y=ys))
        title = f"{model}, by {x.replace('_', ' ')}"
        svg = line_chart(title, series, unit=unit, smoothed=False, points=True, x_label=x.replace("_", " "))
        figures.append((title, "", svg))
    return figures


def _varied(rows: Sequence[Row], axes: dict[str, str], y: Callable[[Row], float], unit: str) -> list[Figure]:
    return [
        figure
        for what, x in axes.items()
        if (group := [row for row in rows if row["varied"] == what])
        for figure in _lines(group, x, y, unit)
    ]


def _memory_figures(rows: Sequence[Row]) -> list[Figure]:
    axes = {name: name for name in ("samples", "vocabulary", "max_new_tokens")}
    return _varied(rows, axes, lambda row: float(row["peak_memory_mb"]), "MB above the model")


def _scale_figures(rows: Sequence[Row]) -> list[Figure]:
    axes = {name: name for name in ("rows", "prompts")}
    return _varied(rows, axes, lambda row: 1e6 * row["seconds_per_token"], "µs per token")


def _compared(key: str) -> dict[str, Callable[[Row], object]]:
    """The columns of a quantity that contestants are compared by."""
    return {
        "median": lambda row: row[key]["median"],
        "min": lambda row: row[key]["min"],
        "max": lambda row: row[key]["max"],
        "esrl is ... times as fast": lambda row: row["esrl_speedup"],
    }


_CONTESTANT: dict[str, Callable[[Row], object]] = {
    "contestant": lambda row: row["contestant"],
    "model": lambda row: row["model"],
    "k": lambda row: row["samples"],
}
_MEMORY: dict[str, Callable[[Row], object]] = {"MB above the model": lambda row: row["peak_memory_mb"]}

_Part = tuple[str, str, Callable[[Sequence[Row]], list[Figure]], dict[str, Callable[[Row], object]]]

_PARTS: dict[str, _Part] = {
    "stage_one": (
        "Stage one: tokens sampled per second",
        "Contestants take turns, each in its own process; speedups are medians of the ratios within a round.",
        lambda rows: _bars(rows, "tokens_per_second", "tokens per second"),
        _CONTESTANT | {"source tokens": lambda row: row["source_tokens"]} | _compared("tokens_per_second") | _MEMORY,
    ),
    "step": (
        "A whole optimizer step: seconds",
        "Sampling, reward, gradient, clipping, AdamW. Memory is counted above the model, its gradients and the "
        "optimizer's state.",
        lambda rows: _bars(rows, "seconds", "seconds"),
        _CONTESTANT | _compared("seconds") | _MEMORY,
    ),
    "language_model": (
        "A step of GRPO on a language model: tokens per second",
        "Sampling, gradient, clipping, AdamW, beside TRL's trainer. Memory is counted above the model, its gradients "
        "and the optimizer's state.",
        lambda rows: _bars(rows, "tokens_per_second", "tokens per second"),
        _CONTESTANT | {"prompt tokens": lambda row: row["source_tokens"]} | _compared("tokens_per_second") | _MEMORY,
    ),
    "memory": (
        "Peak memory of a step",
        "One thing varies at a time.",
        _memory_figures,
        {"varied": lambda row: row["varied"]}
        | _CONTESTANT
        | {"vocabulary": lambda row: row["vocabulary"], "longest sample": lambda row: row["max_new_tokens"]}
        | _MEMORY,
    ),
    "scale": (
        "Scale: time per token as a step grows",
        "A flat line means that a larger step costs no more per token.",
        _scale_figures,
        {"varied": lambda row: row["varied"]}
        | _CONTESTANT
        | {
            "prompts": lambda row: row["prompts"],
            "rows": lambda row: row["rows"],
            "µs per token": lambda row: 1e6 * row["seconds_per_token"],
        }
        | _MEMORY,
    ),
    "rewards": (
        "Rewards: sentences scored per second",
        "One process, one thread; the values of both sides are compared in the same run.",
        lambda rows: [],
        {
            "metric": lambda row: row["metric"],
            "words": lambda row: row["words"],
            "ours": lambda row: row["sentences_per_second"]["median"],
            "library": lambda row: row["reference"],
            "its": lambda row: row["reference_per_second"]["median"],
            "ratio": lambda row: row["ratio"],
            "largest difference": lambda row: row["largest_difference"],
        },
    ),
    "limit": (
        "The limit of this machine",
        "Operations of the stages are counted as they are dispatched; a share is of the products of the same round.",
        lambda rows: [],
        {
            "quantity": lambda row: row["quantity"],
            "10^9 per second": lambda row: row["giga_per_second"],
            "of": lambda row: row["unit"],
            "share of the matrix products": lambda row: row.get("share"),
            "share of the fastest call": lambda row: row.get("share_of_fastest"),
        },
    ),
}
