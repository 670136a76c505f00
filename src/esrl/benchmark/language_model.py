"""The section ``language-model``: a step of GRPO on a causal model, beside TRL's."""

from __future__ import annotations

from esrl.benchmark.language_steps import LANGUAGE_STEPS
from esrl.benchmark.measure import Meter, Row, spread
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
    rows = [
        {**result.rates(name), "seconds": spread(measured.seconds_per_run)}
        for result in results
        for name, measured in result.measured.items()
    ]
    return rows, not_run
