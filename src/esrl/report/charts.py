"""Which figures a report has, section by section, and how each is to be read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from esrl.report.figures import COLOURS, Array, Series, bar_chart, heat_map, line_chart, stack_chart
from esrl.report.markup import Html
from esrl.report.runs import Run, finite
from esrl.report.summary import Named, colour

LEFT_OUT = "Never logged, so without a figure"
_MAX_HEAT_MAPS = 6
_LARGEST_K = 4096
_STAGES = {"seconds_sample": "sample", "seconds_reward": "reward", "seconds_score": "score"}


@dataclass(slots=True)
class Section:
    """A heading, a sentence, and figures as (title, caption, svg)."""

    title: str
    lead: str
    figures: list[tuple[str, str, Html]] = field(default_factory=list)


def _smoothed(named: Named) -> str:
    faint = "; faint: the logged values or their range" if len(named) == 1 else ""
    return f"Full line: running mean{faint}."


def chart_sections(named: Named) -> tuple[list[Section], list[str]]:
    """The sections that have a figure, and the quantities that have none because no run logged them."""
    left_out: list[str] = []
    sections = [_progress(named), _learning(named, left_out)]
    sections += [_spending(named, left_out), _capability(named, left_out), _time(named, left_out)]
    return [section for section in sections if section.figures], left_out


def _progress(named: Named) -> Section:
    rewards = _series(named, "reward_mean", spread="reward_std" if len(named) == 1 else None, alarms=True)
    lead = "The score on held-out data decides" + ("; the reward shows what was optimised." if rewards else ".")
    section = Section("Did it get better?", lead)
    marked = " Triangles: alarms." if any(run.alarms for _, run in named) else ""
    for key in list(dict.fromkeys(key for _, run in named for key in run.dev_metrics))[:6]:
        series = []
        for i, (label, run) in enumerate(named):
            x, y = run.evaluation_column(key)
            if len(x):
                point = (finite(run.best_evaluation.get("step")), finite(run.best_evaluation.get(key)))
                best = point if np.isfinite(point).all() else None
                tint, dashed = colour(i)
                marks = run.alarm_steps
                series.append(Series(label=label, colour=tint, x=x, y=y, best=best, alarms=marks, dashed=dashed))
        svg = line_chart(key, series, unit=key.removeprefix("dev_"), smoothed=False, points=True)
        caption = "On the development set. The ring is the evaluation marked as best, whose model is kept." + marked
        section.figures.append((key.replace("_", " ", 1), caption, svg))
    if rewards:
        band = " Band: one standard deviation of a step's samples." if rewards[0].spread is not None else ""
        caption = (
            f"Mean over a step's samples; it also moves with the sampling temperature. {_smoothed(named)}{band}"
            + marked
        )
        section.figures.append(("Reward", caption, line_chart("Reward", rewards, unit="reward")))
    return section


def _learning(named: Named, left_out: list[str]) -> Section:
    section = Section(
        "Optimisation", "Whether the updates were calm. Spikes in the gradient norm are where to look first."
    )
    loss = "Under RL the value says little, only jumps and drifts do: its zero depends on the baseline."
    if not any(len(run.column("reward_mean")[1]) for _, run in named):
        loss = "Cross-entropy on the training data."
    _add(section, named, left_out, "loss", ("Loss", f"{loss} {_smoothed(named)}"), unit="loss")
    _add(section, named, left_out, "grad_norm", ("Gradient norm", f"Before clipping. {_smoothed(named)}"), unit="norm")
    caption = "As the schedule set it."
    _add(section, named, left_out, "learning_rate", ("Learning rate", caption), unit="learning rate", smoothed=False)
    return section


def _spending(named: Named, left_out: list[str]) -> Section:
    section = Section(
        "Where the samples went",
        "Prompts the model handles well get fewer samples and cooler ones (eq. 8 and 9); the saved ones save time.",
    )
    caption = "Planned by eq. 8. A flat line at the maximum means that nothing was saved."
    _add(section, named, left_out, "num_samples_mean", ("Samples per prompt", caption), unit="samples, mean of a step")
    _heat_maps(section, named, left_out)
    caption = "Eq. 9: fewer samples are drawn cooler."
    _add(section, named, left_out, "temperature_mean", ("Temperature", caption), unit="τ, mean of a step")
    caption = "Samples drawn, greedy first estimates included, of prompts times the largest number of samples."
    _add(section, named, left_out, "budget_used", ("Share of the budget used", caption), unit="share")
    caption = "Prompts whose capability was remembered from an earlier epoch; the others needed a greedy decode first."
    _add(
        section, named, left_out, "planned_from_memory", ("Planned from memory", caption), unit="share", smoothed=False
    )
    caption = "Different samples among those of a prompt. Near 0 the model repeats itself and the gradient fades."
    _add(section, named, left_out, "unique_share", ("Unique samples", caption), unit="share")
    caption = "Samples cut at the length limit; they teach the model little about ending."
    _add(section, named, left_out, "truncated_share", ("Truncated samples", caption), unit="share")
    _objectives(section, named)
    return section


def _heat_maps(section: Section, named: Named, left_out: list[str]) -> None:
    found = False
    for label, run in named[:_MAX_HEAT_MAPS]:
        steps, histograms = _histograms(run)
        if not len(steps):
            continue
        found = True
        title = "Samples over time" + (f", run {label}" if len(named) > 1 else "")
        caption = "Each column is a stretch of the run; the darker, the more of its prompts got that many samples."
        section.figures.append((title, caption, heat_map(title, steps, histograms)))
    if not found:
        left_out.append("num_samples_histogram")


def _histograms(run: Run) -> tuple[Array, list[dict[int, float]]]:
    """(steps, {number of samples: prompts}) of the training lines with a sound histogram."""
    steps: list[float] = []
    histograms: list[dict[int, float]] = []
    for row in run.training:
        logged = row.get("num_samples_histogram")
        if not isinstance(logged, dict):
            continue
        counts = {
            int(key): finite(count) for key, count in logged.items() if key.isascii() and key.isdigit() and len(key) < 5
        }
        counts = {key: count for key, count in counts.items() if key <= _LARGEST_K and count > 0}
        if counts:
            steps.append(finite(row["step"]))
            histograms.append(counts)
    return np.array(steps), histograms


def _objectives(section: Section, named: Named) -> None:
    """Which objective the prompts of a step went to; only where one run is looked at."""
    if len(named) > 1:
        return
    run = named[0][1]
    (x, mrt), (other_x, reinforce) = run.column("mrt_prompts"), run.column("reinforce_prompts")
    if len(x) < 2 or not np.array_equal(x, other_x) or not mrt.any() or not reinforce.any():
        return
    series = [
        Series(label="MRT", colour=COLOURS[0], x=x, y=mrt),
        Series(label="REINF.", colour=COLOURS[1], x=x, y=reinforce),
    ]
    caption = "Prompts with several samples are trained by minimum risk, those with one by REINFORCE."
    section.figures.append(("Objectives", caption, line_chart("Objectives", series, unit="prompts of a step")))


def _capability(named: Named, left_out: list[str]) -> Section:
    section = Section("How capability moved", "Cap is what the plan of the next epoch is made from (eq. 6, eq. 7).")
    caption = f"Mean over the prompts of a step. {_smoothed(named)}"
    _add(section, named, left_out, "capability_mean", ("Capability", caption), unit="capability")
    by_epoch = [s for i, (label, run) in enumerate(named) if (s := _by_epoch(run, label, i)) is not None]
    if any(len(one.x) > 1 for one in by_epoch):
        caption = "Mean over the steps of each epoch: the same prompts every time, so steps between epochs are real."
        svg = line_chart(
            "Capability by epoch", by_epoch, unit="capability", smoothed=False, points=True, x_label="epoch"
        )
        section.figures.append(("Capability by epoch", caption, svg))
    return section


def _by_epoch(run: Run, label: str, index: int) -> Series | None:
    values: dict[int, list[float]] = {}
    for row in run.training:
        epoch, capability = finite(row.get("epoch")), finite(row.get("capability_mean"))
        if math.isfinite(epoch) and math.isfinite(capability):
            values.setdefault(max(1, math.ceil(epoch - 1e-9)), []).append(capability)
    if not values:
        return None
    epochs = sorted(values)
    means = np.array([np.mean(values[epoch]) for epoch in epochs])
    tint, dashed = colour(index)
    return Series(label=label, colour=tint, x=np.array(epochs, dtype=float), y=means, dashed=dashed)


def _time(named: Named, left_out: list[str]) -> Section:
    section = Section("Time and memory", "Where a step's time goes. Evaluations are not in these figures.")
    stages = [(label, x, layers) for label, run in named if (found := _stages(run)) for x, layers in [found]]
    if len(named) == 1 and stages and len(stages[0][1]) > 1:
        _, x, layers = stages[0]
        caption = "Seconds of a step by stage, stacked. Sampling usually dominates; scoring is the pass with gradients."
        section.figures.append(("Time per stage", caption, stack_chart("Time per stage", x, layers, unit="seconds")))
    elif stages:
        bars = [(label, {name: float(v.mean()) for name, v in layers.items()}) for label, _, layers in stages]
        caption = "Mean seconds of a step by stage."
        section.figures.append(("Time per stage", caption, bar_chart("Time per stage", bars, unit="seconds")))
    else:
        left_out.append("seconds per stage")
        _add(section, named, left_out, "seconds_total", ("Time per step", _smoothed(named)), unit="seconds")
    caption = "The highest use so far or of a step, as the run measured it."
    _add(section, named, left_out, "peak_memory_mb", ("Peak memory", caption), unit="MB", smoothed=False)
    return section


def _stages(run: Run) -> tuple[Array, dict[str, Array]] | None:
    """(steps, seconds of each stage); what the total has beyond the stages is "rest"."""
    keys = [key for key in _STAGES if len(run.column(key)[1])]
    rows = [[finite(row.get(key)) for key in ("step", *keys, "seconds_total")] for row in run.training]
    values = np.array(rows, dtype=np.float64).reshape(-1, len(keys) + 2)
    values = values[np.isfinite(values).all(1)]
    if not keys or not len(values):
        return None
    layers = {_STAGES[key]: values[:, i + 1] for i, key in enumerate(keys)}
    layers["rest"] = np.maximum(values[:, -1] - values[:, 1:-1].sum(1), 0)
    return values[:, 0], layers


def _add(
    section: Section, named: Named, left_out: list[str], key: str, text: tuple[str, str], **options: object
) -> None:
    """Add the line chart of one logged quantity, ``text`` being its title and caption."""
    series = _series(named, key)
    if not series:
        left_out.append(key)
        return
    section.figures.append((*text, line_chart(text[0], series, **options)))  # type: ignore[arg-type]


def _series(
    named: Sequence[tuple[str, Run]], key: str, spread: str | None = None, *, alarms: bool = False
) -> list[Series]:
    found = []
    for i, (label, run) in enumerate(named):
        x, y = run.column(key)
        if not len(x):
            continue
        band = None
        if spread is not None:
            spread_x, spread_y = run.column(spread)
            band = spread_y if np.array_equal(spread_x, x) else None
        tint, dashed = colour(i)
        marks = run.alarm_steps if alarms else ()
        found.append(Series(label=label, colour=tint, x=x, y=y, spread=band, alarms=marks, dashed=dashed))
    return found
