"""The section ``limit``: what this machine can do at most, and the share of it that the two stages reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from esrl.benchmark.measure import Meter, Row
from esrl.benchmark.workloads import MODELS, Workload
from esrl.models.linear import FrozenLinear

_SECONDS = 1.0
_SIZES = (512, 1024, 2048)
_COPIED = 1 << 26  # float32 numbers: 256 MB, more than any cache holds
_SAMPLES = 20


def limit(models: list[str], samples: tuple[int, ...] | None, meter: Meter) -> tuple[list[Row], list[Row]]:
    """Rates of the machine, then of a step's stages: operations counted as they are dispatched."""
    meter.progress("limit: matrix products")
    torch.set_num_threads(meter.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    best = max(_product_rate(size, device) for size in _SIZES)
    rows: list[Row] = [
        {"quantity": "matrix products", "giga_per_second": best, "unit": "operations (float32)"},
        {"quantity": "copy", "giga_per_second": _copy_rate(device), "unit": "bytes read and written"},
    ]
    workloads = [Workload(name=name, model=MODELS[name], samples=k) for name in models for k in samples or (_SAMPLES,)]
    results, not_run = replace(meter, count=True).run(workloads, "step", ["esrl"])
    for result in results:
        measured = result.measured.get("esrl")
        if measured is None:
            continue
        for stage, name in (("sample", "stage one"), ("score", "stage two")):
            seconds = sum(stages[stage] for stages in measured.stages)
            operations = measured.operations[stage] * sum(sum(lengths) for lengths in measured.lengths)
            rate = operations / seconds / 1e9
            rows.append(
                {
                    "quantity": f"{name}, {result.workload.name}",
                    "giga_per_second": rate,
                    "unit": "operations (float32)",
                    "share": rate / best,
                    "workload": result.workload.describe(result.parameters),
                }
            )
    return rows, not_run


@torch.no_grad()
def _product_rate(size: int, device: torch.device) -> float:
    """10^9 operations a second of the fastest product at hand, 2 for each multiplication and addition."""
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    frozen = FrozenLinear(right, None)
    return max(2 * size**3 / _fastest(work) / 1e9 for work in (lambda: left @ right, lambda: frozen(left)))


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(_COPIED, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * _COPIED / _fastest(lambda: target.copy_(source)) / 1e9


def _fastest(work: Callable[[], torch.Tensor]) -> float:
    """Seconds of the fastest of the runs that fit into a second."""
    work()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
