from __future__ import annotations
import mmap
import torch
from torch import Tensor
MODES: set[str] = set()
ARENA: list = []

def numbers(count: int, mode: str) -> Tensor:
    if mode not in MODES or (count * 4 < 4 << 20 and mode != "w"):
        return torch.empty(count)
    if mode == "w":
        if not ARENA or ARENA[0][1] + count > len(ARENA[0][0]):
            ARENA[:] = [[numbers_(100 << 20), 0]]
        a = ARENA[0]
        at = a[1]
        a[1] += (count + 15) // 16 * 16
        return a[0][at:at + count]
    return numbers_(count)

def numbers_(count):
    room = mmap.mmap(-1, count * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.float32)
