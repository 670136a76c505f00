"""Two real processes (gloo) against one: the same plan, samples, memory and gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from language_helpers import causal_model, preferences, tokenizer
from run_helpers import metric_rows, saved_state, write_config
from safetensors.torch import load_file

from esrl.training.processes import Processes

PAIRS = preferences()
WORKER = Path(__file__).with_name("rank_worker.py")


EVEN, EMPTY = 9, 8
"""Examples in batches of 7: the last one of 2 gives each process one prompt, the last one of 1 leaves rank 0 none."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process, and each of two, wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(WORKER), str(folder), str(EVEN), str(EMPTY)]
    subprocess.run(command, env=environment, timeout=240, check=True)
    return folder


def record(output: Path, examples: int, rank: int, size: int) -> dict[str, Any]:
    error = output / f"{examples}-{rank}-of-{size}.error"
    assert not error.exists(), error.read_text()
    return json.loads((output / f"{examples}-{rank}-of-{size}.json").read_text())


def tensors(output: Path, examples: int, kind: str, rank: int, size: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"{examples}-{rank}-of-{size}-{kind}.safetensors")


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Equal, but for rounding in floats."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), where
    else:
        assert found == expected, where


CASES = pytest.mark.parametrize(
    ("examples", "kind"),
    [
        (EVEN, "two_stage"),
        (EVEN, "graph"),
        (EMPTY, "two_stage"),
        (EMPTY, "graph"),
        (EVEN, "normalised"),
        (EMPTY, "normalised"),
        (EVEN, "causal-two_stage"),
        (EMPTY, "causal-two_stage"),
    ],
)


def embedding(kind: str) -> str:
    """The name of a parameter that every step moves."""
    name = "model.embed_tokens.weight" if kind.startswith("causal") else "model.shared.weight"
    return f"policy.{name}" if kind.endswith("ppo") else name


@CASES
def test_two_processes_make_the_steps_of_one(output, examples, kind):
    """Plans, samples, rewards, capability memory, reward queue, loss: all that a step logs and remembers."""
    one = record(output, examples, 0, 1)[kind]
    for rank in (0, 1):
        found = record(output, examples, rank, 2)[kind]
        assert_close(found, one)
    # the comparison has something to compare: plans that differ between prompts, samples that differ, a memory
    samples = [line["num_samples"] for line in one["steps"][2]["lines"]]
    assert len(samples) == 7 and len(set(samples)) > 1
    assert len({sample["text"] for line in one["steps"][0]["lines"] for sample in line["samples"]}) > 7
    assert one["steps"][3]["metrics"]["planned_from_memory"] == 1
    assert [step["prompts"] for step in one["steps"]] == [7, examples - 7, 7, examples - 7]
    assert len(one["state"]["memory"]) == examples and len(one["state"]["queue"]["values"]) == 20


@pytest.mark.parametrize("examples", [EVEN, EMPTY])
@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo", "causal-grpo", "causal-ppo"])
def test_two_processes_learn_like_one(output, examples, kind):
    """Spreads and whitening over all processes, ratios, the divergence and its steering, the critic; in the last batch
    one process may have no sample at all."""
    one = record(output, examples, 0, 1)[kind]
    expected = tensors(output, examples, kind, 0, 1)
    for rank in (0, 1):
        assert_close(record(output, examples, rank, 2)[kind], one)
        found = tensors(output, examples, kind, rank, 2)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    figures = [step["metrics"] for step in one["steps"]]
    if kind != "rloo":  # two updates a batch, the second off the policy that has sampled
        assert [row["update"] for row in figures] == [0, 1, 0, 1]
        assert figures[0]["ratio_mean"] == 1 != figures[1]["ratio_mean"]
    else:
        assert one["state"]["kl_coefficient"] != 0.2
    assert float(expected[f"0.{embedding(kind)}"].abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["sft", "pairs"])
def test_two_processes_fine_tune_and_learn_pairs_like_one(output, kind):
    """The second batch has one example, so that one process has none, and neither has it one to evaluate."""
    one, expected = record(output, EVEN, 0, 1)[kind], tensors(output, EVEN, kind, 0, 1)
    packed = [step["metrics"].pop("packed_share", None) for step in one["steps"]]
    for rank in (0, 1):
        found = record(output, EVEN, rank, 2)[kind]
        assert [step.pop("empty") for step in found["steps"]] == [False, True]
        shares = [step["metrics"].pop("packed_share", None) for step in found["steps"]]
        # rows are filled in each process; a single example fills its row either way
        assert kind == "pairs" or (0.6 < shares[0] <= 1 and packed[1] == shares[1] == 1)
        assert_close(found, {**one, "steps": [{k: v for k, v in s.items() if k != "empty"} for s in one["steps"]]})
        parts = tensors(output, EVEN, kind, rank, 2)
        assert parts.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-9, msg=name)
    head = "model.embed_tokens.weight"
    assert float(expected[f"0.{head}"].abs().max()) > 1e-3 and float(expected[f"1.{head}"].abs().max()) > 1e-3


@pytest.mark.parametrize("examples", [EVEN, EMPTY])
def test_processes_have_one_cache_of_a_reward_models_scores(output, examples):
    """Each has scored its own samples, and both have the scores of all. Against one process they differ by rounding."""
    first, second = (record(output, examples, rank, 2)["model"] for rank in (0, 1))
    assert first["state"] == second["state"]
    scores = first["state"]["reward"]["model"]["scores"]
    alone = record(output, examples, 0, 1)["model"]["state"]["reward"]["model"]["scores"]
    assert len(scores) > examples and scores == pytest.approx(alone, rel=1e-3, abs=1e-5)


