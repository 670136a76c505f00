"""Segment reductions against loops over the groups."""

from __future__ import annotations

import math

import pytest
import torch

from esrl.algorithm.groups import Groups

GROUPS = Groups(torch.tensor([0, 0, 2, 2, 2, 3]), 4)  # prompt 1 has no row


def test_sum_mean_spread_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0, 0.0])
    assert GROUPS.sum(values).tolist() == [3, 0, 12, 6]
    # prompt 0: (1 + 3 * 2) / 4; prompt 2: only the 4; prompt 3: no weight at all
    assert GROUPS.mean(values).tolist() == [1.5, 0, 4, 6]
    assert GROUPS.mean(values, weights).tolist() == [1.75, 0, 4, 0]
    assert GROUPS.spread(torch.tensor([7.0, 8.0, 9.0, 1.0])).tolist() == [7, 7, 9, 9, 9, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_is_the_softmax_of_each_group(dtype: torch.dtype):
    scores = torch.tensor([0.3, -1.0, 1e4, 1e4 - 1, -1e4, -3e4], dtype=dtype, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=dtype)
    result = GROUPS.softmax(scores)
    (gradient,) = torch.autograd.grad((result * weight).sum(), scores)
    leaf = scores.detach().clone().requires_grad_()
    expected = torch.cat([part.softmax(0) for part in leaf.split([2, 3, 1])])
    (oracle,) = torch.autograd.grad((expected * weight).sum(), leaf)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(result, expected, **tolerance)
    torch.testing.assert_close(gradient, oracle, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_of_minus_infinity(dtype: torch.dtype):
    # one of two: all weight on the other; a group of nothing else: weight 0. A factor as large as reward / alpha may
    # come back through it without turning 0 into NaN
    none = -math.inf
    scores = torch.tensor([0.0, none, none, none, none, 0.0], dtype=dtype, requires_grad=True)
    result = GROUPS.softmax(scores)
    (gradient,) = torch.autograd.grad((result * 1e30).sum(), scores)
    assert result.tolist() == [1, 0, 0, 0, 0, 1]
    assert gradient.tolist() == [0] * 6
