"""Stage one's own keys and values: pre-allocated, growing, rows that have ended overwritten by the last ones.

Rows that begin together are a wave and have one cache. Waves that began at different steps are decoded side by side:
linear layers see all their rows at once, attention goes wave by wave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from esrl.models.policy import PromptState

_FIRST_CAPACITY = 8
# prompts whose samples have all ended leave the shared state once they are a quarter of it
_KEEP_PROMPTS = 0.75


class RowCache:
    """What R rows have decoded so far, beside the state of their prompts.

    Args:
        state: the shared prompt state; what is kept of it is that of these rows' prompts.
        prompt_index: (R,) int64, each row's prompt.
    """

    def __init__(self, state: PromptState, prompt_index: Tensor) -> None:
        self.rows = len(prompt_index)
        self.position = 0
        self.device = state.mask.device
        used, self.prompt_index = torch.unique(prompt_index.to(self.device), return_inverse=True)
        # a wave may have few of the prompts: padding and samples that a prompt does not have are computed, too
        self.state = state if len(used) == state.mask.shape[0] else state.select(used)
        self.keys = [self._empty(shared) for shared in state.keys]
        self.values = [self._empty(shared) for shared in state.values]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep (R, H, 1, d) keys and values of the present position; gives views of all so far, (R, H, n, d)."""
        end = self.position + 1
        keys, values = self.keys[layer][: self.rows, :, :end], self.values[layer][: self.rows, :, :end]
        keys[:, :, -1:] = key
        values[:, :, -1:] = value
        return keys, values

    def reserve(self) -> None:
        """Make more room where it is full; rows that have ended are left behind."""
        capacity = self.keys[0].shape[2]
        if self.position < capacity:
            return
        # half of the power of two below: 8, 16, 24, 32, 48, 64, 96, 128, so that usual limits are met exactly
        more = max(_FIRST_CAPACITY, 1 << (capacity.bit_length() - 2))
        for caches in (self.keys, self.values):
            for i, old in enumerate(caches):
                new = old.new_empty(self.rows, old.shape[1], capacity + more, old.shape[3])
                new[:, :, :capacity] = old[: self.rows]
                caches[i] = new

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; most of them should be where they were.

        Only rows that change place are copied. The room of the others is given back when the cache next grows.
        """
        moved = (rows != torch.arange(len(rows), device=self.device)).nonzero()[:, 0]
        source, used = rows[moved], self.position
        for cache in (*self.keys, *self.values):
            cache[moved, :, :used] = cache[source, :, :used]
        self.rows, self.prompt_index = len(rows), self.prompt_index[rows]
        alive, local = torch.unique(self.prompt_index, return_inverse=True)
        if len(alive) == self.rows:  # a row each: in the rows' order, nothing is to be gathered at every step
            self.state = self.state.select(self.prompt_index)
            self.prompt_index = torch.arange(self.rows, device=self.device)
        elif len(alive) < _KEEP_PROMPTS * self.state.mask.shape[0]:
            self.state, self.prompt_index = self.state.select(alive), local

    def _empty(self, shared: Tensor) -> Tensor:
        return shared.new_empty(self.rows, shared.shape[1], _FIRST_CAPACITY, shared.shape[3])


class Wave(Protocol):
    """Rows that have begun together: what they have decoded, and how they read their prompts."""

    cache: RowCache

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        ...


AnyWave = TypeVar("AnyWave", bound=Wave)


class Waves(Generic[AnyWave]):
    """Waves side by side; their rows follow each other in the batch."""

    def __init__(self, first: AnyWave) -> None:
        self.waves: list[AnyWave] = []
        self.add(first)

    def add(self, wave: AnyWave) -> None:
        """Put a wave behind the others."""
        self.waves.append(wave)
        self._count()

    def keep(self, *rows: Sequence[int]) -> None:
        """Go on with these rows of each wave, in this order; a wave without any is gone."""
        for wave, kept in zip(self.waves, rows, strict=True):
            if kept and list(kept) != list(range(wave.cache.rows)):
                wave.keep(torch.tensor(kept, device=wave.cache.device))
        self.waves = [wave for wave, kept in zip(self.waves, rows, strict=True) if len(kept)]
        self._count()

    def each(self, function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
        """``function(wave, its rows of each batch)`` for every wave; the results as one batch again."""
        if len(self.waves) == 1:
            return function(self.waves[0], *batches)
        parts = [batch.split(self.sizes) for batch in batches]
        return torch.cat([function(*own) for own in zip(self.waves, *parts, strict=True)])

    def reserve(self) -> None:
        """Make room for a position."""
        for wave in self.waves:
            wave.cache.reserve()

    def advance(self) -> None:
        """On to the next position."""
        for wave in self.waves:
            wave.cache.position += 1

    def _count(self) -> None:
        self.sizes = [wave.cache.rows for wave in self.waves]
