"""The parent's side of the contestants' processes: start, ask, stop; and the rounds in which they take turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import esrl
from esrl.benchmark.contestants import Job

WORKER = "esrl.benchmark.worker"
_STOP_SECONDS = 10
# OpenMP's threads spin for up to 0.2 s after their work (Intel's default), which the next contestant would pay for
_PAUSE_SECONDS = 0.3


class ContestantFailure(Exception):
    """A contestant's process gave up or died; the message says why."""


class ContestantProcess:
    """One contestant in a process of its own; use as a context manager.

    It sleeps on its pipe while it is not asked, so only one of several works at a time, and it ends with the pipe.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        # the same source tree as ours, and (-P) nothing of the working directory
        search = [str(Path(esrl.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, search))},
        )

    def __enter__(self) -> ContestantProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):  # what a dead process has not read cannot be flushed
            self.process.stdin.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            ContestantFailure: the process answered that it failed, or died.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):  # it has died: the end of its answers says so
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            code = self.process.wait()
            hint = ", which the system sends when memory runs out" if code == -9 else ""
            raise ContestantFailure("died of " + (f"signal {-code}{hint}" if code < 0 else f"exit code {code}"))
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ContestantFailure(answer["failed"])
        return answer


@dataclass(slots=True)
class Measured:
    """What one contestant did, round by round."""

    seconds: list[float] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)  # in each round
    stages: list[dict[str, float]] = field(default_factory=list)  # seconds by stage, in each round
    lengths: list[list[int]] = field(default_factory=list)  # of every sample, per round
    peak_memory_mb: float = 0.0
    operations: dict[str, float] = field(default_factory=dict)  # per sampled token, by stage, if counted
    failure: str | None = None

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [sum(lengths) / seconds for lengths, seconds in zip(self.lengths, self.seconds, strict=True)]

    @property
    def seconds_per_run(self) -> list[float]:
        """Of each round."""
        return [seconds / runs for seconds, runs in zip(self.seconds, self.runs, strict=True)]


def take_turns(
    jobs: list[Job],
    repetitions: int,
    progress: Callable[[str], None],
    *,
    count: bool = False,
    before_round: Callable[[], None] = lambda: None,
) -> dict[str, Measured]:
    """Run the jobs in turns: each process is warmed up by one run, then every round asks each for one.

    What disturbs the machine for a while so disturbs all of them, and the ratios within a round hold. A contestant
    that fails is left out from then on.
    """
    measured = {job.contestant: Measured() for job in jobs}
    with contextlib.ExitStack() as stack:
        processes: dict[str, ContestantProcess] = {}

        def ask(name: str, request: Mapping[str, Any]) -> dict[str, Any]:
            if measured[name].failure is None:
                try:
                    return processes[name].ask(request)
                except ContestantFailure as failure:
                    measured[name].failure = str(failure)
            return {}

        for job in jobs:
            progress(f"{job.contestant}: warm-up")
            processes[job.contestant] = stack.enter_context(ContestantProcess(job))
            ask(job.contestant, asdict(job))
            ask(job.contestant, {"run": 0})
        for repetition in range(1, repetitions + 1):
            before_round()
            for name, values in measured.items():
                progress(f"{name}: round {repetition} of {repetitions}")
                time.sleep(_PAUSE_SECONDS)
                if answer := ask(name, {"run": repetition}):
                    values.seconds.append(answer["seconds"])
                    values.runs.append(answer["runs"])
                    values.stages.append(answer["stages"])
                    values.lengths.append(answer["lengths"])
        for name, values in measured.items():
            values.peak_memory_mb = ask(name, {"memory": True}).get("peak_memory_mb", 0.0)
            if count:  # one more run
                values.operations = ask(name, {"count": 1}).get("operations", {})
    return measured
