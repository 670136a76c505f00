"""Memory of the two stages: a pool in huge pages, which PyTorch's tensors come from within a stage."""

from __future__ import annotations

import copy
import functools
import mmap
import os
import random
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from esrl.kernels import Native, build, kernels, memory, why_not
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.training.oom import is_out_of_memory

CPU = torch.device("cpu")
MB = 1 << 20


@pytest.fixture
def pool() -> Iterator[Native]:
    found = memory._pool()
    if found is None:
        pytest.skip(f"PyTorch has no pool here: {why_not() or 'its allocator cannot be built'}")
    memory.release()
    yield found


def in_pool(tensor: torch.Tensor) -> bool:
    """Whether it lies in a mapping that has addresses for half of the memory there is: nothing else is so large."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(place, 16) for place in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return last - first > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    raise AssertionError("it lies nowhere")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_where_this_machine_has_a_compiler_there_is_a_pool():
    if kernels() is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    assert memory._pool() is not None, build.allocator()


def test_tensors_come_from_the_pool_within_a_stage(pool):
    with memory.stage(CPU):
        inside = [torch.ones(MB), torch.ones(9_000), torch.ones(9_001)]
        little = torch.ones(100)
        with memory.stage(CPU):
            inside.append(inside[0] + 1)
        inside.append(inside[0] * 3)
        with memory.stage(torch.device("meta")):
            inside.append(inside[0] - 1)
    outside = [little, torch.ones(MB), inside[0].clone()]
    with memory.stage(torch.device("meta")):
        outside.append(torch.ones(MB))
    assert all(map(in_pool, inside)) and not any(map(in_pool, outside))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in inside)
    assert [float(tensor.sum()) for tensor in inside] == [MB, 9_000, 9_001, 2 * MB, 3 * MB, 0]


def test_a_stage_that_fails_is_left(pool):
    with pytest.raises(ValueError, match="stage two"), memory.stage(CPU):
        raise ValueError("stage two")
    assert not in_pool(torch.ones(MB))


def test_a_stage_is_one_threads_own(pool):
    """What it has made may be given back anywhere."""
    made: list[torch.Tensor] = []
    with memory.stage(CPU):
        other = threading.Thread(target=lambda: made.append(torch.ones(MB)))
        other.start()
        other.join()
        mine = [torch.ones(MB)]
    at = mine[0].data_ptr()
    assert not in_pool(made[0]) and in_pool(mine[0])
    other = threading.Thread(target=mine.clear)
    other.start()
    other.join()
    with memory.stage(CPU):
        assert torch.empty(MB).data_ptr() == at


def test_the_lowest_place_with_room_is_taken(pool):
    with memory.stage(CPU):
        low, middle, high, last = (torch.empty(MB) for _ in range(4))
        places = [tensor.data_ptr() for tensor in (low, middle, high, last)]
        assert places == sorted(places)
        del high
        del low
        assert torch.empty(MB // 2).data_ptr() == places[0]
        more = torch.empty(MB + 1000)
        assert more.data_ptr() > places[3]  # two places, and neither has room enough
        del middle  # now they are one
        assert torch.empty(3 * MB).data_ptr() == places[0]


def test_what_is_in_use_is_nobody_elses(pool):
    """Tensors of all sizes come and go in any order; each keeps its numbers, and all of it is one place in the end."""
    rng, alive = random.Random(1), []
    with memory.stage(CPU):
        first = torch.empty(MB).data_ptr()
        for number in range(2000):
            if alive and rng.random() < 0.5:
                tensor, value = alive.pop(rng.randrange(len(alive)))
                assert bool((tensor == value).all())
                if rng.random() < 0.1:
                    del tensor
                    memory.release()
            else:
                alive.append((torch.full((rng.choice([9_000, 12_345, 300_000]) + rng.randrange(99),), number), number))
        assert all(bool((tensor == value).all()) for tensor, value in alive)
        alive.clear()
        del tensor
        assert torch.empty(100 * MB).data_ptr() == first


def test_threads_share_it(pool):
    wrong: list[int] = []

    def work(number: int) -> None:
        with memory.stage(CPU):
            for turn in range(3000):
                tensors = [torch.full((9_000 + 997 * (turn % 7),), number) for _ in range(3)]
                wrong.extend(number for tensor in tensors[turn % 2 :] if not bool((tensor == number).all()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pages_without_anything_go_back(pool):
    with memory.stage(CPU):
        low, middle, high = (torch.ones(64 * MB) for _ in range(3))
    before, places = resident(), (low.data_ptr(), high.data_ptr())
    del low, high
    assert resident() > before - 16 * MB  # until somebody asks
    memory.release()
    assert before - 512 * MB - 16 * MB < resident() < before - 512 * MB + 16 * MB
    with memory.stage(CPU):
        again = torch.full((64 * MB,), 2.0), torch.full((64 * MB,), 3.0)
    assert (again[0].data_ptr(), again[1].data_ptr()) == places
    assert bool((middle == 1).all()) and resident() > before - 16 * MB
    del again
    memory.release()
    assert resident() > before - 512 * MB - 16 * MB  # the middle
    del middle
    memory.release()
    assert resident() < before - 768 * MB + 16 * MB


def test_a_tensor_that_grows_outside_of_a_stage(pool):
    with memory.stage(CPU):
        tensor = torch.arange(MB)
    tensor.resize_(2 * MB)
    assert not in_pool(tensor) and torch.equal(tensor[:MB], torch.arange(MB))


def test_a_lack_of_memory_is_said_as_ever(pool):
    with memory.stage(CPU), pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46)
    assert is_out_of_memory(caught.value)


def test_the_profiler_sees_it(pool):
    with torch.profiler.profile(profile_memory=True) as profile, memory.stage(CPU):
        tensor = torch.empty(MB)
        del tensor
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert 4 * MB in sizes and -4 * MB in sizes


def test_children_go_on_with_it(pool):
    """Forked while another thread is about to take or to give."""
    done = threading.Event()

    def work() -> None:
        with memory.stage(CPU):
            while not done.is_set():
                torch.empty(10_000)

    other = threading.Thread(target=work)
    other.start()
    try:
        for _ in range(100):
            if not (child := os.fork()):
                signal.alarm(10)
                with memory.stage(CPU):
                    torch.empty(10_000)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        other.join()


@pytest.mark.parametrize("missing", ["kernels", "headers", "another allocator"])
def test_without_a_pool_everything_is_mallocs(pool, missing, monkeypatch):
    def cannot() -> Path:
        raise build.CannotBuildError("no such file")

    if missing == "kernels":
        monkeypatch.setattr(memory, "kernels", lambda: None)
    if missing == "headers":
        monkeypatch.setattr(build, "allocator", cannot)
    # the third: the pool's own is there already
    none = memory._pool.__wrapped__()
    assert none is None
    monkeypatch.setattr(memory, "_pool", functools.cache(lambda: none))
    with memory.stage(CPU):
        assert not in_pool(torch.ones(MB))
    memory.release()


def test_both_stages_are_in_the_pool_and_give_the_same_to_the_bit(pool, random32, prompts, make_plan, monkeypatch):
    policy, inside = copy.deepcopy(random32), []
    encode, found = policy.encode, {}
    monkeypatch.setattr(policy, "encode", lambda *args: inside.append(in_pool(torch.ones(MB))) or encode(*args))
    for name in ("first", "again", "malloc's"):
        if name == "malloc's":
            monkeypatch.setattr(memory, "_pool", lambda: None)
        sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=30), seed=1)
        rollouts = sampler.sample(prompts, make_plan([40] * len(prompts), 1.0))
        assert rollouts.tokens.nbytes > 1 << 15 and not in_pool(rollouts.tokens)  # it lives on, not in others' way
        policy.model.zero_grad()
        stage_two = StageTwo(policy, GradientConfig())
        scores = stage_two.log_probs(prompts, rollouts, None, seed=3)
        stage_two.backward(prompts, rollouts, rollouts.mask.float(), None, seed=3)
        gradients = [parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None]
        found[name] = [rollouts.tokens, rollouts.log_probs, scores, *gradients]
    assert inside == [True] * 6 + [False] * 3 and len(found["first"]) > 40
    for name in ("again", "malloc's"):
        for tensor, expected in zip(found[name], found["first"], strict=True):
            assert torch.equal(tensor, expected)


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
    area = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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
