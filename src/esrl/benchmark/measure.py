"""Measuring contestants on workloads: the model is built once for all, then each takes its turn in its own process."""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esrl.benchmark.contestants import Job, JobKind
from esrl.benchmark.processes import Measured, take_turns
from esrl.benchmark.workloads import Workload, convert_to_ctranslate2, random_llama, random_policy

_STANDARD_ERRORS = 5

Row = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What the contestants did on one workload."""

    workload: Workload
    parameters: int
    measured: dict[str, Measured]

    def place(self, contestant: str) -> Row:
        """What every row begins with."""
        return {
            "contestant": contestant,
            "model": self.workload.name,
            "samples": self.workload.samples,
            "workload": self.workload.describe(self.parameters),
            "parameters": self.parameters,
        }

    def rates(self, contestant: str) -> Row:
        """Tokens per second, memory, lengths, and how many times as fast ours is."""
        measured, ours = self.measured[contestant], self.measured.get("esrl")
        speedups = [] if ours is None else [us / them for us, them in zip(ours.rates, measured.rates, strict=True)]
        return {
            **self.place(contestant),
            "source_tokens": self.workload.source_tokens,
            "tokens_per_second": spread(measured.rates),
            "peak_memory_mb": round(measured.peak_memory_mb, 1),
            "esrl_speedup": statistics.median(speedups) if speedups else None,  # of the ratios within a round
            **self.lengths(contestant),
        }

    def lengths(self, contestant: str) -> Row:
        """The mean length of a contestant's samples, and whether they follow the law of ours."""
        own = _all_lengths(self.measured[contestant])
        ours = self.measured.get("esrl")
        agree = ours is None or lengths_agree(own, _all_lengths(ours))
        return {"mean_length": statistics.fmean(own), "lengths_agree": agree}


@dataclass(frozen=True, slots=True)
class Meter:
    """How to measure: rounds, threads, who is told what runs now, whether operations are counted, what else is done."""

    repetitions: int
    threads: int
    progress: Progress
    count: bool = False  # the operations of steps, too
    before_round: Callable[[], None] = lambda: None

    def run(self, workloads: Sequence[Workload], kind: JobKind, names: Sequence[str]) -> tuple[list[Result], list[Row]]:
        """Measure every contestant on every workload; those of one model stand together.

        Returns:
            A result per workload, and a row with a ``reason`` for each contestant that was not run.
        """
        results: list[Result] = []
        not_run: list[Row] = []
        for group in _by_model(workloads):
            with tempfile.TemporaryDirectory(prefix="esrl-benchmark-") as temporary:
                self.progress(f"{group[0].name}: building the model")
                folders, missing, parameters = _build(group[0], Path(temporary), names)
                for workload in group:
                    measured = self._turns(workload, kind, folders)
                    failed = {name: values.failure for name, values in measured.items() if values.failure is not None}
                    place = {"model": workload.name, "samples": workload.samples}
                    not_run += [
                        {"contestant": name, **place, "reason": why} for name, why in (missing | failed).items()
                    ]
                    done = {name: values for name, values in measured.items() if values.failure is None}
                    results.append(Result(workload, parameters, done))
        return results, not_run

    def _turns(self, workload: Workload, kind: JobKind, folders: dict[str, Path]) -> dict[str, Measured]:
        jobs = [
            Job(
                contestant=name,
                kind=kind,
                folder=str(folder),
                source=workload.source(),
                samples=workload.samples,
                max_new_tokens=workload.max_new_tokens,
                threads=self.threads,
            )
            for name, folder in folders.items()
        ]
        label = f"{workload.name}, {workload.samples} samples: "
        return take_turns(
            jobs,
            self.repetitions,
            lambda message: self.progress(label + message),
            count=self.count,
            before_round=self.before_round,
        )


def _by_model(workloads: Sequence[Workload]) -> Iterator[list[Workload]]:
    for key in dict.fromkeys(_model_of(workload) for workload in workloads):
        yield [workload for workload in workloads if _model_of(workload) == key]


def _model_of(workload: Workload) -> tuple[Any, ...]:
    length = workload.max_length if workload.model.family == "marian" else workload.source_tokens
    return workload.name, workload.model, length, workload.seed


def _build(workload: Workload, folder: Path, names: Sequence[str]) -> tuple[dict[str, Path], dict[str, str], int]:
    """The model in every contestant's format: folders by contestant, reasons why one has none, parameters."""
    policy = (random_llama if workload.model.family == "llama" else random_policy)(workload)
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    policy.save(folder / "model")
    del policy
    folders, missing = {}, {}
    for name in names:
        engine, _, quantization = name.partition("-")
        if engine == "trl" and not installed("trl"):
            missing[name] = "trl is not installed; pip install 'esrl[bench]'"
        elif engine != "ctranslate2":
            folders[name] = folder / "model"
        elif not installed("ctranslate2"):
            missing[name] = "ctranslate2 is not installed; pip install 'esrl[bench]'"
        else:
            folders[name] = folder / quantization
            convert_to_ctranslate2(folder / "model", folders[name], quantization)
    return folders, missing, parameters


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def lengths_agree(lengths: list[int], others: list[int]) -> bool:
    """Whether two mean lengths differ by less than 5 standard errors: the same law up to the luck of the draw."""
    error = math.hypot(*(statistics.pstdev(part) / math.sqrt(len(part)) for part in (lengths, others)))
    return abs(statistics.fmean(lengths) - statistics.fmean(others)) <= _STANDARD_ERRORS * error


def _all_lengths(measured: Measured) -> list[int]:
    return [length for lengths in measured.lengths for length in lengths]
