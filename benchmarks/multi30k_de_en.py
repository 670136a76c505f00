"""ESRL beside its baselines on Multi30k, all with the wall-clock of ESRL: the table of docs/benchmarks.md.

    python benchmarks/multi30k_de_en.py --data FOLDER --model FOLDER

Run it on a quiet machine. Runs go one after the other, each in its own process; a finished run is not repeated, a stopped
one is resumed. Every other method gets as many steps, with a linear schedule of its own, as fit into ESRL's training
time by a probe of a few steps, and is stopped at that time in any case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs" / "multi30k-de-en"
PROBE_STEPS = 6

# name, command, flags
UNIFORM_BUDGET = ["--allocation.allocator", "uniform_budget"]
RUNS: list[tuple[str, str, list[str]]] = [
    ("esrl-1", "rl", []),
    ("uniform-budget-1", "rl", UNIFORM_BUDGET),
    ("reinforce", "rl", ["--method", "reinforce"]),
    ("mrt", "rl", ["--method", "mrt"]),
    ("random", "rl", ["--allocation.allocator", "random"]),
    ("mle-longer", "mle", []),
    ("esrl-2", "rl", ["--seed", "2"]),
    ("uniform-budget-2", "rl", [*UNIFORM_BUDGET, "--seed", "2"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/multi30k"))
    parser.add_argument("--model", default="runs/multi30k-de-en-mle/model", help="the MLE model to start from")
    parser.add_argument("--runs", type=Path, default=Path("runs/multi30k-comparison"))
    parser.add_argument("--only", nargs="*", choices=[name for name, _, _ in RUNS], help="some of the runs")
    options = parser.parse_args()
    seconds = None
    for name, command, flags in RUNS:
        if options.only and name not in options.only and name != "esrl-1":
            continue
        folder = options.runs / name
        limits = [] if seconds is None or name.startswith("esrl") else limited(name, command, flags, seconds, options)
        if not (folder / "result.json").exists():
            train(command, folder, [*flags, *limits], options)
        result = json.loads((folder / "result.json").read_text())
        seconds = seconds or result["training_seconds"]
        score(folder, options)
    show(options)


def limited(name: str, command: str, flags: list[str], seconds: float, options: argparse.Namespace) -> list[str]:
    """As many steps as fit into ``seconds``, by a probe."""
    probe = options.runs / "probes" / name
    if not (probe / "result.json").exists():
        train(
            command, probe, [*flags, "--training.max-steps", str(PROBE_STEPS), "--training.eval-steps", "1000"], options
        )
    lines = [json.loads(line) for line in (probe / "metrics.jsonl").read_text().splitlines()]
    # the first step warms caches; the median of the rest is what a step takes
    times = sorted(line["seconds_total"] for line in lines if "kind" not in line)[: PROBE_STEPS - 1]
    steps = max(1, int(seconds / times[len(times) // 2]))
    evaluate_every = max(1, round(steps / 9))
    return [
        "--training.max-steps",
        str(steps),
        "--training.num-epochs",
        "None",
        "--training.max-seconds",
        str(seconds),
        "--training.eval-steps",
        str(evaluate_every),
    ]


def train(command: str, folder: Path, flags: list[str], options: argparse.Namespace) -> None:
    model = ["--model", options.model]
    if command == "mle":
        # trained on at a rate of a fine-tuning, linear to 0 like the others
        model = ["--model.path", options.model, "--optimizer.learning-rate", "2e-4", "--optimizer.warmup-steps", "0"]
        model += ["--training.eval-on-start"]
    resume = ["--resume"] if (folder / "checkpoints").exists() else []
    call = [sys.executable, "-m", "esrl.cli", command, str(CONFIG / f"{command}.toml"), "--output-dir", str(folder)]
    call += ["--data.root", str(options.data), *model, *flags, *resume]
    print("$", " ".join(call), flush=True)
    subprocess.run(call, check=True)


def score(folder: Path, options: argparse.Namespace) -> None:
    """Test scores of the run's best model against the start, kept in the run folder."""
    output = folder / "test.json"
    if output.exists():
        return
    files = [f"{options.data}/test_2016_flickr.{language}.gz" for language in ("de", "en")]
    call = [sys.executable, "-m", "esrl.cli", "evaluate", str(folder / "model"), "--against", options.model]
    call += ["--source", files[0], "--reference", files[1], "--metrics", "bleu", "chrf", "--json"]
    output.write_text(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout)


def show(options: argparse.Namespace) -> None:
    """The table in Markdown."""
    print("| run | steps | training s | dev BLEU | test BLEU | gain (95 %) | p | test chrF | samples | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, _, _ in RUNS:
        folder = options.runs / name
        if not (folder / "test.json").exists():
            continue
        result = json.loads((folder / "result.json").read_text())
        test = json.loads((folder / "test.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "kind" not in line]
        drawn = sum(sum(int(k) * n for k, n in s.get("num_samples_histogram", {}).items()) for s in steps)
        bleu, versus = test["bleu"], test["bleu"]["against"]
        print(
            f"| {name} | {result['steps']} | {result['training_seconds']:.0f} | {result['best_score']:.2f} "
            f"(step {result['best_step']}) | {bleu['score']:.2f} | {versus['difference']:+.2f} "
            f"({versus['low']:+.2f} to {versus['high']:+.2f}) | {versus['p_value']:.4f} | {test['chrf']['score']:.2f} "
            f"| {drawn:,} | {max(s['peak_memory_mb'] for s in steps):.0f} |"
        )


if __name__ == "__main__":
    main()
