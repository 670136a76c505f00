"""`esrl evaluate`, `generate` and `plan` through the command line, on a real small model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sacrebleu

from esrl.cli import main

sys.path.insert(0, str(Path(__file__).parent / "training"))
from run_helpers import make_assets, values_of, write_config


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


def rows(assets: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (assets / "dev.jsonl").read_text().splitlines()]


def test_evaluate_scores_what_generate_says(assets, tmp_path, capsys):
    """The object of --json has sacreBLEU's own score of the very lines that `generate` writes."""
    data = rows(assets)
    (tmp_path / "s").write_text("".join(row["source"] + "\n" for row in data))
    (tmp_path / "r").write_text("".join(row["reference"] + "\n" for row in data))
    model, files = str(assets / "model"), ["--source", str(tmp_path / "s"), "--reference", str(tmp_path / "r")]
    limit = ["--max-new-tokens", "12"]
    assert main(["generate", model, "--input", str(tmp_path / "s"), "--output", str(tmp_path / "o"), *limit]) == 0
    outputs = (tmp_path / "o").read_text().split("\n")[:-1]
    assert len(outputs) == len(data)
    capsys.readouterr()
    assert main(["evaluate", model, *files, "--metrics", "bleu", "chrf", "--json", *limit]) == 0
    found = json.loads(capsys.readouterr().out)
    references = [[row["reference"] for row in data]]
    assert found["bleu"]["score"] == pytest.approx(sacrebleu.corpus_bleu(outputs, references).score, abs=1e-9)
    assert found["chrf"]["score"] == pytest.approx(sacrebleu.corpus_chrf(outputs, references).score, abs=1e-9)
    # the references against the model's own lines: 100, and the difference is what the model lacks
    call = ["evaluate", str(tmp_path / "r"), *files, "--metrics", "bleu", "--against", str(tmp_path / "o"), "--json"]
    assert main(call) == 0
    perfect = json.loads(capsys.readouterr().out)["bleu"]
    assert perfect["score"] == pytest.approx(100)
    assert perfect["against"]["difference"] == pytest.approx(100 - found["bleu"]["score"])


def test_generate_keeps_empty_lines_in_place(assets, tmp_path):
    source = rows(assets)[0]["source"]
    (tmp_path / "s").write_text(f"{source}\n\n{source}\n")
    call = ["generate", str(assets / "model"), "--input", str(tmp_path / "s"), "--output", str(tmp_path / "o")]
    assert main([*call, "--max-new-tokens", "12"]) == 0
    first, empty, last, _ = (tmp_path / "o").read_text().split("\n")
    assert (empty, first) == ("", last)


def test_plan_spends_the_same_on_eq_8_and_its_control(assets, tmp_path, capsys):
    config = write_config(tmp_path / "rl.toml", values_of("rl", assets, tmp_path / "run"))
    capsys.readouterr()
    assert main(["plan", str(config), "--steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    spent = found["allocators"]
    assert spent["uniform_budget"]["samples"] == spent["esrl"]["samples"]
    # uniform gives k_max to everyone, so its share of k_max is 1
    assert spent["uniform"]["share_of_budget"] == 1
    for batch in found["batches"]:
        assert sum(batch["histogram"].values()) == batch["prompts"]
    assert not (tmp_path / "run").exists()
