"""Telling a lack of memory from other failures: PyTorch reports it in several ways."""

from __future__ import annotations

import torch

_MESSAGES = (
    "not enough memory",  # torch's CPU allocator on Windows and macOS
    "can't allocate memory",  # and on Linux
    "out of memory",  # CUDA calls outside torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at a time may help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def free_cached_memory() -> None:
    """Give back what CUDA's allocator keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
