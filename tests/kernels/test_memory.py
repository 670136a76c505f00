"""Huge pages of stage one: kept from call to call, given back before stage two."""

from __future__ import annotations

import mmap
import re
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


def huge(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mappings that a tensor lies in."""
    begin, end, counts, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("AnonHugePages:") and inside:
            counts += int(line.split()[1]) * 1024
        elif re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(place, 16) for place in line.split()[0].split("-"))
            inside = first < end and begin < last
    return counts


def collapses_here() -> bool:
    """Whether this system puts memory into huge pages when asked: a mapping of its own, asked directly."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    area = mmap.mmap(-1, 8 << 20)
    area.write(b"1" * (8 << 20))
    try:
        area.madvise(25)  # MADV_COLLAPSE
    except OSError:
        return False
    return True


@pytest.mark.skipif(not collapses_here(), reason="this system puts nothing into huge pages when asked")
def test_weights_come_into_huge_pages_where_they_lie():
    weight = torch.nn.Parameter(torch.randn(4096, 4096))  # 64 MB: of the system, not of malloc's heap
    at, before = weight.data_ptr(), weight.detach().clone()
    memory.collapse([weight])
    assert huge(weight) > weight.nbytes - (8 << 20)  # where all memory is in huge pages they were there before
    assert weight.data_ptr() == at and torch.equal(weight, before)


def test_what_cannot_come_into_huge_pages_stays(monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(5, 5)), torch.nn.Parameter(torch.randn(1000, 1000))]
    before = [weight.detach().clone() for weight in weights]
    memory.collapse([])
    memory.collapse(weights)
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    memory.collapse(weights)
    assert all(torch.equal(weight, expected) for weight, expected in zip(weights, before, strict=True))


def test_neighbours_are_taken_together(monkeypatch):
    """A page holds several weights, in whatever order; what lies between two pages, or not on the CPU, is left."""
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: asked.append(call))
    page = 2 << 20
    numbers = torch.empty(4 * page)  # of 4 bytes: 16 pages
    start = -numbers.data_ptr() % page // 4
    whole = numbers[start : start + 7 * page // 4]
    size = len(whole) // 7
    first, second, far = whole[: 2 * size - 8], whole[2 * size : 4 * size + 8], whole[5 * size + 8 : 7 * size - 8]
    memory.collapse([far, second, torch.empty(page, device="meta"), first])
    at = whole.data_ptr()
    assert asked == [(at, 4 * page, 25)]
    asked.clear()
    memory.collapse([whole[8 : size + 8]])  # a page's size, but no whole page
    assert not asked
