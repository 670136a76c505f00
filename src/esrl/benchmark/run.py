"""``benchmark``: the sections that were asked for, measured one after the other."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from esrl.benchmark.language_model import language_model
from esrl.benchmark.limit import limit
from esrl.benchmark.measure import Meter, Progress, Row, installed
from esrl.benchmark.rewards import rewards
from esrl.benchmark.stage_one import stage_one
from esrl.benchmark.step import memory, scale, step
from esrl.benchmark.workloads import MODELS
from esrl.training.run_folder import environment
from esrl.training.storage import write_bytes

Section = Callable[[list[str], tuple[int, ...] | None, Meter], tuple[list[Row], list[Row]]]

SECTIONS: dict[str, Section] = {
    "stage-one": stage_one,
    "step": step,
    "memory": memory,
    "scale": scale,
    "rewards": rewards,
    "limit": limit,
    "language-model": language_model,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """What to measure, and how often."""

    only: tuple[str, ...] = tuple(SECTIONS)
    """Sections: stage-one (tokens sampled per second), step (a whole optimizer step), memory (its peak), scale (rows
    and prompts grow), rewards (sentences scored per second), limit (what the machine can do at most), language-model
    (a step of GRPO beside TRL's)."""
    models: tuple[str, ...] = ("small", "base")
    """Random models: small (8 M parameters, samples of 20 tokens on average) and base (50 M, 11 tokens)."""
    samples: tuple[int, ...] | None = None
    """Samples per prompt, k; each is a workload of its own. Unset: what each section is about."""
    repetitions: int = 3
    """Timed runs of each contestant, after one to warm up."""
    threads: int | None = None
    """Threads of each contestant; as many as torch takes if unset: the physical cores, or OMP_NUM_THREADS."""
    json: bool = False
    """Print one JSON object on standard output; the table goes to standard error."""
    output: Path | None = None
    """A file for the same object, written anew after each section: a run that is stopped keeps what it has measured."""

    def __post_init__(self) -> None:
        _check_names("only", self.only, SECTIONS)
        _check_names("models", self.models, MODELS)
        if self.samples is not None and not self.samples:
            raise ValueError("samples is empty; give at least one number of samples per prompt, such as 20.")
        for name, values in (
            ("samples", self.samples or ()),
            ("repetitions", (self.repetitions,)),
            ("threads", () if self.threads is None else (self.threads,)),
        ):
            if wrong := [value for value in values if value < 1]:
                raise ValueError(f"{name} is {wrong[0]}; it must be 1 or more.")


def benchmark(config: BenchmarkConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure this package beside its peers, each contestant in a process of its own.

    Args:
        progress: is told what runs now, one line at a time.

    Returns:
        A list of rows per section ("stage_one", "step", ...), "not_run" (contestants left out, each with its reason)
        and "machine".
    """
    threads = config.threads or torch.get_num_threads()
    result: dict[str, Any] = {"not_run": [], "machine": machine(threads)}
    meter = Meter(config.repetitions, threads, progress or (lambda _: None))
    for name in dict.fromkeys(config.only):
        rows, left_out = SECTIONS[name](list(dict.fromkeys(config.models)), config.samples, meter)
        result[name.replace("-", "_")] = rows
        result["not_run"] += left_out
        if config.output is not None:
            whole = config.output.with_name(f".{config.output.name}.partial")
            write_bytes(whole, (json.dumps(result, indent=1) + "\n").encode())
            whole.replace(config.output)
    return result


def machine(threads: int) -> dict[str, Any]:
    """Hardware, versions and commit, and how busy the machine is."""
    values = environment()
    values["threads"] = threads
    values["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if installed("ctranslate2"):
        values["packages"]["ctranslate2"] = metadata.version("ctranslate2")
    return values


def _check_names(field: str, names: tuple[str, ...], known: Iterable[str]) -> None:
    known = list(known)
    if not names:
        raise ValueError(f"{field} is empty; give at least one of {', '.join(known)}.")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            raise ValueError(f"{field} holds {name!r}, which is not known. {hint}")
