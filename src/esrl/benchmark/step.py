"""The sections on whole optimizer steps: ``step``, ``memory`` and ``scale``."""

from __future__ import annotations

import dataclasses
import statistics

from esrl.benchmark.measure import Meter, Result, Row, spread
from esrl.benchmark.steps import STEPS
from esrl.benchmark.workloads import MODELS, Workload

SAMPLES = (1, 5, 15, 20)
"""As in the paper's table 1, and 20."""

MEMORY_SAMPLES = (4, 16, 64)
MEMORY_VOCABULARIES = (8_000, 32_000, 250_000)
MEMORY_LENGTHS = (30, 60, 120)
CONVENTIONAL_TOKENS = 4_000
"""The conventional step of the base model needs some 12 GB for so many: more are not asked of the machine."""

SCALE_ROWS = (64, 256, 1024, 4096)
SCALE_PROMPTS = (8, 64, 512)
SCALE_SAMPLES = 2
"""Per prompt, while the prompts grow."""


def step(models: list[str], samples: tuple[int, ...] | None, meter: Meter) -> tuple[list[Row], list[Row]]:
    """Seconds and peak memory of a step, ours and the others'."""
    workloads = [Workload(name=name, model=MODELS[name], samples=k) for name in models for k in samples or SAMPLES]
    results, not_run = meter.run(workloads, "step", list(STEPS))
    return [_row(result, name) for result in results for name in result.measured], not_run


def memory(models: list[str], samples: tuple[int, ...] | None, meter: Meter) -> tuple[list[Row], list[Row]]:
    """Peak memory of a step against k, vocabulary and length, one of them varied at a time.

    A step after the warm-up is enough: a peak does not vary as a time does.
    """
    meter = dataclasses.replace(meter, repetitions=1)
    rows, not_run = [], []
    for name in models:
        usual = Workload(name=name, model=MODELS[name], samples=4)
        varied = {
            "samples": [dataclasses.replace(usual, samples=k) for k in samples or MEMORY_SAMPLES],
            "vocabulary": [
                dataclasses.replace(usual, model=dataclasses.replace(usual.model, vocabulary=size))
                for size in MEMORY_VOCABULARIES
            ],
            "max_new_tokens": [
                # samples that all reach the limit: the law's mean is far beyond it
                dataclasses.replace(usual, max_new_tokens=n, model=dataclasses.replace(usual.model, mean_length=1e4))
                for n in MEMORY_LENGTHS
            ],
        }
        for what, workloads in varied.items():
            for workload in workloads:
                tokens = workload.samples * workload.prompts * workload.expected_length
                alone = tokens > CONVENTIONAL_TOKENS or what == "vocabulary"
                names = ["esrl"] if alone else ["esrl", "conventional-mrt"]
                results, left_out = meter.run([workload], "step", names)
                rows += [_row(result, name) | {"varied": what} for result in results for name in result.measured]
                not_run += left_out
    return rows, not_run


def scale(models: list[str], samples: tuple[int, ...] | None, meter: Meter) -> tuple[list[Row], list[Row]]:
    """Seconds per token as rows and prompts grow; ours."""
    rows: list[Row] = []
    not_run: list[Row] = []
    for name in models:
        usual = Workload(name=name, model=MODELS[name], samples=SCALE_SAMPLES)
        by_rows = [dataclasses.replace(usual, samples=count // usual.prompts) for count in SCALE_ROWS]
        by_prompts = [dataclasses.replace(usual, prompts=count) for count in SCALE_PROMPTS]
        for what, workloads in {"rows": by_rows, "prompts": by_prompts}.items():
            results, left_out = meter.run(workloads, "step", ["esrl"])
            rows += [_row(result, name) | {"varied": what} for result in results for name in result.measured]
            not_run += left_out
    return rows, not_run


def _row(result: Result, name: str) -> Row:
    measured, ours, workload = result.measured[name], result.measured.get("esrl"), result.workload
    seconds = measured.seconds_per_run
    speedups = [] if ours is None else [them / us for us, them in zip(ours.seconds_per_run, seconds, strict=True)]
    stages = {key for stages in measured.stages for key in stages}
    runs = sum(measured.runs)
    return {
        **result.place(name),
        "prompts": workload.prompts,
        "rows": workload.prompts * workload.samples,
        "vocabulary": workload.model.vocabulary,
        "max_new_tokens": workload.max_new_tokens,
        "seconds": spread(seconds),
        "seconds_per_token": sum(measured.seconds) / sum(sum(lengths) for lengths in measured.lengths),
        "stages": {key: sum(stages.get(key, 0.0) for stages in measured.stages) / runs for key in sorted(stages)},
        "peak_memory_mb": round(measured.peak_memory_mb, 1),
        "esrl_speedup": statistics.median(speedups) if speedups else None,
        **result.lengths(name),
    }
