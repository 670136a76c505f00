"""`esrl evaluate`, `generate` and `plan` through the command line, on a real small model."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import sacrebleu
import torch

from esrl.algorithm.allocation import AllocationConfig, allocate
from esrl.cli import main
from esrl.plan import show_plan
from esrl.training.checkpoint import CheckpointStore, pack_json

sys.path.insert(0, str(Path(__file__).parent / "training"))
from run_helpers import make_assets, make_task, values_of, write_config


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


def planned(capsys: pytest.CaptureFixture[str], config: Path, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(config), "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_plan_maps_capabilities_and_reads_the_queue_as_a_run_does(assets, tmp_path, capsys):
    """After an epoch: the sigmoid of (Cap_x - mean) / spread of the run's own queue, then eq. 8."""
    setting = {"capability": {"capability_map": "sigmoid_z"}}
    with make_task(assets, setting) as task:
        for batch in range(4):
            task.compute(0, batch).commit()
        state, ids = task.state_dict(), task.prompts(0, 0).example_ids
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    files = {"state.json": pack_json({"task": state})}
    CheckpointStore(tmp_path / "run" / "checkpoints").save(4, files)
    config = write_config(tmp_path / "rl.toml", values_of("rl", assets, tmp_path / "out", setting))
    (batch,) = planned(capsys, config, "--steps", "1", "--run", str(tmp_path / "run"))["batches"]
    queue = state["queue"]["values"]
    z = [(state["memory"][example][0] - fmean(queue)) / pstdev(queue) for example in ids]
    capability = [1 / (1 + math.exp(-value)) for value in z]
    assert batch["from_memory"] == 1
    assert batch["capability"] == pytest.approx([min(capability), fmean(capability), max(capability)])
    expected = allocate(torch.tensor(capability, dtype=torch.float64), AllocationConfig(max_samples=4)).num_samples
    assert batch["histogram"] == {str(k): n for k, n in sorted(Counter(expected.tolist()).items())}


def test_plan_takes_the_method_as_a_run_resolves_it(assets, tmp_path, capsys):
    """ESRL-Random is an allocator; and what drops prompts is compared only with what can drop them, too."""
    random = values_of("rl", assets, tmp_path / "run", {"capability": {"estimator": "random"}})
    found = planned(capsys, write_config(tmp_path / "random.toml", random))
    drawn = sum(int(k) * n for batch in found["batches"] for k, n in batch["histogram"].items())
    assert drawn == found["allocators"]["random"]["samples"]
    dropping = values_of("rl", assets, tmp_path / "run", {"allocation": {"eliminate": "prompts"}})
    found = planned(capsys, write_config(tmp_path / "dropping.toml", dropping))
    # 4 batches of 6, floor(.3 * 6) = 1 dropped in each
    assert {name: spent["samples"] for name, spent in found["allocators"].items()} == dict.fromkeys(
        ("esrl", "uniform", "random"), 4 * 5 * 4
    )


def test_no_batch_to_plan_is_refused(assets, tmp_path, capsys):
    config = write_config(tmp_path / "rl.toml", values_of("rl", assets, tmp_path / "run"))
    assert main(["plan", str(config), "--steps", "0"]) == 2
    assert "steps is 0; it must be 1 or more" in capsys.readouterr().err


def test_prompts_are_shown_as_they_are(capsys):
    three = [1.0, 1.0, 1.0]
    batch = {"prompts": 1, "from_memory": 1.0, "capability": three, "num_samples": [1, 1.0, 1], "temperature": three}
    prompt = "[bold]x[/bold] [/nothing]"
    result = {
        "batches": [batch | {"share_of_budget": 1.0, "histogram": {"1": 1}}],
        "allocators": {"esrl": {"samples": 1, "share_of_budget": 1.0, "min": 1, "max": 1}},
        "prompts": [{"prompt": prompt, "capability": 1.0, "num_samples": 1, "temperature": 1.0}],
    }
    show_plan(result, False)
    assert prompt in capsys.readouterr().out
