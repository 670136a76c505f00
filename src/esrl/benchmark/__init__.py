"""``esrl benchmark``: this package's speed and memory beside its peers', on this machine, in one run."""

from __future__ import annotations

from esrl.benchmark.run import BenchmarkConfig, benchmark
from esrl.benchmark.show import run_command

__all__ = ["BenchmarkConfig", "benchmark", "run_command"]
