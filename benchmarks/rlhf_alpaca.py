"""Reinforcement learning from a reward model on Alpaca instructions: seven methods from one start, with one budget.

    python benchmarks/rlhf_alpaca.py --data FOLDER

Trains a small causal model from scratch (SFT), a reward model from it on both preference sets, and then each method with
two seeds until it has drawn the same number of tokens (configs/rlhf-alpaca/comparison/). A finished run is not repeated, a
stopped one is resumed. Run it on a quiet machine: it takes about 40 minutes on 2 cores. Prints the table of
docs/benchmarks.md: answers to 300 held-out prompts, two sampled for each at temperature 1.

Settings are the same for all methods but for what makes the method: one prompt, one sample for ESRL and PPO (64 a step, of
which ESRL leaves 30 % out), eight samples of eight prompts for GRPO and RLOO. Learning rate, KL coefficient and budget were
chosen beforehand, on the 200 development prompts alone, by the trials in docs/log.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esrl.data.encoding import Encoder, PromptConfig, limit_prompts, make_causal_prompts
from esrl.data.readers import DataConfig, load_examples
from esrl.evaluation.matched_length import matched_length
from esrl.evaluation.reward_model import PreferenceReport, preference_report
from esrl.models.causal import CausalPolicy
from esrl.models.load import load_policy
from esrl.rewards.model import ModelRewardConfig, RewardModel
from esrl.rewards.model import load as load_reward_model
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.training.ends import take_ends
from esrl.training.gradient import GradientConfig
from esrl.training.reference import frozen_reference
from esrl.training.storage import replace_bytes
from esrl.types import SamplingPlan

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "configs" / "rlhf-alpaca" / "comparison"
RUNS = PROJECT / "runs" / "rlhf-alpaca"
COMMON: dict[str, Any] = tomllib.loads((CONFIGS / "rl.toml").read_text())
SEEDS = ("1", "2")
PREFERENCES = ("alpacaeval", "gpt4llm")
DEV_PROMPTS = 200
SAMPLES = 2

# a method's preset has a KL coefficient of its own
NO_ELIMINATION = ["--allocation.eliminate", "samples", "--objective.kl-coefficient"]
NO_ELIMINATION += [str(COMMON["objective"]["kl_coefficient"])]
GROUPS = [*NO_ELIMINATION, "--step.batch-size", "8", "--allocation.max-samples", "8"]
METHODS = {
    "ESRL-Reward": ["--capability.estimator", "reward"],
    "ESRL-Entropy": ["--capability.estimator", "entropy"],
    "ESRL-Random": ["--capability.estimator", "random"],
    "PPO, two stages": ["--method", "ppo", *NO_ELIMINATION],
    "PPO, one stage": ["--method", "ppo", *NO_ELIMINATION, "--gradient.kind", "graph"],
    "GRPO": ["--method", "grpo", *GROUPS],
    "RLOO": ["--method", "rloo", *GROUPS],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/alpaca"), help="the folder with Alpaca and preferences")
    options = parser.parse_args()
    if not (RUNS / "data").exists():
        write_parts(options.data, RUNS / "data")
    train("mle", "sft", RUNS / "sft")
    train("reward-model", "reward-model", RUNS / "reward-model")
    reward = load_reward_model(ModelRewardConfig(path=RUNS / "reward-model" / "model"))
    for name in PREFERENCES:
        print(describe(name, accuracy(reward, RUNS / "data" / f"prefs_test_{name}.jsonl")))
    start = answers_of(RUNS / "sft", "test", reward)
    rewards = np.asarray(start["rewards"])
    print(f"Start: reward {rewards.mean():.3f} (spread {rewards.std():.3f}), {np.mean(start['lengths']):.1f} tokens.\n")
    print(
        "| method | seed | reward | gain (95 %) | gain at matched length (standard error) | KL a sample | a token ",
        end="",
    )
    print("| tokens an answer | steps | sampled tokens | training s | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for seed in SEEDS:
        for name, flags in METHODS.items():
            folder = RUNS / f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
            train("rl", "rl", folder, "--seed", seed, *flags)
            print(row(name, seed, folder, start, reward), flush=True)


def write_parts(source: Path, target: Path) -> None:
    """Both preference sets mixed; every held-out set in two, one to choose by and one to report on."""

    def read(name: str) -> list[dict[str, str]]:
        with gzip.open(source / f"{name}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as lines:
            return [json.loads(line) for line in lines]

    def pairs(name: str) -> list[dict[str, str]]:
        return [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in read(f"prefs_{name}")]

    held_out = read("alpaca_val")
    parts = {
        "train": read("alpaca_train_8k"),
        "dev": held_out[:DEV_PROMPTS],
        "test": held_out[DEV_PROMPTS:],
        "prefs_train": [pair for name in PREFERENCES for pair in pairs(f"{name}_train")],
        "prefs_dev": [pair for name in PREFERENCES for pair in pairs(f"{name}_val")[::2]],
        **{f"prefs_test_{name}": pairs(f"{name}_val")[1::2] for name in PREFERENCES},
    }
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(target)


def train(command: str, config: str, folder: Path, *flags: str) -> None:
    """Train, or go on; a finished run is compared with the settings and left as it is."""
    call = ["esrl.cli", command, str(CONFIGS / f"{config}.toml"), "--output-dir", str(folder), *flags]
    call += ["--resume"] if folder.exists() else []
    subprocess.run([sys.executable, "-m", *call], check=True, stdout=subprocess.DEVNULL)


def accuracy(reward: RewardModel, path: Path) -> PreferenceReport:
    pairs = load_examples(DataConfig(path=str(path), format="preferences")).examples
    sides = [[pair.columns[name] for pair in pairs] for name in ("reference", "rejected")]
    rewards = [reward([pair.columns["source"] for pair in pairs], side) for side in sides]
    tokenizer = reward.read.tokenizer
    lengths = [[len(ids) for ids in tokenizer(side, add_special_tokens=False)["input_ids"]] for side in sides]
    return preference_report(*rewards, *lengths)


def describe(name: str, report: PreferenceReport) -> str:
    verdict = ""
    if report.accuracy_low <= report.length_accuracy:
        verdict = " It does not beat the rule by more than chance."
    return (
        f"Reward model on {report.pairs} held-out pairs of {name}: {report.accuracy:.1%} right "
        f"({report.accuracy_low:.1%} to {report.accuracy_high:.1%}), the longer answer {report.length_accuracy:.1%} "
        f"(p = {report.length_p_value:.2g}); correlation of reward and length {report.length_correlation:.2f}.{verdict}"
    )


def answers_of(folder: Path, part: str, reward: RewardModel) -> dict[str, Any]:
    """Answers of a run's model to a part's prompts, their rewards, lengths and divergence from the start, in nats;
    kept in the run's folder."""
    files = [run / "model" / "model.safetensors" for run in (folder, RUNS / "sft", RUNS / "reward-model")]
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    path = folder / f"answers-{part}-{digest[:12]}.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    policy, start = policy_of(folder), policy_of(RUNS / "sft")
    config = PromptConfig(**COMMON["prompts"], max_target_tokens=COMMON["sampling"]["max_new_tokens"])
    encoder = Encoder(policy.tokenizer, config)
    for one in (policy, start):
        take_ends(one, encoder)
    data = DataConfig(path=str(RUNS / "data" / f"{part}.jsonl"), format="instruction", template="plain")
    examples, _ = limit_prompts(load_examples(data).examples, encoder, with_answers=False)
    prompts = make_causal_prompts(examples, encoder)
    plan = SamplingPlan(
        num_samples=torch.full((len(examples),), SAMPLES), temperature=torch.ones(len(examples), dtype=torch.float64)
    )
    drawn = EngineSampler(policy, SamplingConfig(**COMMON["sampling"]), 0).sample(prompts, plan)
    reference = frozen_reference(start, GradientConfig())(prompts, drawn, None)
    sources = [prompts.columns["source"][i] for i in drawn.prompt_index.tolist()]
    found = {
        "prompts": sources,
        "answers": list(drawn.texts),
        "rewards": reward(sources, list(drawn.texts)),
        "lengths": drawn.lengths.tolist(),
        "divergence": (drawn.log_probs.cpu() - reference.cpu()).sum(1).tolist(),  # k1 of kl.py: unbiased
    }
    replace_bytes(path, json.dumps(found).encode())
    return found


