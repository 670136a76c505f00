"""The values that flow through one step, and the shape legend.

Shapes by letter, everywhere in this package:

    P  prompts of a step          R  rows: all samples of all prompts, rows of one prompt contiguous
    S  source (prompt) tokens     T  target (sampled) tokens
    V  vocabulary                 D  model width

A mask is True where there is a token. A group is the rows of one prompt; groups are ragged, so nothing is ever
reshaped to (P, k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """A batch of inputs.

    ``example_ids`` are stable across epochs, shuffling and processes: a hash of the example's content plus its
    occurrence number. ``columns`` holds every column of the data by name, one string per prompt.
    """

    example_ids: tuple[str, ...]
    input_ids: Tensor  # (P, S) int64
    mask: Tensor  # (P, S) bool
    columns: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.example_ids)

    def select(self, indices: Sequence[int]) -> Prompts:
        """The prompts at ``indices``, cut to the longest source among them."""
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.mask.device)
        mask = self.mask[rows]
        width = max(1, int(mask.sum(1).max())) if len(indices) else 1
        return Prompts(
            example_ids=tuple(self.example_ids[i] for i in indices),
            input_ids=self.input_ids[rows, :width],
            mask=mask[:, :width],
            columns={name: [values[i] for i in indices] for name, values in self.columns.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """How many samples each prompt gets and how hot they are drawn (eq. 8, eq. 9).

    A temperature of 0 means greedy. ``num_samples`` of 0 leaves a prompt out of the step (``eliminate = "prompts"``).
    """

    num_samples: Tensor  # (P,) int64
    temperature: Tensor  # (P,) float64

    @staticmethod
    def greedy(num_prompts: int) -> SamplingPlan:
        """One greedy decode for each prompt."""
        return SamplingPlan(
            num_samples=torch.ones(num_prompts, dtype=torch.int64),
            temperature=torch.zeros(num_prompts, dtype=torch.float64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """What stage one returns: sampled sequences and what was recorded while they were drawn.

    A row's mask runs up to and including its first end-of-sequence token; a row cut at the length limit has none
    (``finished`` is False). All per-token values are 0 outside the mask.
    """

    prompt_index: Tensor  # (R,) int64, never falling
    sample_index: Tensor  # (R,) int64, the sample's number within its prompt
    tokens: Tensor  # (R, T) int64
    mask: Tensor  # (R, T) bool
    finished: Tensor  # (R,) bool
    log_probs: Tensor  # (R, T) at temperature 1
    sampling_log_probs: Tensor  # (R, T) at the row's temperature
    texts: tuple[str, ...] = ()
    records: dict[str, Tensor] = field(default_factory=dict)  # (R, T) each: "entropy", "max_prob", when asked for

    @property
    def num_rows(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def lengths(self) -> Tensor:
        """(R,) real tokens of each row, EOS included."""
        return self.mask.sum(1)
