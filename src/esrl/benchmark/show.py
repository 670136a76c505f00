"""The benchmark on the terminal: a table per section, what was measured below it; JSON where it is asked for."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esrl.benchmark.run import BenchmarkConfig, benchmark


def run_command(config: BenchmarkConfig) -> int:
    """The command ``esrl benchmark``; returns the exit code.

    The table goes to standard output; with ``json`` it goes to standard error, and standard output gets exactly one
    JSON object.
    """
    progress = Console(stderr=True)
    with progress.status("benchmark") as status:
        result = benchmark(config, lambda message: status.update(escape(message)))
    show(result, Console(stderr=config.json))
    if config.json:
        json.dump(result, sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
    return 0


def show(result: dict[str, Any], console: Console) -> None:
    """Print the sections, what was not run, and the machine."""
    if "stage_one" in result:
        _show_stage_one(result["stage_one"], console)
    for row in result["not_run"]:
        place = f"{row['model']}, {row['samples']} samples"
        console.print(f"not run: {escape(row['contestant'])} ({escape(place)}): {escape(row['reason'])}")
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    device = machine["cuda"] or f"{machine['processor'] or machine['platform']}, {machine['threads']} threads{load}"
    console.print(f"{escape(device)}; {escape(versions)}", style="dim", highlight=False)


def _show_stage_one(rows: list[dict[str, Any]], console: Console) -> None:
    """A table for each workload, narrow enough for 80 columns."""
    for workload in dict.fromkeys(row["workload"] for row in rows):
        group = [row for row in rows if row["workload"] == workload]
        title = f"stage one, {group[0]['model']}, {group[0]['samples']} samples"
        table = Table(title=title, title_justify="left", caption=escape(workload), caption_justify="left")
        table.add_column("contestant", no_wrap=True)
        for name in ("tokens/s", "range", "esrl is", "length", "MB"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in group:
            rate, speedup = row["tokens_per_second"], row["esrl_speedup"]
            table.add_row(
                row["contestant"] + ("" if row["ranked"] else " *"),
                f"{rate['median']:,.0f}",
                f"{rate['min']:,.0f}-{rate['max']:,.0f}",
                "" if speedup is None or row["contestant"] == "esrl" else f"{speedup:.2f} x",
                f"{row['mean_length']:.1f}" + ("" if row["lengths_agree"] else "[red]![/red]"),
                f"{row['peak_memory_mb']:,.0f}",
                style=None if row["ranked"] else "dim",
            )
        console.print(table)
    note = "length: mean tokens, EOS included; !: not the law esrl draws from; MB: peak above the model; *: not ranked"
    console.print(note, style="dim", highlight=False)
