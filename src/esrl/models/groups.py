"""The rows of a batch, laid out by prompt: attention then reads each prompt's keys and values once for all its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PromptGroups:
    """Rows as (prompt, rank within the prompt); ranks that a prompt does not have are filled with zeros."""

    num_prompts: int
    ranks: int
    slots: Tensor | None  # (R,) prompt * ranks + rank; None where the rows lie so already

    @classmethod
    def of(cls, prompt_index: Tensor, num_prompts: int) -> PromptGroups:
        """From (R,) each row's prompt, in any order."""
        rows, device = len(prompt_index), prompt_index.device
        if not rows:
            return cls(num_prompts, 1, prompt_index)
        counts = torch.bincount(prompt_index, minlength=num_prompts)
        order = torch.argsort(prompt_index, stable=True)
        first = torch.cumsum(counts, 0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(rows, device=device) - first[prompt_index[order]]
        ranks = int(counts.max())
        slots = prompt_index * ranks + rank
        in_place = rows == num_prompts * ranks and bool((slots == torch.arange(rows, device=device)).all())
        return cls(num_prompts, ranks, None if in_place else slots)

    def spread(self, rows: Tensor) -> Tensor:
        """(R, ...) -> (P, ranks, ...)."""
        if self.slots is not None:
            room = rows.new_zeros(self.num_prompts * self.ranks, *rows.shape[1:])
            rows = room.index_copy_(0, self.slots, rows)
        return rows.view(self.num_prompts, self.ranks, *rows.shape[1:])

    def collect(self, groups: Tensor) -> Tensor:
        """(P, ranks, ...) -> (R, ...)."""
        rows = groups.reshape(self.num_prompts * self.ranks, *groups.shape[2:])
        return rows if self.slots is None else rows.index_select(0, self.slots)