def policy_of(folder: Path) -> CausalPolicy:
    policy = load_policy(folder / "model")
    assert isinstance(policy, CausalPolicy), "the SFT preset is a causal one"
    policy.model.eval()
    return policy


def row(name: str, seed: str, folder: Path, start: dict[str, Any], reward: RewardModel, part: str = "test") -> str:
    """One line of the table."""
    found = answers_of(folder, part, reward)
    rewards, tokens = np.asarray(found["rewards"]), sum(found["lengths"])
    # the samples of a prompt are not independent, prompts are
    gains = (rewards - np.asarray(start["rewards"])).reshape(-1, SAMPLES).mean(1)
    half = 1.96 * gains.std(ddof=1) / len(gains) ** 0.5
    matched = matched_length(found["rewards"], found["lengths"], start["rewards"], start["lengths"])
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kind" not in line]
    return (
        f"| {name} | {seed} | {rewards.mean():.3f} | {gains.mean():+.3f} ({gains.mean() - half:+.3f} to "
        f"{gains.mean() + half:+.3f}) | {matched.difference:+.3f} ({matched.standard_error:.3f}) "
        f"| {np.mean(found['divergence']):.2f} | {sum(found['divergence']) / tokens:.3f} | {tokens / len(rewards):.1f} "
        f"| {result['steps']} | {sum(line['tokens_sampled'] for line in steps):,} | {result['training_seconds']:.0f} "
        f"| {max(line['peak_memory_mb'] for line in steps):.0f} |"
    )


if __name__ == "__main__":
    main()