@CASES
def test_summed_gradients_are_those_of_one_process(output, examples, kind):
    record(output, examples, 0, 2)  # shows the error where there was one
    one = tensors(output, examples, kind, 0, 1)
    first, second = (tensors(output, examples, kind, rank, 2) for rank in (0, 1))
    assert first.keys() == second.keys() == one.keys()
    assert float(one[f"0.{embedding(kind)}"].abs().max()) > 1e-3
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name  # the processes never drift apart
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_both_ways_to_the_gradient_agree_over_processes(output):
    """Two stages against the graph kept through sampling; only the first step starts from the same weights."""
    two_stage, graph = (tensors(output, EVEN, kind, 1, 2) for kind in ("two_stage", "graph"))
    for name, value in graph.items():
        if name.startswith("0."):
            torch.testing.assert_close(two_stage[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_a_reward_that_fails_on_one_process_stops_all_and_loses_nothing(output):
    """Rank 1 raises in the third step; rank 0, left waiting for it, saves the second one, from where both go on."""
    runs = json.loads((output / "training.json").read_text())
    codes = {name: found["codes"] for name, found in runs.items()}
    errors = {path.name: path.read_text() for path in output.glob("*-[01].error")}
    assert codes == {"whole": [0, 0], "failed": [1, 1], "resumed": [0, 0]}, errors
    assert runs["failed"]["seconds"] < 60 and runs["failed"]["saved"] == 2
    assert "RewardError: broken on purpose" in errors["failed-1.error"]
    assert len(metric_rows(output / "whole")) == 4
    assert metric_rows(output / "broken") == metric_rows(output / "whole")
    whole, resumed = saved_state(output / "whole"), saved_state(output / "broken")
    assert whole["step"] == 4 and whole == resumed


def test_the_command_in_two_processes_gives_the_reward_model_of_one(tmp_path):
    """`torchrun ... esrl reward-model`: adapters, evaluation, the report at the end."""
    tokenizer(bos=True).save_pretrained(tmp_path / "base")
    causal_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    rows = [{"prompt": e.source, "chosen": e.columns["reference"], "rejected": e.columns["rejected"]} for e in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "pairs.jsonl"), "format": "preferences"}
    values = {
        "model": str(tmp_path / "base"),
        "data": data,
        "development": {"data": data},
        "prompts": {"max_target_tokens": 64},
        "lora": {"rank": 2},
        "reward_model": {"batch_size": 3},
        "optimizer": {"learning_rate": 1e-2, "adam_epsilon": 1e-4},  # rounding of tiny gradients stays tiny
        "training": {"metric_for_best_model": "dev_margin"},
    }
    for count in (1, 2):
        file = write_config(tmp_path / f"{count}.toml", values | {"output_dir": str(tmp_path / str(count))})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(
            [*command, "-m", "esrl.cli", "reward-model", str(file)], env=environment, timeout=240, check=True
        )
    one, two = (json.loads((tmp_path / count / "reward_model.json").read_text()) for count in ("1", "2"))
    assert one["pairs"] == two["pairs"] == len(PAIRS) and two["margin"] == pytest.approx(one["margin"], rel=1e-3)
    first, second = (load_file(tmp_path / count / "model" / "model.safetensors") for count in ("1", "2"))
    start = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert float((first["model.layers.0.self_attn.q_proj.weight"] - start).abs().max()) > 1e-4
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_primitives_of_two_processes(output):
    first, second = (record(output, EVEN, rank, 2)["primitives"] for rank in (0, 1))
    assert (first["rank"], first["size"], first["is_main"]) == (0, 2, True)
    assert (second["rank"], second["size"], second["is_main"]) == (1, 2, False)
    assert first["shards"] == {"0": [], "1": [], "2": [0], "7": [0, 1, 2]}
    assert second["shards"] == {"0": [], "1": [0], "2": [1], "7": [3, 4, 5, 6]}
    for found in (first, second):
        assert found["gather"] == ["0-0", "1-0", "1-1"]  # in order of rank
        assert found["gather_nothing_from_0"] == ["x"]
        assert found["sum"] == 0.1 + 1.1
        assert found["any"] == [False, True]
        # 1 + 2; 5 and a missing one that counts 0; missing on both, so still missing, as it would be with one process
        assert found["gradients"] == [[[3, 3], [3, 3]], [[5, 5], [5, 5]], None]


def test_one_process_is_the_identity():
    processes = Processes()
    assert (processes.rank, processes.size, processes.is_main, processes.active) == (0, 1, True, False)
    for count in (0, 1, 5):
        assert list(processes.shard(count)) == list(range(count))
    assert processes.gather([3, "x"]) == [3, "x"]
    assert processes.sum(0.25) == 0.25
    assert [processes.any(False), processes.any(True)] == [False, True]
    parameter = torch.nn.Parameter(torch.ones(3))
    processes.sum_gradients([parameter])
    assert parameter.grad is None


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 64])
def test_shards_partition_in_order(size, count):
    processes = Processes()
    processes.size = size
    joined: list[int] = []
    sizes = []
    for rank in range(size):
        processes.rank = rank
        joined += processes.shard(count)
        sizes.append(len(processes.shard(count)))
    assert joined == list(range(count))
    assert max(sizes) - min(sizes) <= 1
