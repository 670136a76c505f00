"""Memory of the two stages on a CPU.

Within a stage tensors come from a pool in huge pages (``pool.h``), which PyTorch asks before malloc
(``allocator.cpp``): both stages use the same places one after the other, so a step's peak is what lives at once in one
of them. Outside of a stage, and where the kernels or PyTorch's headers are not there, everything is malloc's.
Trained weights are in huge pages, too, where the system can do that.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from esrl.kernels import build
from esrl.kernels.native import Native, kernels

_HUGE_PAGE = 2 << 20
_GAP = 1 << 16
"""Bytes between neighbours, less than this: what the allocator puts between them, and small tensors."""
_MADV_COLLAPSE = 25


@contextmanager
def stage(device: torch.device) -> Iterator[None]:
    """What this thread allocates on a CPU comes from the pool; it may live on."""
    native = _pool() if device.type == "cpu" else None
    if native is None:
        yield
        return
    native.library.esrl_enter()
    try:
        yield
    finally:
        native.library.esrl_leave()


def release() -> None:
    """Pages of the pool that hold nothing go back to the system."""
    if _pool.cache_info().currsize and (native := _pool()) is not None:
        native.library.esrl_release()


@cache
def _pool() -> Native | None:
    """The kernels, once PyTorch asks their pool; None where it does not."""
    native = kernels()
    if native is None:
        return None
    try:
        serve = build.load(build.allocator).esrl_serve
    except (build.CannotBuildError, OSError):
        return None
    serve.argtypes, serve.restype = [ctypes.c_void_p] * 2, ctypes.c_int64
    places = [ctypes.cast(getattr(native.library, f"esrl_{name}"), ctypes.c_void_p) for name in ("take", "give")]
    return native if serve(*places) else None


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
