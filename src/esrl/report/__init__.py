"""One self-contained HTML file from one or several run folders."""

from __future__ import annotations

from esrl.report.page import write_report

__all__ = ["write_report"]
