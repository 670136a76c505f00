"""A verifiable reward on a small language model: numbers in words to digits, the methods beside each other.

    python benchmarks/digits.py

Makes the data, trains the start (configs/digits/sft.toml) and then each method with two seeds (configs/digits/rl.toml), one
after the other; a finished run is not repeated. Prints the table of docs/benchmarks.md: exact match on 450 unseen problems.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from esrl.data.arithmetic import ArithmeticConfig, make_arithmetic, write_examples

PROJECT = Path(__file__).parents[1]
RUNS = PROJECT / "runs" / "digits"
METHODS = ("grpo", "rloo", "ppo", "mrt", "reinforce", "esrl")
SEEDS = ("1", "2")


def main() -> None:
    data = RUNS / "data"
    data.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 6000), ("dev", 300), ("test", 450)):
        problems = make_arithmetic(count, 1, part, ArithmeticConfig(kinds=("digits",), largest=9999))
        write_examples(problems, data / f"{part}.jsonl")
    train("mle", "sft.toml", RUNS / "sft", [])
    print("| method | seed | steps, best | training s | samples | tokens | test | gain (95 %) | p |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for method in METHODS:
        for seed in SEEDS:
            folder = RUNS / f"{method}-{seed}"
            train("rl", "rl.toml", folder, ["--method", method, "--seed", seed])
            show(method, seed, folder, data / "test.jsonl")


def train(command: str, config: str, folder: Path, flags: list[str]) -> None:
    if (folder / "result.json").exists():
        return
    resume = ["--resume"] if (folder / "checkpoints").exists() else []
    call = ["esrl.cli", command, str(PROJECT / "configs" / "digits" / config), "--output-dir", str(folder)]
    subprocess.run([sys.executable, "-m", *call, *flags, *resume], check=True, stdout=subprocess.DEVNULL)


def show(method: str, seed: str, folder: Path, test: Path) -> None:
    """One line of the table."""
    call = ["esrl.cli", "evaluate", str(folder / "model"), "--against", str(RUNS / "sft" / "model"), "--json"]
    call += ["--source", str(test), "--metrics", "exact_match", "--max-new-tokens", "8"]
    output = subprocess.run([sys.executable, "-m", *call], check=True, stdout=subprocess.PIPE, text=True).stdout
    scores = json.loads(output)["exact_match"]
    versus = scores["against"]
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kind" not in line]
    drawn = sum(sum(int(k) * n for k, n in line.get("num_samples_histogram", {}).items()) for line in steps)
    tokens = sum(line.get("tokens_sampled", 0) for line in steps)
    print(
        f"| {method} | {seed} | {result['steps']}, {result['best_step']} | {result['training_seconds']:.0f} | {drawn:,} "
        f"| {tokens:,} | {scores['score']:.1f} | {versus['difference']:+.1f} ({versus['low']:+.1f} to "
        f"{versus['high']:+.1f}) | {versus['p_value']:.3f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
