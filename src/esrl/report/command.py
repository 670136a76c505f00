"""The settings of `esrl report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """`esrl report`: one self-contained HTML file from one or several runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; or one file of results that `esrl benchmark --json` printed."""
    output: Path | None = None
    """The file to write; unset: report.html in the first run's folder, or beside the results under their name."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run given; name one run folder or several: esrl report runs/NAME.")

    @property
    def page(self) -> Path:
        """Where the page goes."""
        first = self.runs[0]
        return self.output or (first.with_suffix(".html") if first.is_file() else first / "report.html")
