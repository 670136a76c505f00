"""Reductions over the ragged groups of rows that belong to one prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """Which prompt each row belongs to; a prompt may have no row.

    Args:
        index: (R,) int64, the prompt of each row.
        num_groups: P.
    """

    index: Tensor
    num_groups: int

    def sum(self, values: Tensor) -> Tensor:
        """(R,) -> (P,); 0 for a prompt without rows."""
        return values.new_zeros(self.num_groups).index_add(0, self.index, values)

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """(R,) -> (P,) weighted mean; 0 where the weights of a prompt sum to 0."""
        weights = torch.ones_like(values) if weights is None else weights
        total = self.sum(weights)
        return self.sum(weights * values) / torch.where(total > 0, total, 1.0)

    def spread(self, per_group: Tensor) -> Tensor:
        """(P,) -> (R,): every row gets its prompt's value."""
        return per_group[self.index]

    def softmax(self, scores: Tensor) -> Tensor:
        """(R,) -> (R,) softmax within each prompt; a score of -inf has weight 0, even where a prompt has no other."""
        top = scores.new_full((self.num_groups,), -torch.inf)
        top = top.scatter_reduce(0, self.index, scores.detach(), reduce="amax")
        top = torch.where(torch.isfinite(top), top, 0.0)
        weights = torch.exp(scores - self.spread(top))
        total = self.sum(weights)
        # not clamp_min(tiny): 1 / tiny overflows on the way back, and 0 * inf would be a NaN gradient
        return weights / self.spread(torch.where(total > 0, total, 1.0))
