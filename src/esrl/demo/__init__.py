"""`esrl demo`: the built-in task from start to report; needs no file and no network."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esrl.commands import RunResult, mle, rl
from esrl.config import METHODS, MLEConfig, RLConfig
from esrl.data.demo import make_examples
from esrl.data.examples import Example
from esrl.evaluation.decode import DecodingConfig, decode, on_device
from esrl.evaluation.scores import metrics_by_name, paired_bootstrap, score_corpus
from esrl.models.load import load_policy
from esrl.report import write_report
from esrl.report.runs import read_run
from esrl.settings import build, merge
from esrl.training.display import say
from esrl.training.run_folder import RESULT
from esrl.training.storage import make_folder, replace_bytes

NUM_TRAIN, NUM_DEV, NUM_TEST = 40_000, 300, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """`esrl demo`: maximum likelihood, then ESRL, then a table on unseen sentences and report.html."""

    output_dir: Path = Path("runs/demo")
    """Holds the data, the three runs and the report; a demo that is there already is replaced."""
    resume: bool = False
    """Go on with the demo in output_dir."""
    seed: int = 1
    """Of the task and of the training."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the built-in task: about four minutes of training on two cores.

    Returns:
        ``table``: a row for the model that maximum likelihood gave, for the same model trained on by maximum
        likelihood for as long as ESRL took, and for ESRL; ``report``: the page.
    """
    folder = config.output_dir
    test = _write_data(folder / "data", config.seed)
    data = {"path": str((folder / "data" / "train.tsv").resolve())}
    dev = {"data": {"path": str((folder / "data" / "dev.tsv").resolve())}}
    shared: dict[str, Any] = {"seed": config.seed, "data": data, "development": dev}
    shared |= {"resume": config.resume, "overwrite": not config.resume}
    say("1/3  maximum likelihood from scratch")
    values = merge(_settings("mle.toml"), {**shared, "output_dir": str(folder / "mle")})
    start_config = build(MLEConfig, values, "the demo")
    start = mle(start_config)
    say("2/3  ESRL")
    values = merge(merge(METHODS["esrl"], _settings("rl.toml")), shared)
    values |= {"model": str(start.model), "output_dir": str(folder / "esrl")}
    trained = rl(build(RLConfig, values, "the demo"))
    say(f"3/3  maximum likelihood trained on for the same {trained.seconds:.0f} s")
    longer = mle(
        replace(
            start_config,
            output_dir=folder / "mle-longer",
            # new sentences and no second warm-up: what somebody would do who trusts in likelihood alone
            seed=config.seed + 1,
            model=replace(start_config.model, path=str(start.model)),
            optimizer=replace(start_config.optimizer, learning_rate=1e-3, warmup_steps=0, lr_scheduler="constant"),
            training=replace(
                start_config.training,
                max_steps=None,
                num_epochs=None,
                max_seconds=trained.seconds,
                eval_steps=150,
                eval_on_start=True,
            ),
        )
    )
    runs = {"MLE (the start)": start, "MLE, trained on as long as ESRL": longer, "ESRL": trained}
    result = {"table": _table(runs, test), "note": _note(trained)}
    replace_bytes(folder / "esrl" / RESULT, json.dumps(result, indent=2).encode())
    report = write_report([folder / "esrl", folder / "mle-longer", folder / "mle"], folder / "report.html")
    return {**result, "report": report}


def show_demo(result: dict[str, Any]) -> None:
    """Print the demo's table."""
    table = Table(title=f"{NUM_TEST:,} unseen sentences", title_justify="left")
    for name in result["table"][0]:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in result["table"]:
        table.add_row(*(escape(str(value)) for value in row.values()))
    console = Console(width=max(110, Console().width))
    console.print(table)
    console.print(result["note"], highlight=False, markup=False)
    console.print(f"report: {result['report']}", highlight=False, markup=False)


def _settings(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("esrl.demo").joinpath(name).read_text(encoding="utf-8"))


def _write_data(folder: Path, seed: int) -> list[Example]:
    """The task as files, so that a user can look at it and run every other command on it."""
    make_folder(folder)
    test: list[Example] = []
    for part, count in (("train", NUM_TRAIN), ("dev", NUM_DEV), ("test", NUM_TEST)):
        examples = make_examples(count, seed, part)  # type: ignore[arg-type]
        lines = ["source\treference", *("\t".join(e.columns[n] for n in ("source", "reference")) for e in examples)]
        replace_bytes(folder / f"{part}.tsv", ("\n".join(lines) + "\n").encode())
        test = examples
    return test


def _table(runs: dict[str, RunResult], test: list[Example]) -> list[dict[str, str]]:
    """Scores with 95 % intervals, the difference to the start, time and peak memory."""
    references = [example.columns["reference"] for example in test]
    bleu, exact = metrics_by_name(["bleu", "exact_match"])
    outputs = {
        name: decode(on_device(load_policy(run.model)), test, DecodingConfig(max_new_tokens=64))
        for name, run in runs.items()
    }
    first = next(iter(outputs.values()))
    rows = []
    for name, run in runs.items():
        scores = score_corpus([bleu, exact], outputs[name], references)
        row = {"model": name}
        for label, metric in (("BLEU", bleu), ("exact match %", exact)):
            score = asdict(scores[metric.name])
            row[label] = f"{score['score']:.1f} ({score['low']:.1f} to {score['high']:.1f})"
            versus = paired_bootstrap(metric, outputs[name], first, references)
            gained = f"{versus.difference:+.1f} ({versus.low:+.1f} to {versus.high:+.1f})"
            row[f"{label.split()[0]} gain"] = "" if outputs[name] is first else gained
        peak = max((line.get("peak_memory_mb", 0.0) for line in read_run(run.output_dir).training), default=0.0)
        rows.append({**row, "training s": f"{run.seconds:.0f}", "peak MB": f"{peak:.0f}"})
    return rows


def _note(trained: RunResult) -> str:
    lines = read_run(trained.output_dir).training
    used = sum(line["budget_used"] for line in lines) / len(lines)
    known = sum(line["planned_from_memory"] for line in lines) / len(lines)
    tokens = sum(line["tokens_sampled"] for line in lines)
    return (
        f"Intervals: 95 %, bootstrap over sentences; gains are paired with the start. ESRL drew {used:.0%} of the "
        f"samples that a fixed k_max would have, {tokens:,} tokens; {known:.0%} of its plans came from remembered "
        "capability, the others from one greedy decode. On this task likelihood has exact references without end, so "
        "training on by likelihood is hard to beat; real text, where it has not, is in docs/benchmarks.md."
    )
