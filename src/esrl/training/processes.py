"""What several processes must agree on; with one process everything here is the identity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """The processes of a run, as started by ``accelerate launch`` or ``torchrun``."""

    def __init__(self) -> None:
        self.active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.active else 0
        self.size = dist.get_world_size() if self.active else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This process's part of ``range(count)``: contiguous, so that gathering restores the order."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, joined in order of rank; the same on every process."""
        if not self.active:
            return values
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def sum(self, value: float) -> float:
        """The sum over processes."""
        return float(sum(self.gather([value])))

    def any(self, value: bool) -> bool:
        """Whether it is true on any process."""
        return any(self.gather([value]))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up ``grad`` over processes in one all-reduce; a missing gradient counts as 0.

        One that is missing on every process stays missing, as it would with one process: given a gradient of 0, AdamW
        would still move the parameter, by its momentum and its decay.
        """
        parameters = list(parameters)
        if not self.active or not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        known = gradients[0].new_tensor([p.grad is not None for p in parameters])
        flat: Tensor = torch.cat([*(gradient.flatten() for gradient in gradients), known])
        dist.all_reduce(flat)
        counts = flat[-len(parameters) :].tolist()
        start = 0
        for parameter, count in zip(parameters, counts, strict=True):
            total = flat[start : start + parameter.numel()].view_as(parameter).clone()
            parameter.grad = total if count else None
            start += parameter.numel()
