"""Micro-batches that halve when memory runs out, and begin the step anew."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from esrl.errors import OutOfMemoryError
from esrl.training.accumulation import Accumulation

NUMBERS = [1.0, 2.0, 3.0, 4.0, 5.0]


def split(tokens: int) -> list[list[float]]:
    """A number takes 10 tokens."""
    size = max(1, tokens // 10)
    return [NUMBERS[start : start + size] for start in range(0, len(NUMBERS), size)]


class Run:
    """The gradient of w * sum(numbers), in parts of which more than ``fits`` numbers fail."""

    def __init__(self, fits: int, tokens: int) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        self.model.weight.grad = torch.full((1, 1), 100.0)  # what was there before stays
        self.fits = fits
        self.calls = 0
        self.accumulation = Accumulation(self.model, tokens, "buy more.")

    def backward(self, part: Sequence[float]) -> tuple[float, float]:
        self.calls += 1
        (self.model.weight.sum() * sum(part)).backward()
        if len(part) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sum(part), float(len(part))


@pytest.mark.parametrize(("fits", "tokens", "kept"), [(5, 50, 50), (2, 50, 25), (1, 50, 12), (3, 40, 20)])
def test_the_step_begins_anew_with_smaller_parts(fits, tokens, kept):
    run = Run(fits, tokens)
    assert run.accumulation.run(split, run.backward, 2) == [15.0, 5.0]
    assert run.model.weight.grad.item() == 115.0
    assert run.accumulation.state_dict() == {"micro_batch_tokens": kept}
    other = Run(fits, tokens)
    other.accumulation.load_state_dict(run.accumulation.state_dict())
    other.accumulation.run(split, other.backward, 2)
    assert other.calls == len(split(kept))  # nothing fails any more


def test_one_example_too_large_is_an_error_with_the_remedy():
    with pytest.raises(OutOfMemoryError, match="one example per micro-batch; buy more"):
        run = Run(0, 50)
        run.accumulation.run(split, run.backward, 2)


def test_other_failures_pass():
    run = Run(5, 50)

    def backward(part: Sequence[float]) -> tuple[float, float]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run.accumulation.run(split, backward, 2)


def test_no_parts_give_zeros():
    run = Run(5, 50)
    assert run.accumulation.run(lambda tokens: [], run.backward, 2) == [0.0, 0.0]
