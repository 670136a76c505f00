"""What processor this is: what is fast differs."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def facts() -> dict[str, str]:
    """What Linux says of its first processor, by name ("model name", "flags", ...); elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))  # of a name that comes again, the first counts
    return {name.strip(): value.strip() for name, _, value in pairs}


def is_intels() -> bool:
    """Whether it is one of Intel's."""
    return "GenuineIntel" in (facts().get("vendor_id") or platform.processor())
