"""The section ``limit``: what this machine can do at most, and the share of it that the two stages reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from esrl.benchmark.measure import Meter, Row
from esrl.benchmark.processes import Measured
from esrl.benchmark.workloads import MODELS, Workload
from esrl.kernels import LaidOut, kernels
from esrl.models.linear import FrozenLinear

_SECONDS = 0.3
_SIZES = (512, 1024, 2048)
_COPIED = 1 << 26  # float32 numbers: 256 MB, more than any cache holds
_SAMPLES = 20
_UNIT = "operations (float32)"


def limit(models: list[str], samples: tuple[int, ...] | None, meter: Meter) -> tuple[list[Row], list[Row]]:
    """Rates of the machine and of a step's stages in turns: operations counted as they are dispatched.

    A machine that others use, or that gets warm, does not do at all times what it does at best. So the machine's own
    rates are measured before each round, like contestants', and a stage's share is that of the rate of its round.
    """
    torch.set_num_threads(meter.threads)
    machine = _Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    workloads = [Workload(name=name, model=MODELS[name], samples=k) for name in models for k in samples or (_SAMPLES,)]

    def before_round() -> None:
        meter.progress("limit: matrix products and copies")
        machine.measure()

    results, not_run = replace(meter, count=True, before_round=before_round).run(workloads, "step", ["esrl"])
    rows: list[Row] = []
    for index, result in enumerate(results):
        if "esrl" in result.measured:
            products = machine.products[index * meter.repetitions :][: meter.repetitions]
            describe = result.workload.describe(result.parameters)
            rows += _stages(result.measured["esrl"], products, result.workload.name, describe)
    for row in rows:
        row["share_of_fastest"] = row["giga_per_second"] / machine.fastest
    return [*machine.rows(), *rows], not_run


def _stages(measured: Measured, products: list[float], name: str, describe: str) -> list[Row]:
    rows: list[Row] = []
    for stage, title in (("sample", "stage one"), ("score", "stage two")):
        rates = [
            measured.operations[stage] * sum(lengths) / stages[stage] / 1e9
            for lengths, stages in zip(measured.lengths, measured.stages, strict=True)
        ]
        rows.append(
            {
                "quantity": f"{title}, {name}",
                "giga_per_second": statistics.median(rates),
                "unit": _UNIT,
                "share": statistics.median(rate / limit for rate, limit in zip(rates, products, strict=True)),
                "workload": describe,
            }
        )
    return rows


@dataclass(slots=True)
class _Machine:
    """Rates of the machine, round by round, in 10^9 a second."""

    device: torch.device
    products: list[float] = field(default_factory=list)  # of the kind that is fastest in a round, its middle call
    tiled: list[float] = field(default_factory=list)  # on the matrix unit for bfloat16, where there is one
    copies: list[float] = field(default_factory=list)
    fastest: float = 0.0  # of all calls

    @torch.no_grad()
    def measure(self) -> None:
        """One round: products by PyTorch and by our kernels in float32's own units, of several sizes; and copies.

        Our products on a matrix unit for bfloat16 are shown, too, but a stage's share is not of them: no library has
        such products, and a stage that gets faster by them would seem to have got worse.
        """
        rates, tiled = [], []
        native = kernels() if self.device.type == "cpu" else None
        for size in _SIZES:
            operations = 2 * size**3 / 1e9
            left, right = torch.randn(size, size, device=self.device), torch.randn(size, size, device=self.device)
            for work in (partial(torch.mm, left, right), partial(FrozenLinear(right, None), left)):
                seconds = _calls(work)
                rates.append(operations / statistics.median(seconds))
                self.fastest = max(self.fastest, operations / min(seconds))
            if native is not None and native.tiles:
                tiles = LaidOut(native, right, None, tiles=True)
                tiled.append(operations / statistics.median(_calls(partial(tiles, left))))
        self.products.append(max(rates))
        self.tiled += [max(tiled)] if tiled else []
        source = torch.ones(_COPIED, device=self.device)
        target = torch.empty_like(source)
        self.copies.append(2 * 4 * _COPIED / statistics.median(_calls(lambda: target.copy_(source))) / 1e9)

    def rows(self) -> list[Row]:
        """The machine's own: medians of the rounds."""
        if not self.products:
            return []
        products = {
            "matrix products": statistics.median(self.products),
            "matrix products, the fastest call": self.fastest,
        }
        if self.tiled:
            products["matrix products, ours on the matrix unit"] = statistics.median(self.tiled)
        return [
            *({"quantity": name, "giga_per_second": rate, "unit": _UNIT} for name, rate in products.items()),
            {"quantity": "copy", "giga_per_second": statistics.median(self.copies), "unit": "bytes read and written"},
        ]


def _calls(work: Callable[[], torch.Tensor]) -> list[float]:
    """Seconds of each of the calls that fit into a turn, after one that does not count."""
    work()
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not seconds or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds
