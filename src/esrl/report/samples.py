"""Samples to read: early and late attempts at the same prompt, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esrl.report.markup import Html, clip, details, element, number
from esrl.report.runs import MAX_PROMPTS, Row, Run, finite

_LEAD = (
    "Early and late samples of the same prompt, best reward first, drawn at the temperature of their plan (so not what "
    "the model answers when it decodes greedily). k is the number of samples the plan gave, τ their temperature. "
    "Prompts are shown in the order they came up, not picked for their quality."
)
_OPEN = 3  # prompts unfolded from the start
_MAX_SAMPLES = 6
_LONGEST_TEXT = 1200


def samples_section(named: Sequence[tuple[str, Run]]) -> Html:
    """The samples of all runs, at most ``MAX_PROMPTS`` prompts together."""
    with_samples = [(label, run) for label, run in named if run.samples]
    if not with_samples:
        return Html()
    each = max(1, MAX_PROMPTS // len(with_samples))
    parts: list[Html] = []
    for label, run in with_samples:
        if len(named) > 1:
            parts.append(element("h3", f"{label} · {run.name}"))
        parts += [_prompt(records, opened=i < _OPEN) for i, records in enumerate(run.samples[:each])]
    return element("section", element("h2", "Samples to read"), element("p", _LEAD, class_="lead"), *parts)


def _prompt(records: list[Row], *, opened: bool) -> Html:
    record = records[-1]
    prompt, reference = _text(record.get("prompt")), _text(record.get("reference"))
    facts = [element("dt", "prompt"), element("dd", prompt, class_="text", dir="auto")]
    if reference:
        facts += [element("dt", "reference"), element("dd", reference, class_="text", dir="auto")]
    body = [element("dl", *facts, class_="labelled"), element("div", *map(_record, records), class_="records")]
    summary = element("span", clip(prompt.replace("\n", " "), 110) or "a prompt without text", dir="auto")
    if opened:
        return element("details", element("summary", summary), *body, open="open")
    return details(summary, *body)


def _record(record: Row) -> Html:
    """One attempt: where in the run, how it was planned, and its samples."""
    samples = record.get("samples")
    samples = [one for one in samples if isinstance(one, dict)] if isinstance(samples, list) else []
    samples.sort(key=lambda one: -_or(finite(one.get("reward")), -math.inf))
    items = [_sample(one) for one in samples[:_MAX_SAMPLES]]
    hidden = len(samples) - _MAX_SAMPLES
    more = element("p", f"and {hidden} more", class_="soft") if hidden > 0 else Html()
    head = element("h3", _heading(record, samples))
    return element("div", head, element("ol", *items), more)


def _heading(record: Row, samples: list[Row]) -> str:
    # The epoch counts what is behind: 0.4 is in the first one.
    parts = []
    if math.isfinite(epoch := finite(record.get("epoch"))):
        parts.append(f"epoch {max(1, math.ceil(epoch - 1e-9))}")
    if math.isfinite(step := finite(record.get("step"))):
        parts.append(f"step {number(step)}")
    if math.isfinite(num_samples := finite(record.get("num_samples"))):
        parts.append(f"k = {number(num_samples)}")
    if math.isfinite(temperature := finite(record.get("temperature"))):
        parts.append(f"τ = {temperature:.2f}")
    if math.isfinite(capability := finite(record.get("capability"))):
        parts.append(f"capability {capability:.2f}")
    weighted = [(finite(one.get("reward")), _or(finite(one.get("count")), 1.0)) for one in samples]
    weighted = [(reward, count) for reward, count in weighted if math.isfinite(reward) and count > 0]
    if weighted:
        mean = sum(reward * count for reward, count in weighted) / sum(count for _, count in weighted)
        parts.append(f"mean reward {mean:.3f}")
    return " · ".join(parts)


def _sample(sample: Row) -> Html:
    reward, count = finite(sample.get("reward")), finite(sample.get("count"))
    times = element("span", f" ×{number(count)}", class_="soft") if count > 1 else Html()
    text = _text(sample.get("text")) or element("span", "(empty)", class_="soft")
    shown = f"{reward:.3f}" if abs(reward) < 100 else number(reward)
    return element(
        "li",
        element("span", shown if math.isfinite(reward) else "–", class_="reward"),
        element("span", element("span", text, class_="text", dir="auto"), times),
    )


def _text(value: object) -> str:
    return clip(value, _LONGEST_TEXT) if isinstance(value, str) else ""


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise
