"""The benchmark on the terminal: a table per section, what was measured below it; JSON where it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esrl.benchmark.run import BenchmarkConfig, benchmark

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def run_command(config: BenchmarkConfig) -> int:
    """The command ``esrl benchmark``; returns the exit code.

    The tables go to standard output; with ``json`` they go to standard error, and standard output gets exactly one
    JSON object.
    """
    progress = Console(stderr=True)
    # every picture of the spinner takes time from what is measured
    with progress.status("benchmark", refresh_per_second=1) as status:
        result = benchmark(config, lambda message: status.update(escape(message)))
    show(result, Console(stderr=config.json))
    if config.json:
        json.dump(result, sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
    return 0


def show(result: dict[str, Any], console: Console) -> None:
    """Print the sections, what was not run, and the machine."""
    for section, (title, columns, note) in TABLES.items():
        rows = result.get(section, [])
        # rows of one workload stand together, under what they were measured on
        for group in dict.fromkeys((row.get("varied"), row.get("workload")) for row in rows if _apart(section)):
            members = [row for row in rows if (row.get("varied"), row.get("workload")) == group]
            place = f"{title}, {members[0]['model']}, {members[0]['samples']} samples"
            console.print(_table(place, columns, members, group[1]))
        if rows and not _apart(section):
            console.print(_table(title, columns, rows, None))
        if rows:
            console.print(note, style="dim", highlight=False)
    for row in result["not_run"]:
        place = f" ({row['model']}, {row['samples']} samples)" if "model" in row else ""
        console.print(f"not run: {escape(row['contestant'] + place)}: {escape(row['reason'])}")
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    device = machine["cuda"] or f"{machine['processor'] or machine['platform']}, {machine['threads']} threads{load}"
    console.print(f"{escape(device)}; {escape(versions)}; {escape(machine['kernels'])}", style="dim", highlight=False)


def _apart(section: str) -> bool:
    return section in ("stage_one", "step", "language_model")


def _table(title: str, columns: list[Column], rows: list[Row], caption: str | None) -> Table:
    """Narrow enough for 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        caption=None if caption is None else escape(caption),
        caption_justify="left",
    )
    for i, (name, _) in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        style = "dim" if row.get("ranked") is False else None
        table.add_row(*(value(row) for _, value in columns), style=style)
    return table


def _contestant(row: Row) -> str:
    return escape(row["contestant"] + ("" if row.get("ranked", True) else " *"))


def _speedup(row: Row) -> str:
    speedup = row["esrl_speedup"]
    return "" if speedup is None or row["contestant"] == "esrl" else f"{speedup:.2f} x"


def _length(row: Row) -> str:
    return f"{row['mean_length']:.1f}" + ("" if row["lengths_agree"] else "[red]![/red]")


def _memory(row: Row) -> str:
    return f"{row['peak_memory_mb']:,.0f}"


def _rate(row: Row, key: str = "tokens_per_second") -> str:
    return f"{row[key]['median']:,.0f}"


def _range(row: Row, key: str, form: str) -> str:
    return f"{row[key]['min']:{form}}-{row[key]['max']:{form}}"


_LENGTH_NOTE = "length: mean tokens, EOS included; !: not the law esrl draws from; MB: peak above the model"

TABLES: dict[str, tuple[str, list[Column], str]] = {
    "stage_one": (
        "stage one",
        [
            ("contestant", _contestant),
            ("tokens/s", _rate),
            ("range", lambda row: _range(row, "tokens_per_second", ",.0f")),
            ("esrl is", _speedup),
            ("length", _length),
            ("MB", _memory),
        ],
        f"{_LENGTH_NOTE}; *: not ranked",
    ),
    "step": (
        "step",
        [
            ("contestant", _contestant),
            ("seconds", lambda row: f"{row['seconds']['median']:.2f}"),
            ("range", lambda row: _range(row, "seconds", ".2f")),
            ("esrl is", _speedup),
            ("length", _length),
            ("MB", _memory),
        ],
        f"{_LENGTH_NOTE}, its gradients and the optimizer's state",
    ),
    "language_model": (
        "language model",
        [
            ("contestant", _contestant),
            ("prompt", lambda row: str(row["source_tokens"])),
            ("tokens/s", _rate),
            ("range", lambda row: _range(row, "tokens_per_second", ",.0f")),
            ("esrl is", _speedup),
            ("length", _length),
            ("MB", _memory),
        ],
        f"{_LENGTH_NOTE}, its gradients and the optimizer's state; a whole step of GRPO",
    ),
    "memory": (
        "peak memory of a step",
        [
            ("contestant", _contestant),
            ("model", lambda row: row["model"]),
            ("k", lambda row: str(row["samples"])),
            ("vocabulary", lambda row: f"{row['vocabulary']:,}"),
            ("tokens", lambda row: str(row["max_new_tokens"])),
            ("MB", _memory),
        ],
        "16 prompts; tokens: the longest sample; MB: peak above the model, its gradients and the optimizer's state",
    ),
    "scale": (
        "scale",
        [
            ("model", lambda row: row["model"]),
            ("prompts", lambda row: str(row["prompts"])),
            ("k", lambda row: str(row["samples"])),
            ("rows", lambda row: f"{row['rows']:,}"),
            ("us/token", lambda row: f"{1e6 * row['seconds_per_token']:.0f}"),
            ("MB", _memory),
        ],
        "a whole step of ours",
    ),
    "rewards": (
        "rewards",
        [
            ("metric", lambda row: row["metric"]),
            ("words", lambda row: f"{row['words']:.0f}"),
            ("ours/s", lambda row: _rate(row, "sentences_per_second")),
            ("library/s", lambda row: _rate(row, "reference_per_second")),
            ("ratio", lambda row: f"{row['ratio']:.1f} x"),
            ("difference", lambda row: f"{row['largest_difference']:.0e}"),
            ("library", lambda row: row["reference"]),
        ],
        "sentences a second, one process, one thread; difference: the largest, of values from 0 to 1",
    ),
    "limit": (
        "limit",
        [
            ("", lambda row: escape(row["quantity"])),
            ("10^9/s", lambda row: f"{row['giga_per_second']:,.0f}"),
            ("of the limit", lambda row: f"{100 * row['share']:.0f} %" if "share" in row else ""),
            ("of the fastest", lambda row: f"{100 * row['share_of_fastest']:.0f} %" if "share" in row else ""),
            ("of", lambda row: row["unit"]),
        ],
        "operations are counted as they are dispatched, by PyTorch and by the compiled kernels; limit: the products of "
        "the same round, medians; fastest: the fastest call of all",
    ),
}
