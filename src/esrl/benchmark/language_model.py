"""The section ``language-model``: a step of GRPO on a causal model, beside TRL's."""

from __future__ import annotations

import statistics

from esrl.benchmark.language_steps import LANGUAGE_STEPS
from esrl.benchmark.measure import Meter, Result, Row, spread
from esrl.benchmark.workloads import BenchmarkModel, Workload
from esrl.models.seq2seq import Preset

MODEL = BenchmarkModel(
    sizes=Preset(width=256, layers=6, heads=4, inner_width=704), vocabulary=8000, mean_length=20, family="llama"
)
SAMPLES = (8,)
PROMPT_TOKENS = (20, 300)


def language_model(models: list[str], samples: tuple[int, ...] | None, meter: Meter) -> tuple[list[Row], list[Row]]:
    """Seconds, tokens per second and peak memory of a step; the choice of models is that of the other sections."""
    workloads = [
        Workload(name="llama", model=MODEL, samples=k, source_tokens=tokens)
        for tokens in PROMPT_TOKENS
        for k in samples or SAMPLES
    ]
    results, not_run = meter.run(workloads, "language-step", list(LANGUAGE_STEPS))
    return [_row(result, name) for result in results for name in result.measured], not_run


def _row(result: Result, name: str) -> Row:
    measured, ours = result.measured[name], result.measured.get("esrl")
    speedups = [] if ours is None else [us / them for us, them in zip(ours.rates, measured.rates, strict=True)]
    return {
        **result.place(name),
        "source_tokens": result.workload.source_tokens,
        "tokens_per_second": spread(measured.rates),
        "seconds": spread(measured.seconds_per_run),
        "peak_memory_mb": round(measured.peak_memory_mb, 1),
        "esrl_speedup": statistics.median(speedups) if speedups else None,  # of the ratios within a round
        **result.lengths(name),
    }
