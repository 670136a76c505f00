"""The memory that the two stages take turns with on a CPU.

With long sources stage one is in huge pages of its own, kept from call to call (``memory.h``); stage two's memory comes
from malloc, which keeps it likewise. Each gives back what it has kept before the other one begins: the peak is that of
one stage, not of both. With short sources both are in malloc's memory, and nothing is given back.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from esrl.kernels.native import loaded


@contextmanager
def stage_two() -> Iterator[None]:
    """Stage two's turn."""
    taken_over = release()
    try:
        yield
    finally:
        if taken_over:
            trim()


def release() -> bool:
    """Stage one's memory goes back to the system; whether there was any."""
    native = loaded()
    return native is not None and bool(native.library.esrl_release())


def trim() -> None:
    """What malloc has kept goes back to the system, where the C library can do that: glibc."""
    if (function := _malloc_trim()) is not None:
        function(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
