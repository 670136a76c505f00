"""The memory that the two stages take turns with on a CPU.

With long sources stage one is in huge pages of its own, kept from call to call (``memory.h``); stage two's memory comes
from malloc, which keeps it likewise. Each gives back what it has kept before the other one begins: the peak is that of
one stage, not of both. With short sources both are in malloc's memory, and nothing is given back.
Trained weights are in huge pages, too, which stay theirs.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from esrl.kernels.native import Arena, kernels, loaded


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


@torch.no_grad()
def settle(weights: Iterable[Tensor]) -> None:
    """Move weights that both stages read again and again to huge pages, where the system has some.

    Only float32 on the CPU moves, as far as there is memory for it; each has a storage of its own.
    """
    fitting = [weight for weight in weights if weight.device.type == "cpu" and weight.dtype == torch.float32]
    native = kernels() if fitting else None
    if native is None:
        return
    arena = Arena(native)
    with suppress(MemoryError):  # those that are left stay where they are
        for weight in fitting:
            if weight.numel() and weight.is_contiguous():
                place = arena.take(weight.numel())
                place.copy_(weight.view(-1))
                weight.data = _alone(place).view(weight.shape)


def _alone(part: Tensor) -> Tensor:
    """A part of a tensor as one with a storage of its own: to copy or to save it is not to copy or save the whole."""
    numbers = (ctypes.c_float * len(part)).from_address(part.data_ptr())
    weakref.finalize(numbers, part.size).atexit = False  # keeps the part
    return torch.frombuffer(numbers, dtype=torch.float32)
