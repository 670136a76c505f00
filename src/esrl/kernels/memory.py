"""The memory that the two stages take turns with on a CPU.

With long sources stage one is in huge pages of its own, kept from call to call (``memory.h``); stage two's memory comes
from malloc, which keeps it likewise. Each gives back what it has kept before the other one begins: the peak is that of
one stage, not of both. With short sources both are in malloc's memory, and nothing is given back.
Trained weights are in huge pages, too, where the system can do that.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor

from esrl.kernels.native import loaded

_HUGE_PAGE = 2 << 20
_GAP = 1 << 16
"""Bytes between neighbours, less than this: what the allocator puts between them, and small tensors."""
_MADV_COLLAPSE = 25


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


def collapse(weights: Iterable[Tensor]) -> None:
    """Put weights on the CPU that both stages read again and again in huge pages, where they lie.

    Linux can do that from 6.1 on; elsewhere, and where it has no huge page free, they stay as they are. Neighbours are
    taken together, since a page of 2 MB holds more than one weight.
    """
    if (function := _madvise()) is None:
        return
    for begin, end in _neighbours(weights):
        first, last = -(-begin // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
        if first < last:
            function(first, last - first, _MADV_COLLAPSE)


def _neighbours(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Where weights begin and end in memory, one after the other as one."""
    result: list[tuple[int, int]] = []
    places = [
        (weight.data_ptr(), weight.data_ptr() + weight.nbytes) for weight in weights if weight.device.type == "cpu"
    ]
    for begin, end in sorted(places):
        if result and begin - result[-1][1] < _GAP:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
