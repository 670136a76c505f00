"""`esrl plan`: how a sampling budget would be spent, without training."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from esrl.algorithm.allocation import AllocationConfig, Allocator
from esrl.commands import make_rl_task
from esrl.config import RLConfig
from esrl.training.checkpoint import CheckpointStore, unpack_json
from esrl.training.rl import RLTask
from esrl.types import Prompts, SamplingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig(RLConfig):
    """`esrl plan`: how would the budget of an `esrl rl` configuration be spent?"""

    output_dir: Path = Path("unused")
    """Not used: nothing is written."""
    steps: int = 4
    """Batches to plan."""
    run: Path | None = None
    """Take the capabilities recorded by this run, and its reward queue, instead of decoding greedily with the model."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be 1 or more: the batches to plan.")


def plan(config: PlanConfig) -> dict[str, Any]:
    """Plan the first batches of epoch 0.

    Returns:
        ``batches``: the figures of each; ``allocators``: what each allocator would spend on the same capabilities;
        ``prompts``: the least and the most capable ones of the first batch.
    """
    with make_rl_task(config) as task:
        if config.run is not None:
            _load_state(task, config.run)
        batches: list[tuple[Prompts, Tensor, int]] = []
        for i in range(min(config.steps, task.num_sample_batches)):
            prompts = task.prompts(0, i)
            batches.append((prompts, *task.capability(prompts, 0, i)))
    allocation = task.method.allocation  # with estimator = "random" not the configuration's
    plans: list[tuple[SamplingPlan, Tensor]] = []
    chosen = []
    for prompts, scores, known in batches:
        planned, capability = task.plan_of(prompts.example_ids, scores, 0)
        plans.append((planned, torch.nan_to_num(capability)))  # NaN: its greedy decode's reward abstained
        chosen.append(_summary(*plans[-1], known, allocation))
    others = {}
    for other in _others(allocation):
        spent = [task.plan_of(prompts.example_ids, scores, 0, other)[0].num_samples for prompts, scores, _ in batches]
        counts = torch.cat(spent)
        others[other.allocator] = {
            "samples": int(counts.sum()),
            "share_of_budget": float(counts.sum()) / (len(counts) * allocation.max_samples),
            "min": int(counts.min()),
            "max": int(counts.max()),
        }
    return {"batches": chosen, "allocators": others, "prompts": _extremes(batches[0][0], *plans[0])}


def show_plan(result: dict[str, Any], as_json: bool) -> None:
    """Print a plan for people, or one JSON object."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    console = Console(width=max(100, Console().width))
    table = Table(title="How the budget would be spent, batch by batch", title_justify="left")
    for name in ("batch", "prompts", "from memory", "capability", "samples per prompt", "share of k_max", "tau"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, batch in enumerate(result["batches"], 1):
        low, mean, high = batch["capability"]
        least, average, most = batch["num_samples"]
        table.add_row(
            str(number),
            str(batch["prompts"]),
            f"{batch['from_memory']:.0%}",
            f"{low:.2f} / {mean:.2f} / {high:.2f}",
            f"{least} / {average:.1f} / {most}",
            f"{batch['share_of_budget']:.1%}",
            "{:.2f} / {:.2f} / {:.2f}".format(*batch["temperature"]),
        )
    console.print(table, "least / mean / most\n")
    histogram: Counter[int] = Counter()
    for batch in result["batches"]:
        histogram.update({int(k): count for k, count in batch["histogram"].items()})
    top = max(histogram.values())
    console.print("Prompts by number of samples k_x")
    for k, count in sorted(histogram.items()):
        console.print(f"{k:>4}  {'█' * max(1, round(40 * count / top))} {count}", highlight=False)
    table = Table(title="\nThe same prompts under each allocator", title_justify="left")
    for name in ("allocator", "samples", "share of k_max", "k_x from", "to"):
        table.add_column(name, justify="left" if name == "allocator" else "right")
    for name, spent in result["allocators"].items():
        share = f"{spent['share_of_budget']:.1%}"
        table.add_row(name, str(spent["samples"]), share, str(spent["min"]), str(spent["max"]))
    console.print(table)
    table = Table(title="\nThe least and the most capable prompts of the first batch", title_justify="left")
    for name in ("capability", "k_x", "tau", "prompt"):
        table.add_column(name, overflow="ellipsis", no_wrap=True, min_width=5 if name != "prompt" else None)
    for row in result["prompts"]:
        figures = f"{row['capability']:.3f}", str(row["num_samples"]), f"{row['temperature']:.2f}"
        table.add_row(*figures, escape(row["prompt"]))
    console.print(table)


def _load_state(task: RLTask, run: Path) -> None:
    checkpoint = CheckpointStore(run / "checkpoints").latest()
    if checkpoint is None:
        raise ValueError(f"{run}: no checkpoint here; give the folder of an `esrl rl` run.")
    state: Any = unpack_json(checkpoint.files["state.json"])
    if "memory" not in state["task"]:
        raise ValueError(f"{run} is no run of `esrl rl`: its checkpoint holds no capability memory.")
    task.memory.load_state_dict(state["task"]["memory"])
    task.queue.load_state_dict(state["task"]["queue"])


def _others(allocation: AllocationConfig) -> list[AllocationConfig]:
    """The same settings for every allocator that they go with."""
    dropping = allocation.eliminate == "prompts"
    names: tuple[Allocator, ...] = ("esrl", "uniform", "random") if dropping else get_args(Allocator)
    return [replace(allocation, allocator=name) for name in names]


def _summary(plan: SamplingPlan, capability: Tensor, known: int, allocation: AllocationConfig) -> dict[str, Any]:
    samples, tau = plan.num_samples, plan.temperature[plan.num_samples > 0]
    num_prompts = len(samples)
    return {
        "prompts": num_prompts,
        "from_memory": known / num_prompts,
        "capability": [float(capability.min()), float(capability.mean()), float(capability.max())],
        "num_samples": [int(samples.min()), float(samples.double().mean()), int(samples.max())],
        "temperature": [float(tau.min()), float(tau.mean()), float(tau.max())],
        "share_of_budget": float(samples.sum()) / (num_prompts * allocation.max_samples),
        "histogram": {str(k): count for k, count in sorted(Counter(samples.tolist()).items())},
    }


def _extremes(prompts: Prompts, plan: SamplingPlan, capability: Tensor, count: int = 4) -> list[dict[str, Any]]:
    order = torch.argsort(capability, stable=True).tolist()
    chosen = order if len(order) <= 2 * count else order[:count] + order[-count:]
    return [
        {
            "prompt": prompts.columns["source"][i],
            "capability": float(capability[i]),
            "num_samples": int(plan.num_samples[i]),
            "temperature": float(plan.temperature[i]),
        }
        for i in chosen
    ]
