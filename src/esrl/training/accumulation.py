"""A step's gradient, added up over micro-batches that halve when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from esrl.errors import OutOfMemoryError
from esrl.training.oom import free_cached_memory, is_out_of_memory

Part = TypeVar("Part")


class Accumulation:
    """Forward and backward in parts; how large they are is the only state.

    Args:
        remedy: what to do when one example alone is too much.
    """

    def __init__(self, model: nn.Module, micro_batch_tokens: int, remedy: str) -> None:
        self.model = model
        self.micro_batch_tokens = micro_batch_tokens
        self.remedy = remedy

    def run(
        self, split: Callable[[int], Sequence[Part]], backward: Callable[[Part], Sequence[float]], numbers: int
    ) -> list[float]:
        """Call ``backward`` for each part and return the sums of the numbers it returns.

        When memory runs out, what the step has added to the gradient is taken back and it begins anew with smaller
        parts, which are kept for the steps to come.

        Args:
            split: tokens of a forward pass to the parts of the step; with fewer tokens there are more of them, until
                each is one example.
            numbers: how many numbers ``backward`` returns, for a step without parts.

        Raises:
            OutOfMemoryError: one example alone is too much.
        """
        parameters = list(self.model.parameters())
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
        while True:
            try:
                totals = [0.0] * numbers
                for part in split(self.micro_batch_tokens):
                    totals = [total + float(value) for total, value in zip(totals, backward(part), strict=True)]
                return totals
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(split, error)
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            free_cached_memory()

    def _shrink(self, split: Callable[[int], Sequence[Part]], error: BaseException) -> None:
        count = len(split(self.micro_batch_tokens))
        while self.micro_batch_tokens > 1:
            self.micro_batch_tokens //= 2
            if len(split(self.micro_batch_tokens)) > count:
                return
        raise OutOfMemoryError(f"out of memory with one example per micro-batch; {self.remedy}") from error

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batch_tokens": self.micro_batch_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.micro_batch_tokens = min(self.micro_batch_tokens, state.get("micro_batch_tokens", self.micro_batch_tokens))
