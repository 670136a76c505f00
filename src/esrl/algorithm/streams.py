"""Counter-based random numbers: what is drawn depends on names and positions, never on the order of work.

Every stream has a name, for example (seed, epoch, example id, sample). Its key is the BLAKE2b hash of the name, its
values are the raw output of Philox4x64 (Salmon et al. 2011) at counters 0, 1, 2, ...; NumPy guarantees that raw
output to stay the same. A resumed run, another batch size or another number of processes draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LOW = 2**64 - 1


def stream_key(*name: object) -> int:
    """The 128-bit key of the stream with this name."""
    text = "\x1f".join(str(part) for part in name)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def stream_uniforms(count: int, *name: object) -> np.ndarray:
    """The first ``count`` values of a stream, in [0, 1), float64, multiples of 2**-53."""
    return _uniform(np.random.Philox(key=stream_key(*name)).random_raw(count))


def sample_uniforms(
    seed: int, epoch: int, example_ids: Sequence[str], sample_index: Sequence[int], length: int
) -> Tensor:
    """(R, length) float64: one uniform number for each token position of each sample (method.md, section 4)."""
    raw = np.empty((len(example_ids), length), np.uint64)
    philox = np.random.Philox(key=0)
    state = philox.state  # with another key it is as if made anew, in a fifth of the time
    for row, example, sample in zip(raw, example_ids, sample_index, strict=True):
        key = stream_key("sample", seed, epoch, example, sample)
        state["state"]["key"][:] = key & _LOW, key >> 64
        philox.state = state
        row[:] = philox.random_raw(length)
    return torch.from_numpy(_uniform(raw))


def plan_uniforms(seed: int, epoch: int, example_ids: Sequence[str]) -> Tensor:
    """(P, 2) float64: what ESRL-Random draws its sample size and its temperature from."""
    rows = [stream_uniforms(2, "plan", seed, epoch, example) for example in example_ids]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, 2, dtype=torch.float64)


def permutation(count: int, *name: object) -> list[int]:
    """A random order of ``range(count)``, the same on every machine."""
    return np.argsort(stream_uniforms(count, "permutation", *name), kind="stable").tolist()


def _uniform(raw: np.ndarray) -> np.ndarray:
    return (raw >> np.uint64(11)) * 2.0**-53


def seed_of(*name: object) -> int:
    """A 63-bit seed for a library's own generator (dropout)."""
    return stream_key(*name) & (2**63 - 1)
