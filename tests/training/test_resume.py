"""Killed anywhere, any number of times, damaged or not: a resumed run ends with the bits of an uninterrupted one."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from fork_server import ForkServer
from run_helpers import (
    STEPS,
    Reference,
    bits,
    every_file,
    json_lines,
    metric_rows,
    saved_state,
    steps_of,
    values_of,
    write_config,
)

from esrl.training.checkpoint import CheckpointStore, unpack_tensors

KILLS = 30
SHARES = {"rl": 0.3, "rl-dropout": 0.1, "rl-ppo": 0.2, "rl-lora": 0.2, "mle": 0.2}

pytestmark = pytest.mark.kill


def prepare(reference: Reference, assets: Path, folder: Path, *more: dict) -> Path:
    """The configuration of one more such run, in a folder of its own."""
    return write_config(
        folder / "run.toml", values_of(reference.kind, assets, folder / "run", reference.changes, *more)
    )


def finish(server: ForkServer, kind: str, config: Path) -> str:
    code, output = server.run(kind, config, "--resume")
    assert code == 0, output
    return output


def test_every_step_changes_the_weights_and_nothing_else_varies(server, assets, references, tmp_path):
    """Or the tests below would test nothing."""
    keep_all = {"training": {"save_total_limit": False}}
    config = prepare(references["rl"], assets, tmp_path, keep_all)
    assert server.run("rl", config)[0] == 0
    assert bits(tmp_path / "run") == references["rl"].bits
    weights = [(path / "model.safetensors").read_bytes() for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert len(weights) == STEPS + 1 and len(set(weights)) == STEPS + 1
    for other in ("rl-dropout", "rl-bfloat16"):
        assert references[other].bits["model.safetensors"] != references["rl"].bits["model.safetensors"]
    assert all(row["grad_norm"] > 0 for row in steps_of(tmp_path / "run"))
    ppo = saved_state(references["rl-ppo"].folder)
    task = ppo["state.json"]["task"]
    assert (
        task["kl_coefficient"] != 0.1 and len(task["experience"]) == 1
    )  # two of the last batch's four updates are left
    critic = unpack_tensors(ppo["model.safetensors"])["critic.weight"]
    assert float(critic.abs().max()) > 0
    adapters = unpack_tensors(saved_state(references["rl-lora"].folder)["model.safetensors"])
    assert all(".lora_" in name for name in adapters)
    assert all(float(value.abs().max()) > 0 for value in adapters.values())
    assert len(json_lines(references["mle"].folder / "metrics.jsonl")) == 7 + 4  # steps; evaluations at 0, 3, 6, 7


@pytest.mark.parametrize("name", SHARES)
def test_killed_at_random_moments(server, assets, references, name, tmp_path, request):
    """Every trial is a run of its own; the moments are uniform over the time an undisturbed run takes."""
    reference = references[name]
    wanted = round((request.config.getoption("--n", default=None) or KILLS) * SHARES[name])
    random.seed(f"{name} 1")
    killed = trials = 0
    seconds = reference.seconds
    while killed < wanted:
        trials += 1
        assert trials < 4 * wanted, "the runs end before they can be killed"
        folder = tmp_path / str(trials)
        config = prepare(reference, assets, folder)
        while server.killed_after(random.uniform(0, seconds), reference.kind, config, "--resume"):
            killed += 1
            if killed % 3:  # every third kill is followed by one of the resumed run
                break
        else:
            seconds *= 0.95  # it had ended; the machine has become faster
        finish(server, reference.kind, config)
        assert bits(folder / "run") == reference.bits
        shutil.rmtree(folder)


def test_killed_before_every_operation_of_an_evaluation_and_a_save(server, assets, references, tmp_path, request):
    """Step 6 of 7 exports a new best model, saves, and removes an old checkpoint.

    What SIGKILL leaves is what stands on the disk at that instant. So one run copies its folder before every
    operation, each different copy is resumed, and at some of the operations (``--n 100``: at all) a run is really
    killed, to see that it leaves the same.
    """
    short = {"training": {"max_steps": 7}}
    config = prepare(references["rl"], assets, tmp_path / "trial", short)
    run, copies = tmp_path / "trial" / "run", tmp_path / "copies"
    code, output = server.run("rl", config, hook=("copy_before_operations", 6, run, copies))
    assert code == 0, output
    expected = bits(run)
    operations = len(list(copies.iterdir()))
    # the model's 5 files and the checkpoint's 4 are opened, written and synced; folders made, synced, renamed; the old
    # ones removed file by file: 27 + 9 + some
    assert operations > 60
    every = (request.config.getoption("--n", default=None) or 0) >= 100
    for operation in range(0, operations, 1 if every else 12):
        shutil.rmtree(run)
        assert server.start("rl", config, hook=("kill_before_operation", 6, operation)).wait() == -signal.SIGKILL
        assert untimed(run) == untimed(copies / str(operation)), f"operation {operation}"
    tried, steps = [], []
    for operation in range(operations):
        copy = copies / str(operation)
        content = every_file(copy)
        if content in tried:  # an operation that changes nothing, such as a sync
            continue
        tried.append(content)
        latest = CheckpointStore(copy / "checkpoints").latest()  # one is intact at every instant
        assert latest is not None
        steps.append(latest.step)
        shutil.rmtree(run)
        shutil.copytree(copy, run)
        finish(server, "rl", config)
        assert bits(run) == expected, f"killed before operation {operation}"
    assert len(tried) > 30 and set(steps) == {5, 6} and steps == sorted(steps)


def untimed(folder: Path) -> dict[str, bytes]:
    """A folder's files; of those that hold times or their hashes, only that they are there."""
    timed = ("metrics.jsonl", "state.json", "manifest.json", "environment.json")
    return {name: b"" if name.endswith(timed) else data for name, data in every_file(folder).items()}


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(server, assets, references, damage, tmp_path):
    config = prepare(references["rl"], assets, tmp_path)
    run = tmp_path / "run"
    assert server.start("rl", config, hook=("kill_before_operation", 6, 0)).wait() == -signal.SIGKILL
    victim = run / "checkpoints/step-00000005/optimizer.safetensors"
    data = bytearray(victim.read_bytes())
    if damage == "flipped bit":
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    output = finish(server, "rl", config)
    assert "damaged checkpoint passed over: step-00000005: optimizer.safetensors" in output
    assert bits(run) == references["rl"].bits


