"""Rows laid out by prompt."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esrl.models.groups import PromptGroups


def test_slots_by_hand():
    # prompt 0 has rows 1 and 3, prompt 1 none, prompt 2 row 0, 2 and 4: three ranks
    groups = PromptGroups.of(torch.tensor([2, 0, 2, 0, 2]), 3)
    assert groups.ranks == 3
    assert groups.slots is not None and groups.slots.tolist() == [6, 0, 7, 1, 8]
    rows = torch.tensor([[10.0], [11.0], [12.0], [13.0], [14.0]])
    assert groups.spread(rows)[:, :, 0].tolist() == [[11, 13, 0], [0, 0, 0], [10, 12, 14]]


def test_rows_that_lie_so_already_are_not_moved():
    groups = PromptGroups.of(torch.tensor([0, 0, 1, 1]), 2)
    rows = torch.arange(8.0).view(4, 2)
    assert groups.slots is None
    assert groups.spread(rows).data_ptr() == rows.data_ptr()
    assert PromptGroups.of(torch.tensor([1, 1, 0, 0]), 2).slots is not None


@given(st.lists(st.integers(0, 4), max_size=12))
@settings(max_examples=100, deadline=None)
def test_collect_undoes_spread_and_so_does_its_gradient(index):
    groups = PromptGroups.of(torch.tensor(index, dtype=torch.int64), 5)
    rows = torch.randn(len(index), 2, 3, dtype=torch.float64, requires_grad=True)
    spread = groups.spread(rows * 1.0)
    assert spread.shape == (5, groups.ranks, 2, 3)
    for row, prompt in enumerate(index):
        assert (spread[prompt] == rows[row]).all(2).all(1).any()
    collected = groups.collect(spread)
    assert torch.equal(collected, rows)
    collected.backward(torch.full_like(collected, 2.0))
    assert rows.grad is not None and bool((rows.grad == 2).all())
