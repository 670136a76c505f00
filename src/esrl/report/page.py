"""The page: a summary, the figures section by section, samples to read, and what the run was made of."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from esrl.errors import StorageError
from esrl.report.benchmark import benchmark_parts, read_benchmark
from esrl.report.charts import LEFT_OUT, Section, chart_sections
from esrl.report.markup import Html, clip, details, element, escape, join, number, plain, table
from esrl.report.runs import Row, Run, read_run
from esrl.report.samples import samples_section
from esrl.report.style import CSS
from esrl.report.summary import colour, legend, name_runs, summary_section

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing in the page can load or run anything
_LONGEST_CONFIG = 60_000
_MOST_ALARMS = 50


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write one self-contained HTML page about one or several runs.

    The page needs no script and no network, and is the same bytes for the same run folders. What a run did not
    log is left out and named. ``output`` is replaced in one step.

    Args:
        runs: run folders; several are drawn over each other and compared in a table. Or one file that
            ``esrl benchmark --json`` printed.
        output: the file to write; its folder is created.

    Returns:
        ``output``.

    Raises:
        ValueError: no run is given, a folder is no run, or ``output`` is a folder.
        StorageError: the page cannot be written.
    """
    output = Path(output)
    if not runs:
        raise ValueError("no run is given; a report needs at least one run folder.")
    if len(runs) == 1 and Path(runs[0]).is_file():
        _write(output, render_benchmark(Path(runs[0])))
        return output
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name the report's file, for example {output / 'report.html'}.")
    _write(output, render([read_run(Path(path)) for path in runs]))
    return output


def render(runs: Sequence[Run]) -> Html:
    """The whole page."""
    named = name_runs(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    charts, left_out = chart_sections(named)
    parts: list[Html] = [summary_section(named), _alarm_section(named), _result_section(named)]
    parts += [_chart_section(section, named) for section in charts]
    parts += [samples_section(named), _settings_section(named), _notes(named, left_out)]
    return _document(title, parts)


def render_benchmark(path: Path) -> Html:
    """The whole page of a benchmark's results."""
    return _document("Benchmark", benchmark_parts(read_benchmark(path)))


def _document(title: str, parts: Sequence[Html]) -> Html:
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'),
        element("title", f"esrl report: {title}"),
        element("style", Html(CSS)),
    )
    body = element("body", element("main", element("h1", title), *parts))
    return Html(f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n")


def _chart_section(section: Section, named: Sequence[tuple[str, Run]]) -> Html:
    figures = [
        element("figure", element("figcaption", element("b", title), caption), svg)
        for title, caption, svg in section.figures
    ]
    key = legend(named) if len(named) > 1 else Html()
    return element(
        "section",
        element("h2", section.title),
        element("p", section.lead, class_="lead"),
        key,
        element("div", *figures, class_="figures"),
    )


def _result_section(named: Sequence[tuple[str, Run]]) -> Html:
    """``result.json`` of each run: its table, its note, and what else it holds."""
    parts: list[Html] = []
    for label, run in named:
        if not run.result:
            continue
        if len(named) > 1:
            parts.append(element("h3", f"{label} · {run.name}"))
        rows = run.result.get("table")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            parts.append(table(columns, [[row.get(column, "") for column in columns] for row in rows]))
        note = run.result.get("note")
        if isinstance(note, str) and note:
            parts.append(element("p", clip(note, 4000)))
        rest = {key: value for key, value in run.result.items() if key not in ("table", "note", "signature")}
        if rest:
            parts.append(_facts(rest))
    return element("section", element("h2", "Final results"), *parts) if parts else Html()


def _alarm_section(named: Sequence[tuple[str, Run]]) -> Html:
    """What looked wrong while the runs went on, in the words they said it in; nothing where nothing did."""
    rows: list[list[object]] = []
    for i, (label, run) in enumerate(named):
        marked = element("b", label, style=f"color:{colour(i)[0]}")
        for step, text in run.alarms[:_MOST_ALARMS]:
            name, colon, sentence = text.partition(": ")
            said = [name, clip(sentence, 2000)] if colon else ["", clip(text, 2000)]
            rows.append([marked, number(step), *said] if len(named) > 1 else [number(step), *said])
        if (hidden := len(run.alarms) - _MOST_ALARMS) > 0:
            rows.append([*([marked] if len(named) > 1 else []), "", "", f"and {hidden:,} more"])
    if not rows:
        return Html()
    header = [*([""] if len(named) > 1 else []), "step", "alarm", "what the figures showed"]
    lead = "Said by the runs themselves (training.alarms); triangles mark these steps in the figures below."
    return element(
        "section", element("h2", "Alarms"), element("p", lead, class_="lead"), table(header, rows), class_="alarms"
    )


def _settings_section(named: Sequence[tuple[str, Run]]) -> Html:
    parts: list[Html] = []
    for label, run in named:
        prefix = f"{label} · {run.name}: " if len(named) > 1 else ""
        if run.config:
            parts.append(details(f"{prefix}configuration", element("pre", clip(run.config, _LONGEST_CONFIG))))
        if run.environment:
            parts.append(details(f"{prefix}environment", _facts(run.environment)))
    if not parts:
        return Html()
    lead = "The resolved configuration and the machine: with the same data, enough to run it again."
    return element("section", element("h2", "Configuration and environment"), element("p", lead, class_="lead"), *parts)


def _facts(values: Row) -> Html:
    """A nested object as a two-column table, inner names joined by dots."""
    rows: list[tuple[str, str]] = []
    pending = list(values.items())
    while pending and len(rows) < 400:
        name, value = pending.pop(0)
        if isinstance(value, dict) and value and name.count(".") < 4:
            pending = [(f"{name}.{key}", inner) for key, inner in value.items()] + pending
        else:
            rows.append((name, clip(plain(value), 2000)))
    return table([], rows)


def _notes(named: Sequence[tuple[str, Run]], left_out: Sequence[str]) -> Html:
    """What is missing, so that an absent section is never a riddle."""
    lines = [
        (f"{label} · {run.name}: " if len(named) > 1 else "") + "; ".join(run.notes) + "."
        for label, run in named
        if run.notes
    ]
    if left_out:
        lines.append(f"{LEFT_OUT}: {', '.join(left_out)}.")
    if not lines:
        return Html()
    return element(
        "section", element("h2", "Not in this report"), join(element("p", line, class_="soft") for line in lines)
    )


def _write(output: Path, page: Html) -> None:
    """Replace ``output`` in one step, so that a reader never sees half a page."""
    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=output.parent, prefix=f".{output.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(page.encode("utf-8"))
        temporary.chmod(0o644)
        os.replace(temporary, output)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(f"{output} cannot be written: {error}. Free space or choose another place.") from error