def test_no_intact_checkpoint_is_an_error_not_a_new_start(server, assets, references, tmp_path):
    config = prepare(references["rl"], assets, tmp_path)
    run = tmp_path / "run"
    assert server.start("rl", config, hook=("kill_before_operation", 3, 0)).wait() == -signal.SIGKILL
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    before = metric_rows(run)
    code, output = server.run("rl", config, "--resume")
    assert code == 6 and "holds no intact checkpoint" in output and "--overwrite" in output
    assert metric_rows(run) == before


def test_a_new_model_starts_from_its_own_seed_whatever_a_killed_run_has_left(server, assets, tmp_path):
    """From scratch, killed before the first checkpoint, then resumed with another seed: the start is the new seed's."""
    values = {
        "model": {"path": False, "preset": "demo", "vocab_size": 160, "max_length": 80},
        "training": {"max_steps": 1, "num_epochs": False},
    }

    def weights(run: Path) -> bytes:
        return (run / "start" / "model.safetensors").read_bytes()

    config = write_config(tmp_path / "a.toml", values_of("mle", assets, tmp_path / "a", values, {"seed": 1}))
    assert server.start("mle", config, hook=("kill_before_operation", 0, 0)).wait() == -signal.SIGKILL
    left = weights(tmp_path / "a")
    code, output = server.run("mle", config, "--resume", "--seed", "2")
    assert code == 0, output
    fresh = write_config(tmp_path / "b.toml", values_of("mle", assets, tmp_path / "b", values, {"seed": 2}))
    assert server.run("mle", fresh)[0] == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != left
