"""Models whose prompts cannot be shared, through the commands: said aloud, and trained and asked all the same."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from esrl.cli import main
from esrl.models.causal_plain import PlainCausalPolicy
from esrl.models.load import load_policy
from esrl.settings import merge

sys.path.insert(0, str(Path(__file__).parent / "training"))
from language_helpers import QUESTIONS, causal_model, tokenizer
from run_helpers import evaluations_of, json_lines, steps_of, write_config

NOTICE = "model_type 'mamba' cannot share a prompt among its samples"


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Any:
    """A report takes longer than these runs; and the other tests keep their warnings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command line changes
        patch.setattr("esrl.commands.write_report", lambda runs, path: path.touch() or path)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"source": source, "reference": answer} for source, answer in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mamba") / "model"
    causal_model("mamba", torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(command: str, data: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """Two steps of a command, from a file."""
    values = {
        "output_dir": str(folder / "run"),
        "data": {"path": str(data)},
        "development": {"data": {"path": str(data)}, "decoding": {"max_new_tokens": 4}},
        "prompts": {"max_source_tokens": 40, "max_target_tokens": 40},
        "training": {"num_epochs": False, "max_steps": 2, "save_steps": 1, "eval_steps": 1},
    }
    assert main([command, str(write_config(folder / "run.toml", merge(values, changes)))]) == 0
    return folder / "run"


@pytest.mark.parametrize("method", ["esrl", "mrt", "grpo", "rloo", "ppo"])
def test_reinforcement_learning(method, data, mamba, tmp_path, capsys):
    changes: dict[str, Any] = {
        "method": method,
        "model": str(mamba),
        "development": {"metrics": ["chrf"]},
        "step": {"batch_size": 4},
        "allocation": {"max_samples": 3},
        "sampling": {"max_new_tokens": 6},
        "reward": {"names": ["chrf"]},
        "training": {"metric_for_best_model": "dev_chrf"},
    }
    folder = run("rl", data, tmp_path, changes)
    said = [line for line in capsys.readouterr().err.splitlines() if NOTICE in line]
    assert len(said) == 1 and "slower" in said[0]
    rows = steps_of(folder)
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    assert max(row["grad_norm"] for row in rows) > 0
    assert ("kl_mean" in rows[0]) == (method in ("rloo", "ppo"))
    assert type(load_policy(folder / "model")) is PlainCausalPolicy


def test_fine_tuning_takes_a_row_for_each_example(data, mamba, tmp_path, capsys):
    changes = {"model": {"path": str(mamba)}, "development": {"metrics": []}, "optimizer": {"learning_rate": 0.01}}
    folder = run("mle", data, tmp_path, changes)
    said = capsys.readouterr().err
    assert NOTICE in said and "mamba models cannot keep packed examples apart" in said
    assert len(steps_of(folder)) == 2
    scores = [row["dev_log_prob"] for row in evaluations_of(folder)]
    assert scores[-1] > scores[0]


def test_what_it_says_is_what_it_says_alone(data, mamba, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    for beams in ("1", "2"):
        words = ["--max-new-tokens", "5", "--beam-size", beams]
        assert main(["generate", str(mamba), "--input", str(data), "--output", str(output), *words]) == 0
        assert NOTICE in capsys.readouterr().err
        policy = load_policy(mamba)
        for row in json_lines(output):
            ids = torch.tensor([policy.tokenizer(row["source"], add_special_tokens=False)["input_ids"]])
            found = policy.model.generate(
                ids, do_sample=False, num_beams=int(beams), max_new_tokens=5, bad_words_ids=[[policy.pad_token]]
            )
            assert policy.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == row["answer"]
    assert main(["evaluate", str(mamba), "--source", str(data), "--metrics", "chrf", "--json", *words]) == 0
    assert NOTICE in capsys.readouterr().err
