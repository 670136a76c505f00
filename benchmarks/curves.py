"""Curves of a comparison's runs: a figure for each quantity, a line for each method, over the tokens drawn.

    python benchmarks/curves.py runs/rlhf-alpaca docs/figures

Takes the run folders METHOD-SEED of one seed and writes QUANTITY.svg for each quantity that they logged.
"""

from __future__ import annotations

import argparse
from itertools import cycle
from pathlib import Path

import numpy as np

from esrl.report.figures import COLOURS, Series, line_chart
from esrl.report.runs import Run, read_run

QUANTITIES = {
    "reward_mean": "reward",
    "kl_mean": "nats a sample",
    "length_mean": "tokens a sample",
    "truncated_share": "share",
    "explained_variance": "share",
}


def main() -> None:
    arguments = argparse.ArgumentParser(description="Curves of a comparison's runs.")
    arguments.add_argument("runs", type=Path, help="the folder with the runs METHOD-SEED")
    arguments.add_argument("output", type=Path, help="where the figures go")
    arguments.add_argument("--seed", default="1")
    chosen = arguments.parse_args()
    suffix = f"-{chosen.seed}"
    folders = sorted(path for path in chosen.runs.iterdir() if path.name.endswith(suffix) and path.is_dir())
    runs = {path.name.removesuffix(suffix): read_run(path) for path in folders}
    chosen.output.mkdir(parents=True, exist_ok=True)
    for key, unit in QUANTITIES.items():
        if lines := series(runs, key):
            title = key.replace("_", " ")
            svg = line_chart(title, lines, unit=unit, x_label="thousand tokens drawn")
            alone = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:white" ', 1)
            (chosen.output / f"{key}.svg").write_text(alone + "\n", encoding="utf-8")


def series(runs: dict[str, Run], key: str) -> list[Series]:
    """A line for each run that logged the quantity."""
    lines = []
    for (name, run), colour in zip(runs.items(), cycle(COLOURS), strict=False):
        steps, values = run.column(key)
        at, tokens = run.column("tokens_sampled")
        if len(steps):
            drawn = np.interp(steps, at, tokens.cumsum()) / 1000
            lines.append(Series(label=name, colour=colour, x=drawn, y=values))
    return lines


if __name__ == "__main__":
    main()
