"""One run per folder, and never a wrong one: refusals, overwriting, resuming what is complete or has changed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from fork_server import ForkServer
from run_helpers import NUM_TRAIN, bits, every_file, steps_of, values_of, write_config
from test_signals import wait_for

from esrl.models.seq2seq import Preset, load_policy, new_policy


@pytest.fixture
def finished(references, tmp_path) -> Path:
    """A copy of a finished run's folder."""
    return Path(shutil.copytree(references["rl"].folder, tmp_path / "run"))


@pytest.fixture
def config(assets, tmp_path) -> Path:
    return write_config(tmp_path / "run.toml", values_of("rl", assets, tmp_path / "run"))


def test_a_second_start_is_refused_and_a_killed_one_frees_the_folder(server, config, references, tmp_path):
    marker = tmp_path / "marker"
    holder = server.start("rl", config, hook=("wait_in_step", marker))
    wait_for(marker, holder)
    before = every_file(tmp_path / "run")
    for flags in ([], ["--resume"], ["--overwrite"]):
        started = time.monotonic()
        code, output = server.run("rl", config, *flags)
        assert code == 7 and time.monotonic() - started < 10
        last = output.splitlines()[-1]
        assert f"is in use by process {holder.pid} on {os.uname().nodename}" in last
    assert every_file(tmp_path / "run") == before
    holder.send(signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    code, output = server.run("rl", config, "--resume")
    assert code == 0, output
    assert bits(tmp_path / "run") == references["rl"].bits


def test_a_folder_with_a_run_needs_resume_or_overwrite(server, config, finished):
    before = every_file(finished)
    code, output = server.run("rl", config)
    assert code == 2 and "--resume" in output and "--overwrite" in output
    assert every_file(finished) == before
    code, output = server.run("rl", config, "--resume", "--overwrite")
    assert code == 2 and "resume and overwrite exclude each other" in output
    assert every_file(finished) == before


def test_overwrite_replaces_the_run_even_a_half_deleted_one(server, config, finished, references):
    """Killed while it deleted, an --overwrite leaves a folder without its checkpoints, perhaps only the lock."""
    (finished / "checkpoints").rename(finished / ".delete-checkpoints")
    (finished / "stray").write_text("what the old run had and the new one has not")
    code, output = server.run("rl", config, "--overwrite")
    assert code == 0, output
    assert bits(finished) == references["rl"].bits
    assert not (finished / "stray").exists() and not (finished / ".delete-checkpoints").exists()


@pytest.mark.parametrize("flag", [None, "--resume", "--overwrite"])
def test_a_folder_that_is_no_run_is_left_alone(server, config, tmp_path, flag):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "epoch=1.ckpt").write_text("somebody else's")
    (folder / "config.toml").write_text("[mine]")
    before = every_file(folder)
    for _ in range(2):  # the first refusal must not make it look like a run
        code, output = server.run("rl", config, *filter(None, [flag]))
        assert code == 2 and "no run of ours" in output, output
        assert every_file(folder) == before and not (folder / ".lock").exists()


def test_an_output_dir_that_is_a_file_is_refused(server, config, tmp_path):
    (tmp_path / "run").write_text("text")
    code, output = server.run("rl", config, "--overwrite")
    assert code == 2 and "is a file" in output
    assert (tmp_path / "run").read_text() == "text"


def test_resuming_a_finished_run_changes_nothing(server, config, finished):
    before = every_file(finished)
    code, output = server.run("rl", config, "--resume")
    assert code == 0 and "already complete: 8 steps" in output
    assert every_file(finished) == before


def test_resuming_a_run_killed_after_its_last_checkpoint_writes_what_is_missing(server, config, finished):
    before = every_file(finished)
    (finished / "result.json").unlink()
    (finished / "report.html").unlink()
    assert server.run("rl", config, "--resume")[0] == 0
    assert every_file(finished) == before


CHANGES = {
    "alpha": ({"objective": {"alpha": 0.1}}, "objective.alpha was 0.005 when this run began and is 0.1 now"),
    "seed": ({"seed": 2}, "seed was 1 when this run began and is 2 now"),
    "data": (
        {"data": {"limit": NUM_TRAIN - 1}},
        f"data was '{NUM_TRAIN} examples, ",
    ),
    "unset": ({"gradient": {"rescore": True}}, "gradient.rescore was None when this run began and is True now"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resumed_run_must_be_the_same_run(server: ForkServer, assets, finished, tmp_path, name):
    change, message = CHANGES[name]
    more = {"training": {"num_epochs": 3}}
    config = write_config(tmp_path / "changed.toml", values_of("rl", assets, finished, change, more))
    before = every_file(finished)
    code, output = server.run("rl", config, "--resume")
    assert code == 2 and message in output.splitlines()[-1], output
    if name == "data":
        assert f"is '{NUM_TRAIN - 1} examples, " in output
    assert every_file(finished) == before


def test_a_model_of_another_size_is_refused(server, assets, tmp_path):
    """The path is the same, but somebody has trained another model there."""
    own = Path(shutil.copytree(assets, tmp_path / "assets"))
    config = write_config(tmp_path / "a.toml", values_of("rl", own, tmp_path / "a", {"training": {"max_steps": 1}}))
    assert server.run("rl", config)[0] == 0
    tokenizer = load_policy(own / "model").tokenizer
    new_policy(Preset(16, 1, 2, 64), tokenizer, 80, 1).save(own / "model")
    code, output = server.run("rl", config, "--resume", "--training.max-steps", "2")
    assert code == 2 and "another architecture" in output.splitlines()[-1], output


def test_more_epochs_continue_a_run_of_a_constant_schedule(server, assets, tmp_path):
    """Evaluated at 4 and 8 either way, so one epoch and then another are what two epochs are."""
    ends = []
    for name in ("at once", "in two"):
        folder = tmp_path / name
        values = values_of("rl", assets, folder / "run", {"training": {"eval_steps": 4}})
        config = write_config(folder / "run.toml", values)
        if name == "in two":
            assert server.run("rl", config, "--training.num-epochs", "1")[0] == 0
            assert len(steps_of(folder / "run")) == 4
        code, output = server.run("rl", config, "--resume")
        assert code == 0 and "done: 8 steps" in output
        ends.append(bits(folder / "run"))
    assert ends[0] == ends[1]
