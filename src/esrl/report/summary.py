"""The summary: what ran, what it gained, what it cost; for several runs a table to compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esrl.report.figures import COLOURS
from esrl.report.markup import Html, duration, element, join, number, table
from esrl.report.runs import Run, finite

Named = Sequence[tuple[str, Run]]


def name_runs(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Each run with the short label that its curves carry: A, B, ..., Z, A2, ..."""
    return [(chr(ord("A") + i % 26) + (str(i // 26 + 1) if i >= 26 else ""), run) for i, run in enumerate(runs)]


def colour(index: int) -> tuple[str, bool]:
    """The colour of run ``index``, and whether its curves are dashed (once the colours are used up)."""
    return COLOURS[index % len(COLOURS)], index // len(COLOURS) % 2 == 1


def legend(named: Named) -> Html:
    entries = [
        element("li", element("b", label, style=f"color:{colour(i)[0]}"), " ", run.name)
        for i, (label, run) in enumerate(named)
    ]
    return element("ul", *entries, class_="legend")


def summary_section(named: Named) -> Html:
    if len(named) > 1:
        lead = element("p", _SEVERAL, class_="lead")
        return element("section", lead, legend(named), _comparison(named), _signatures(named))
    run = named[0][1]
    signature = (
        element("p", element("code", run.signature, class_="signature"), class_="wide") if run.signature else Html()
    )
    tiles = [
        element(
            "div",
            element("div", name, class_="name"),
            element("div", value, class_="value"),
            element("div", note, class_="note"),
            class_="tile",
        )
        for name, value, note in _tiles(run)
    ]
    return element(
        "section", element("p", _sentence(run), class_="lead"), signature, element("div", *tiles, class_="tiles")
    )


_SEVERAL = (
    "Runs are drawn over each other; each curve carries its run's letter. The best development score is the one at "
    "the evaluation the run marked as best, the final reward is the mean of the last tenth of the logged steps."
)


def kind(run: Run) -> str:
    """What sort of run it was, by what it logged."""
    if len(run.column("reward_mean")[1]):
        return "Reinforcement learning"
    return "Maximum likelihood training" if run.training else "A run without training steps"


def _sentence(run: Run) -> str:
    if not run.training:
        return f"{kind(run)} in its metrics."
    last = run.training[-1]
    parts = [f"{kind(run)}, {number(last['step'])} steps"]
    if math.isfinite(epochs := finite(last.get("epoch"))):
        parts.append(f"{number(round(epochs, 2))} epochs")
    if run.evaluations:
        parts.append(f"{len(run.evaluations)} evaluation{'s' * (len(run.evaluations) > 1)}")
    return ", ".join(parts) + "."


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, note) of each quantity the run logged."""
    tiles: list[tuple[str, str, str]] = []
    best = run.best_evaluation
    for key in run.dev_metrics[:3]:
        steps, values = run.evaluation_column(key)
        value = finite(best.get(key))
        if math.isfinite(value):
            note = f"{value - values[0]:+.2f} since step {number(int(steps[0]))}, best at step {number(best['step'])}"
            tiles.append((key.replace("_", " ", 1), _score(value), note))
    first, last = run.ends("reward_mean")
    if math.isfinite(last):
        tiles.append(("reward, at the end", number(last), f"{number(first)} at the start ({last - first:+.3g})"))
    first, last = run.ends("loss")
    if math.isfinite(last) and not len(run.column("reward_mean")[1]):
        tiles.append(("loss, at the end", number(last), f"{number(first)} at the start"))
    if math.isfinite(seconds := run.total("seconds_total", evaluations=True)):
        evaluation = run.evaluation_column("seconds_total")[1].sum()
        tiles.append(("time", duration(seconds), f"of it {duration(evaluation)} in evaluations" if evaluation else ""))
    tiles += _costs(run)
    return tiles


def _costs(run: Run) -> list[tuple[str, str, str]]:
    tiles: list[tuple[str, str, str]] = []
    tokens, trained = run.total("tokens_sampled"), run.total("tokens")
    if math.isfinite(tokens):
        per_second = tokens / max(run.total("seconds_sample"), 1e-9)
        note = f"{number(round(per_second))} a second while sampling" if math.isfinite(per_second) else ""
        tiles.append(("tokens sampled", large(tokens), note))
    elif math.isfinite(trained):
        tiles.append(("tokens trained on", large(trained), ""))
    samples, budget = run.column("num_samples_mean")[1], run.column("budget_used")[1]
    if len(samples):
        note = f"{100 * budget.mean():.3g} % of the budget used" if len(budget) else ""
        tiles.append(("samples per prompt", number(float(samples.mean())), note))
    if math.isfinite(peak := run.peak("peak_memory_mb")):
        tiles.append(("peak memory", f"{number(round(peak))} MB", ""))
    return tiles


def _comparison(named: Named) -> Html:
    """One row a run; a column that no run can fill is left out."""
    metrics = list(dict.fromkeys(key for _, run in named for key in run.dev_metrics))[:4]
    header = ["", "run", *(f"best {key}" for key in metrics), "final reward", "steps", "samples per prompt"]
    header += ["tokens sampled", "hours", "peak MB"]
    rows: list[list[object]] = []
    for i, (label, run) in enumerate(named):
        best = run.best_evaluation
        samples = run.column("num_samples_mean")[1]
        numbers = [finite(best.get(key)) for key in metrics]
        numbers += [run.ends("reward_mean")[1], finite(run.training[-1]["step"]) if run.training else math.nan]
        numbers += [float(samples.mean()) if len(samples) else math.nan, run.total("tokens_sampled")]
        numbers += [run.total("seconds_total", evaluations=True) / 3600, round(run.peak("peak_memory_mb"), 0)]
        rows.append([element("b", label, style=f"color:{colour(i)[0]}"), run.name, *numbers])
    kept = [c for c in range(len(header)) if c < 2 or any(math.isfinite(row[c]) for row in rows)]  # type: ignore[arg-type]
    return table([header[c] for c in kept], [[row[c] for c in kept] for row in rows])


def _signatures(named: Named) -> Html:
    lines = [
        element("p", element("b", label), " ", element("code", run.signature, class_="signature"), class_="wide")
        for label, run in named
        if run.signature
    ]
    return join(lines)


def large(value: float) -> str:
    """``1.23 million`` and the like, for a tile."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return number(round(value))


def _score(value: float) -> str:
    return f"{value:.2f}" if 1 <= abs(value) < 1000 else number(value)
