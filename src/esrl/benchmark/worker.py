"""The process of one contestant: it builds its model, then runs when told to, and never on its own.

``python -m esrl.benchmark.worker`` reads requests from standard input and answers each on what was standard output,
one JSON object a line: a job -> {"ready": ...}, {"run": turn} -> {"seconds", "runs", "lengths", "stages"},
{"memory": true} -> {"peak_memory_mb"}, {"count": turn} -> {"operations"}, per token by stage. A failure is answered
with {"failed": ...} and ends the process.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from esrl.benchmark.contestants import CONTESTANTS, Contestant, Job, JobKind
from esrl.benchmark.language_steps import LANGUAGE_STEPS
from esrl.benchmark.steps import STEPS, StepContestant
from esrl.kernels import memory as system

TURN_SECONDS = 3.0
"""A turn lasts at least this long."""

_SEEDS_PER_TURN = 1_000_000
_MB = 2**20
_KEPT = 2 * 2**30
"""Bytes above the start that a waiting contestant may keep."""


class PeakMemory:
    """Memory above the point where it was made, in megabytes (2 ** 20 bytes), as the operating system counts it.

    On Linux the kernel's high-water mark is set back first. Elsewhere it cannot be, so a peak that the model's loading
    has already reached counts as 0. On CUDA the device's memory counts: torch's allocator where torch allocates, what
    is missing from the device where another library does.
    """

    def __init__(self, uses_torch: bool) -> None:
        self.cuda = torch.cuda.is_available()
        self.uses_torch = uses_torch
        _give_back()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.resettable = _reset_high_water_mark()
        self.rest = self._rest()

    def peak(self) -> float:
        """The highest so far, above the start."""
        return max(0.0, (self._peak() - self.rest) / _MB)

    def release(self) -> None:
        """Give memory back that the next contestant may need, if it is much.

        Little is kept: a system that takes pages back gives others for them later, slower ones on a virtual machine,
        and whoever is measured in short turns would pay for it in each.
        """
        if self.cuda or not self.resettable or self._rest() - self.rest > _KEPT:
            _give_back()

    def _rest(self) -> int:
        if not self.cuda:
            return _status("VmRSS") if self.resettable else _max_rss()
        return torch.cuda.memory_allocated() if self.uses_torch else _used_on_device()

    def _peak(self) -> int:
        if not self.cuda:
            return _status("VmHWM") if self.resettable else _max_rss()
        return torch.cuda.max_memory_allocated() if self.uses_torch else _used_on_device()


def serve(requests: Iterator[str], answers: Any) -> None:
    """Answer requests until there are no more."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    job = Job(**json.loads(next(requests)))
    kinds: dict[JobKind, Mapping[str, Callable[[Job], Contestant]]] = {
        "sample": CONTESTANTS,
        "step": STEPS,
        "language-step": LANGUAGE_STEPS,
    }
    contestant = kinds[job.kind][job.contestant](job)
    # one short run first: the pages of the libraries' code and their thread pools are not the workload's memory
    contestant.run(seed=0, num_prompts=1)
    memory = PeakMemory(uses_torch=not job.contestant.startswith("ctranslate2"))
    answer({"ready": True})
    for line in requests:
        request = json.loads(line)
        if "memory" in request:
            answer({"peak_memory_mb": memory.peak()})
        elif "count" in request:
            answer({"operations": _operations(contestant, request["count"])})
        else:
            result = _timed(contestant, request["run"])
            memory.release()
            answer(result)


def _timed(contestant: Contestant, turn: int) -> dict[str, Any]:
    """Run once, and again while the turn is too short to be timed well.

    One prompt first, which does not count: systems take memory away from processes that wait, and a fast contestant's
    turn would be spent on getting it back.
    """
    contestant.run(seed=0, num_prompts=1)
    seconds, lengths = 0.0, []
    stages: Counter[str] = Counter()
    for runs in itertools.count(1):
        seed = turn * _SEEDS_PER_TURN + runs
        start = time.perf_counter()
        count = contestant.run(seed)
        seconds += time.perf_counter() - start
        lengths += count()
        stages.update(getattr(contestant, "stages", {}))
        if seconds >= TURN_SECONDS:
            return {"seconds": seconds, "runs": runs, "lengths": lengths, "stages": dict(stages)}
    raise AssertionError("the count has no end")


def _operations(contestant: Contestant, turn: int) -> dict[str, float]:
    """Per sampled token, by stage: what PyTorch and our kernels count. oneDNN, which nobody counts, is turned off."""
    if not isinstance(contestant, StepContestant):
        return {}
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        contestant.counter = counter
        tokens = sum(contestant.run(turn * _SEEDS_PER_TURN)())
    contestant.counter = None
    return {stage: count / tokens for stage, count in contestant.operations.items()}


def _give_back() -> None:
    """All that is kept goes back to the system."""
    system.release()
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """glibc's; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def _max_rss() -> int:
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _used_on_device() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> int:
    """Whatever libraries print goes to standard error: standard output belongs to the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # TRL's trainer uses names that transformers is about to change; turning oneDNN off warns of other processors
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
    try:
        serve(iter(sys.stdin.readline, ""), answers)
    except (ImportError, RuntimeError, ValueError, OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        answers.write(json.dumps({"failed": f"{type(error).__name__}: {message}"}) + "\n")
        answers.flush()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
