"""Small runs for the tests of training: their data and model, their settings, and the bits they end with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from esrl import commands
from esrl.algorithm.streams import seed_of
from esrl.config import METHODS, MLEConfig, RLConfig, build, merge
from esrl.data.demo import make_examples
from esrl.models.seq2seq import Preset, new_policy
from esrl.models.tokenizer import train_tokenizer
from esrl.training.checkpoint import CheckpointStore, unpack_json
from esrl.training.rl import RLTask

NUM_TRAIN, NUM_DEV = 24, 8
STEPS = 8  # of RL: 24 examples in batches of 6, two epochs

RL: dict[str, Any] = {
    "step": {"batch_size": 6, "logged_prompts": NUM_TRAIN},
    "allocation": {"max_samples": 4},
    "sampling": {"max_new_tokens": 10},
    "gradient": {"micro_batch_tokens": 90},  # about 3 rows: several micro-batches in every step
    "reward": {"names": ["chrf"]},  # an untrained model's BLEU is 0 throughout, its chrF varies
    "baseline": {"queue_size": 30},  # less than two steps push, so that the oldest rewards fall out
    "optimizer": {"learning_rate": 1e-3},
    "training": {"num_epochs": 2, "eval_steps": 3, "save_steps": 1},
}
MLE: dict[str, Any] = {
    "likelihood": {"batch_tokens": 200, "micro_batch_tokens": 100, "dropout": 0.1},
    "optimizer": {"learning_rate": 1e-3, "lr_scheduler": "inverse_sqrt", "warmup_steps": 4},
    "training": {"num_epochs": 1, "eval_steps": 3, "save_steps": 2},
}
DROPOUT: dict[str, Any] = {"gradient": {"dropout": 0.1}, "training": {"save_steps": 2}}
# a critic, a steered KL coefficient, and samples that outlive the update they were drawn for: four updates a batch
PPO: dict[str, Any] = {
    "method": "ppo",
    "step": {"updates_per_batch": 2, "minibatches": 2},
    "objective": {"kl_target": 0.05, "kl_horizon": 100},
    "training": {"max_steps": 10},
}
# adapters over frozen weights, which are the reference, too
LORA: dict[str, Any] = {"method": "rloo", "lora": {"rank": 2}, "optimizer": {"learning_rate": 0.02}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rl": ("rl", {}),
    "rl-dropout": ("rl", DROPOUT),
    "rl-ppo": ("rl", PPO),
    "rl-bfloat16": ("rl", {"precision": "bfloat16"}),
    "rl-lora": ("rl", LORA),
    "mle": ("mle", {}),
}


@dataclass(frozen=True)
class Reference:
    """A run that nothing has disturbed."""

    kind: str
    changes: dict[str, Any]
    folder: Path
    seconds: float
    bits: dict[str, str]


def make_assets(folder: Path) -> Path:
    """``train.jsonl``, ``dev.jsonl`` and ``model``, a random Marian of 28,000 parameters over 160 pieces."""
    train, dev = make_examples(NUM_TRAIN, 1, "train"), make_examples(NUM_DEV, 1, "dev")
    for name, examples in (("train", train), ("dev", dev)):
        lines = "".join(json.dumps(example.columns) + "\n" for example in examples)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = train_tokenizer([text for example in train for text in example.columns.values()], 160, 80)
    new_policy(Preset(32, 1, 2, 64), tokenizer, 80, seed_of("assets")).save(folder / "model")
    return folder


def values_of(kind: str, assets: Path, output_dir: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a small run, as a TOML file would hold them; ``kind`` is rl or mle."""
    model = str(assets / "model")
    development = {"data": {"path": str(assets / "dev.jsonl")}, "metrics": ["chrf"], "decoding": {"max_new_tokens": 10}}
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": model if kind == "rl" else {"path": model},
        "data": {"path": str(assets / "train.jsonl")},
        "development": development,
        "training": {"metric_for_best_model": "dev_chrf"},
    }
    values = merge(values, RL if kind == "rl" else MLE)
    for change in changes:
        values = merge(values, change)
    return values


def rl_config(assets: Path, output_dir: Path, *changes: dict[str, Any]) -> RLConfig:
    values = values_of("rl", assets, output_dir, *changes)
    return build(RLConfig, merge(METHODS[values.get("method", "esrl")], values), "test")


def mle_config(assets: Path, output_dir: Path, *changes: dict[str, Any]) -> MLEConfig:
    return build(MLEConfig, values_of("mle", assets, output_dir, *changes), "test")


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_always(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what a clock or the memory says."""
    return {key: value for key, value in row.items() if not key.startswith("seconds_") and key != "peak_memory_mb"}


def metric_rows(run: Path) -> list[dict[str, Any]]:
    return [same_always(row) for row in json_lines(run / "metrics.jsonl")]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are optimizer steps."""
    return [row for row in json_lines(run / "metrics.jsonl") if "kind" not in row]


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in json_lines(run / "metrics.jsonl") if row.get("kind") == "evaluation"]


def saved_state(run: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, but for clocks and for offsets into a log whose lines hold clocks."""
    checkpoint = CheckpointStore(run / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.skipped == ()
    state: Any = unpack_json(checkpoint.files["state.json"])
    assert state["loop"].pop("seconds") >= 0
    assert state["loop"].pop("offsets").keys() == {"metrics.jsonl", "samples.jsonl"}
    return {**checkpoint.files, "state.json": state, "step": checkpoint.step}


def bits(run: Path) -> dict[str, str]:
    """sha256 of everything a run ends with: parameters, optimizer, states, logs, exported model."""
    found: dict[str, Any] = dict(saved_state(run))
    found |= {f"model/{path.name}": path.read_bytes() for path in sorted((run / "model").iterdir())}
    found["metrics.jsonl"] = metric_rows(run)
    found["samples.jsonl"] = (run / "samples.jsonl").read_bytes()
    found["result.json"] = {
        key: value for key, value in json.loads((run / "result.json").read_bytes()).items() if "seconds" not in key
    }
    data = {
        name: value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
        for name, value in found.items()
    }
    return {name: hashlib.sha256(value).hexdigest() for name, value in data.items()}


def every_file(folder: Path) -> dict[str, bytes]:
    """The content of a run folder, empty folders too; without the lock, which names its last holder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """A TOML file of these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tomli_w.dumps(values).encode())
    return path


@contextmanager
def make_task(assets: Path, *changes: dict[str, Any]) -> Iterator[RLTask]:
    """The RL step of a small run."""
    with commands.make_rl_task(rl_config(assets, Path("unused"), *changes)) as task:
        yield task


def own_reward(folder: Path, source: str, name: str) -> dict[str, Any]:
    """The setting that takes the reward function ``name`` of this source text."""
    (folder / "rewards.py").write_text(source)
    return {"reward": {"names": [f"{folder}/rewards.py:{name}"]}}
