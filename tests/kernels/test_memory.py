"""Huge pages of stage one: kept from call to call, given back before stage two."""

from __future__ import annotations

import copy
import gc
import mmap
from pathlib import Path

import pytest
import torch

from esrl.kernels import LaidOut, Native, kernels, memory, why_not
from esrl.kernels.native import Arena


@pytest.fixture
def native() -> Native:
    found = kernels()
    if found is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    memory.release()
    return found


def test_memory_is_kept_for_the_next_one(native):
    first = native.large(1 << 20)
    assert first.shape == (1 << 20,) and first.dtype == torch.float32
    first.fill_(1)
    at = first.data_ptr()
    part = first[5:10]
    del first
    assert native.large(1 << 20).data_ptr() != at  # a part of it is still there
    assert part.tolist() == [1] * 5
    del part
    smaller = native.large(1 << 19)  # half as much may have it
    both = {at} | {smaller.data_ptr()}
    del smaller
    assert native.large(1 << 20).data_ptr() in both


def test_much_is_not_kept_for_little(native):
    large = native.large(1 << 23)
    at = large.data_ptr()
    del large
    little = native.large(10)
    assert little.data_ptr() != at
    assert native.large(1 << 23).data_ptr() == at


def mapped() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def test_batches_that_grow_do_not_pile_up(native):
    before = mapped()
    sizes = [round((1 << 24) * 1.2**i) for i in range(12)]
    for count in sizes:
        native.large(count)
    # by halves at most: what is kept is less than twice the largest
    assert mapped() - before < 2.2 * 4 * sizes[-1] < 4 * sum(sizes) / 2


def test_no_memory_is_said(native):
    with pytest.raises(MemoryError, match="there is no memory for 1099511627776000 numbers"):
        native.large(1_099_511_627_776_000)


def test_tensors_of_an_arena_lie_side_by_side(native):
    arena = Arena(native)
    first, second = arena.take(20), arena.take(20)
    assert second.data_ptr() - first.data_ptr() == 128
    first.fill_(1)
    second.fill_(2)
    assert first.tolist() == [1] * 20 and second.tolist() == [2] * 20
    assert arena.take(1 << 25).shape == (1 << 25,)  # more than it gets at a time


def test_a_layer_in_an_arena_is_the_same(native):
    weight, hidden = torch.randn(100, 70), torch.randn(9, 70)
    assert torch.equal(
        LaidOut(native, weight, None, arena=Arena(native))(hidden), LaidOut(native, weight, None)(hidden)
    )


def test_stage_two_takes_over_what_is_kept(native, monkeypatch):
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "trim", lambda: trimmed.append(1))
    with memory.stage_two():
        pass
    assert not trimmed  # nothing was kept: stage one was in malloc's memory
    native.large(1 << 20)
    with memory.stage_two():
        assert not memory.release() and not trimmed
    assert trimmed
    native.large(1 << 20)
    with pytest.raises(ValueError, match="stage two"), memory.stage_two():
        raise ValueError("stage two")
    assert len(trimmed) == 2


def test_without_kernels_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "loaded", lambda: None)
    assert not memory.release()
    with memory.stage_two():
        pass


def test_weights_settle_in_huge_pages_each_with_a_storage_of_its_own(native):
    layer = torch.nn.Linear(900, 700)
    wide = torch.nn.Parameter(torch.randn(9, 9).double())
    turned = torch.nn.Parameter(torch.randn(9, 8).T)
    weights = [layer.weight, layer.bias, wide, turned]
    before, at = [weight.detach().clone() for weight in weights], [weight.data_ptr() for weight in weights]
    memory.settle(weights)
    for weight, expected in zip(weights, before, strict=True):
        assert torch.equal(weight, expected)
    assert [weight.data_ptr() == place for weight, place in zip(weights, at, strict=True)] == [False, False, True, True]
    assert layer.weight.is_leaf and layer.weight.requires_grad
    assert layer.weight.untyped_storage().nbytes() == 4 * 900 * 700
    copy.deepcopy(layer)(torch.ones(1, 900)).sum().backward()
    kept = layer.weight.detach()
    expected = kept.clone()
    del layer, weights, weight
    gc.collect()
    native.large(1 << 24).zero_()  # would take the weights' memory if that were free
    assert torch.equal(kept, expected)


def test_without_memory_weights_stay_where_they_are(native, monkeypatch):
    weight = torch.nn.Parameter(torch.randn(5, 5))
    at = weight.data_ptr()

    def none(self, count: int) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(Arena, "take", none)
    memory.settle([weight])
    assert weight.data_ptr() == at


def test_without_kernels_nothing_settles(monkeypatch):
    monkeypatch.setattr(memory, "kernels", lambda: None)
    weight = torch.nn.Parameter(torch.randn(5, 5))
    at = weight.data_ptr()
    memory.settle([weight])
    assert weight.data_ptr() == at
