"""The section ``stage-one``: tokens sampled per second, ours and its peers'."""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esrl.benchmark.contestants import CONTESTANTS, Job
from esrl.benchmark.processes import Measured, take_turns
from esrl.benchmark.workloads import Workload, convert_to_ctranslate2, random_policy

RANKED = ("esrl", "generate", "ctranslate2-float32")
"""int8 arithmetic gives other samples: it is shown, not ranked."""

_STANDARD_ERRORS = 5

Row = dict[str, Any]


def stage_one(
    workloads: list[Workload], repetitions: int, threads: int, progress: Callable[[str], None]
) -> tuple[list[Row], list[Row]]:
    """Measure every contestant on every workload; workloads of one model stand together.

    Returns:
        A row per contestant and workload, and a row with a ``reason`` for each that was not run.
    """
    rows, not_run = [], []
    for model in dict.fromkeys(workload.name for workload in workloads):
        group = [workload for workload in workloads if workload.name == model]
        with tempfile.TemporaryDirectory(prefix="esrl-benchmark-") as temporary:
            progress(f"{model}: building the model")
            folders, missing, parameters = _build(group[0], Path(temporary))
            for workload in group:
                place = {"model": model, "samples": workload.samples}
                jobs = [
                    Job(
                        contestant=name,
                        folder=str(folder),
                        source=workload.source(),
                        samples=workload.samples,
                        max_new_tokens=workload.max_new_tokens,
                        threads=threads,
                    )
                    for name, folder in folders.items()
                ]
                label = f"{model}, {workload.samples} samples: "
                measured = take_turns(jobs, repetitions, _labelled(label, progress))
                failed = {name: values.failure for name, values in measured.items() if values.failure is not None}
                not_run += [{"contestant": name, **place, "reason": why} for name, why in (missing | failed).items()]
                done = {name: values for name, values in measured.items() if values.failure is None}
                rows += [_row(name, workload, parameters, done) for name in done]
    return rows, not_run


def _build(workload: Workload, folder: Path) -> tuple[dict[str, Path], dict[str, str], int]:
    """The model in every contestant's format: folders by contestant, reasons why one has none, parameters."""
    policy = random_policy(workload)
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    policy.save(folder / "model")
    del policy
    folders, missing = {}, {}
    for name in CONTESTANTS:
        engine, _, quantization = name.partition("-")
        if engine != "ctranslate2":
            folders[name] = folder / "model"
        elif not installed("ctranslate2"):
            missing[name] = "ctranslate2 is not installed; pip install 'esrl[bench]'"
        else:
            folders[name] = folder / quantization
            convert_to_ctranslate2(folder / "model", folders[name], quantization)
    return folders, missing, parameters


def _labelled(label: str, progress: Callable[[str], None]) -> Callable[[str], None]:
    return lambda message: progress(label + message)


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def _row(name: str, workload: Workload, parameters: int, done: dict[str, Measured]) -> Row:
    measured, lengths = done[name], _all_lengths(done[name])
    ours = done.get("esrl")
    speedups = [] if ours is None else [us / them for us, them in zip(ours.rates, measured.rates, strict=True)]
    return {
        "contestant": name,
        "model": workload.name,
        "samples": workload.samples,
        "workload": workload.describe(parameters),
        "parameters": parameters,
        "tokens_per_second": spread(measured.rates),
        "peak_memory_mb": round(measured.peak_memory_mb, 1),
        "esrl_speedup": statistics.median(speedups) if speedups else None,  # of the ratios within a round
        "mean_length": statistics.fmean(lengths),
        "lengths_agree": ours is None or lengths_agree(lengths, _all_lengths(ours)),
        "ranked": name in RANKED,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def lengths_agree(lengths: list[int], others: list[int]) -> bool:
    """Whether two mean lengths differ by less than 5 standard errors: the same law up to the luck of the draw."""
    error = math.hypot(*(statistics.pstdev(part) / math.sqrt(len(part)) for part in (lengths, others)))
    return abs(statistics.fmean(lengths) - statistics.fmean(others)) <= _STANDARD_ERRORS * error


def _all_lengths(measured: Measured) -> list[int]:
    return [length for lengths in measured.lengths for length in lengths]
