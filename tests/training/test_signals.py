"""SIGTERM and SIGINT, really sent to a command: it stops within seconds, saved, and goes on to the same bits."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from fork_server import Child
from run_helpers import bits, saved_state, steps_of, values_of, write_config

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
RARELY = {"training": {"save_steps": 100}}  # so that what is saved was saved because of the signal

HUNG_REWARD = """
import time
from pathlib import Path

calls = 0

def reward(completions, marker=Path(__file__).with_name("marker"), **columns):
    global calls
    calls += 1
    if calls == 5 and not marker.exists():
        marker.touch()
        time.sleep(600)
    return [len(set(text)) / 100 for text in completions]
"""


def wait_for(marker: Path, child: Child) -> None:
    deadline = time.monotonic() + 60
    while not marker.exists():
        assert time.monotonic() < deadline, child.output
        time.sleep(0.01)


def stopped(child: Child, number: signal.Signals, run: Path) -> float:
    """Check how the command ended; the seconds it took."""
    started = time.monotonic()
    assert child.wait(30) == CODES[number], child.output
    seconds = time.monotonic() - started
    step = saved_state(run)["step"]
    assert f"stopped at step {step} (signal {int(number)}); saved. --resume continues." in child.output
    assert step == len(steps_of(run))  # every finished step is in the checkpoint
    return seconds


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("what", ["sampling", "gradient", "evaluation", "save"])
def test_a_signal_stops_the_run_and_loses_nothing(server, assets, references, what, number, tmp_path):
    rarely = {} if what == "save" else RARELY
    config = write_config(tmp_path / "run.toml", values_of("rl", assets, tmp_path / "run", rarely))
    marker, seconds = tmp_path / "marker", 1.5 if what == "save" else 600
    child = server.start("rl", config, hook=("pause_in", what, marker, seconds))
    wait_for(marker, child)
    child.send(number)
    if what == "save":  # a second one during the save, and a third, change nothing
        time.sleep(0.4)  # Python sees signals that come at once in the order of their numbers
        child.send(signal.SIGINT)
        child.send(signal.SIGTERM)
    assert stopped(child, number, tmp_path / "run") < 15
    code, output = server.run("rl", config, "--resume")
    assert code == 0, output
    assert bits(tmp_path / "run") == references["rl"].bits


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("timeout", [False, 300.0], ids=["in process", "in a worker"])
def test_a_signal_ends_a_hung_reward(server, assets, number, timeout, tmp_path):
    ends = []
    for name in ("undisturbed", "stopped"):
        folder = tmp_path / name
        reward = {"reward": {"names": ["reward.py:reward"], "timeout_seconds": timeout}}
        config = write_config(folder / "run.toml", values_of("rl", assets, folder / "run", RARELY, reward))
        (folder / "reward.py").write_text(HUNG_REWARD)
        if name == "undisturbed":
            (folder / "marker").touch()
            assert server.run("rl", config)[0] == 0
        else:
            child = server.start("rl", config)
            wait_for(folder / "marker", child)
            child.send(number)
            assert stopped(child, number, folder / "run") < 15
            assert server.run("rl", config, "--resume")[0] == 0
        ends.append(bits(folder / "run"))
    different = {key for key in ends[0] if ends[0][key] != ends[1][key]}
    assert different <= {"result.json", "state.json"}  # the reward's path is in the signature and the fingerprint


def test_signals_at_random_moments(server, assets, references, tmp_path):
    """Before the run has begun a signal just ends the process: nothing is there to be saved. Half of the trials wait
    for the first line of the log, so that however busy the machine is some signals come in the middle."""
    random.seed(2)
    stops = trial = 0
    while stops < 4:
        trial += 1
        assert trial < 40, "the runs end before a signal comes"
        number = list(CODES)[trial % 2]
        folder = tmp_path / str(trial)
        config = write_config(folder / "run.toml", values_of("rl", assets, folder / "run", RARELY))
        child = server.start("rl", config)
        if trial % 4 > 1:
            wait_for(folder / "run" / "metrics.jsonl", child)
            time.sleep(random.uniform(0.0, 0.3) * references["rl"].seconds)
        else:
            time.sleep(random.uniform(0.2, 0.9) * references["rl"].seconds)
        child.send(number)
        code = child.wait(30)
        assert code in (0, CODES[number], -number), child.output
        stops += code == CODES[number] and "saved" in child.output
        assert server.run("rl", config, "--resume")[0] == 0
        assert bits(folder / "run") == references["rl"].bits
