"""The section ``stage-one``: tokens sampled per second, ours and its peers'."""

from __future__ import annotations

from dataclasses import replace

from esrl.benchmark.contestants import CONTESTANTS
from esrl.benchmark.measure import Meter, Result, Row
from esrl.benchmark.workloads import MODELS, Workload

RANKED = ("esrl", "generate", "ctranslate2-float32")
"""int8 arithmetic gives other samples: it is shown, not ranked."""

SAMPLES = (1, 5, 20)
LONG_SOURCE_SUMMARY = 60
"""Tokens of a summary on average, which is what long sources are for; with samples of 11 or 20 tokens, encoding the
source, the same work for all, is most of the time (docs/performance.md)."""


def stage_one(models: list[str], samples: tuple[int, ...] | None, meter: Meter) -> tuple[list[Row], list[Row]]:
    """Every k on every model; without a choice of k also the case of long sources."""
    workloads = [Workload(name=name, model=MODELS[name], samples=k) for name in models for k in samples or SAMPLES]
    if samples is None:
        workloads += [_long_source(name) for name in models]
    results, not_run = meter.run(workloads, "sample", list(CONTESTANTS))
    return [_row(result, name) for result in results for name in result.measured], not_run


def _long_source(name: str) -> Workload:
    model = replace(MODELS[name], mean_length=LONG_SOURCE_SUMMARY)
    return Workload(name=name, model=model, samples=5, source_tokens=500, max_new_tokens=128)


def _row(result: Result, name: str) -> Row:
    return {**result.rates(name), "ranked": name in RANKED}
