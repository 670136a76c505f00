"""Identical samples of a prompt: scored once, counted as often as they were drawn (method.md, section 5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from esrl.types import Rollouts

DuplicateRule = Literal["merge", "keep", "drop"]


def handle_duplicates(rollouts: Rollouts, rule: DuplicateRule) -> tuple[Rollouts, Tensor]:
    """Keep the first of each prompt's identical token sequences.

    Returns:
        The rows that are left, in order, and (R',) int64 how often each counts: the number of copies (``merge``) or 1
        (``drop``, and ``keep``, which leaves everything as it is).
    """
    if rule == "keep":
        return rollouts, torch.ones(rollouts.num_rows, dtype=torch.int64)
    copies = _copies(rollouts)
    number = torch.tensor([count if rule == "merge" else 1 for count in copies.values()], dtype=torch.int64)
    return select_rows(rollouts, list(copies)), number


def num_unique(rollouts: Rollouts) -> int:
    """How many different samples there are, those of different prompts taken as different."""
    return len(_copies(rollouts))


def _copies(rollouts: Rollouts) -> dict[int, int]:
    """How often each sample was drawn, by the row of its first copy, in order."""
    tokens = torch.where(rollouts.mask, rollouts.tokens, -1).cpu().numpy()
    first: dict[tuple[int, bytes], int] = {}
    counts: dict[int, int] = {}
    for row, prompt in enumerate(rollouts.prompt_index.tolist()):
        leader = first.setdefault((prompt, tokens[row].tobytes()), row)
        counts[leader] = counts.get(leader, 0) + 1
    return counts


def select_rows(rollouts: Rollouts, rows: list[int]) -> Rollouts:
    """The rollouts of some rows only."""
    index = torch.tensor(rows, dtype=torch.int64, device=rollouts.tokens.device)
    return replace(
        rollouts,
        prompt_index=rollouts.prompt_index[index.to(rollouts.prompt_index.device)],
        sample_index=rollouts.sample_index[index.to(rollouts.sample_index.device)],
        tokens=rollouts.tokens[index],
        mask=rollouts.mask[index],
        finished=rollouts.finished[index],
        log_probs=rollouts.log_probs[index],
        sampling_log_probs=rollouts.sampling_log_probs[index],
        texts=tuple(rollouts.texts[row] for row in rows) if rollouts.texts else (),
        records={name: values[index] for name, values in rollouts.records.items()},
    )
