"""Whose processor this is: what is fast differs."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def is_intels() -> bool:
    """Whether it is one of Intel's, as the system says."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        described = platform.processor()
    return "GenuineIntel" in described
