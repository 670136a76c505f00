"""The result of `esrl judge` on the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show_judgment(result: dict[str, Any], as_json: bool) -> None:
    """Print a result for people, or one JSON object."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    console = Console()
    console = Console(width=max(100, console.width))
    title = f"{result['questions']} questions, judged by {result['judge']} ({result['mode']})"
    console.print(title, highlight=False, markup=False)
    shown = Table()
    columns = list(dict.fromkeys(key for row in result["table"] for key in row))
    for name in columns:
        shown.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    for row in result["table"]:
        shown.add_row(*(escape(_cell(row.get(name, ""))) for name in columns))
    console.print(shown)
    for line in _lines(result):
        console.print(line, highlight=False, markup=False)
    console.print(result["signature"], highlight=False, markup=False, soft_wrap=True)


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _lines(result: dict[str, Any]) -> list[str]:
    lines = []
    names = [system["name"] for system in result["systems"]]
    difference, wins = result.get("difference"), result.get("wins")
    if difference is not None and difference["questions"]:
        lines.append(
            f"{names[0]} less {names[1]}: {difference['difference']:+.2f} points "
            f"({difference['low']:+.1f} to {difference['high']:+.1f}), p = {difference['p_value']:.2g}"
        )
    if wins is not None and wins["questions"]:
        lines.append(
            f"{names[0]} wins {wins['wins']}, ties {wins['ties']}, loses {wins['losses']}; "
            f"win rate {wins['win_rate']:.1%} ({wins['low']:.1%} to {wins['high']:.1%}), "
            f"sign test p = {wins['sign_test_p']:.2g}"
        )
    if result["note"]:
        lines.append(result["note"])
    if result.get("missing"):
        lines.append(f"{result['missing']} judgments are missing: their requests were given up.")
    cost = result["cost"]
    tokens = cost["prompt_tokens"] + cost["completion_tokens"]
    spent = f", {tokens:,} tokens" if tokens else ""
    lines.append(
        f"{cost['asked']} judgments asked for, {cost['reused']} were there; {cost['retries']} retries"
        f"{spent}, {cost['seconds']:.0f} s"
    )
    return lines
