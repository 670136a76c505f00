"""The contract with reward functions (docs/reliability.md, R5), with real functions and real worker processes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from esrl.errors import RewardError
from esrl.rewards.calling import RewardConfig, RewardResult, StepCounts, build_reward, required_columns
from esrl.rewards.process import WorkerProcess

FUNCTIONS = str(Path(__file__).with_name("reward_functions.py"))
TEXTS = ["a", "bb", "ccc"]
COLUMNS = {"source": ["x", "y", "z"], "reference": ["a", "bb", "dd"]}


def path_of(name: str) -> str:
    return f"{FUNCTIONS}:{name}"


def score(name: str, completions: list[str] = TEXTS, **options) -> RewardResult:
    with build_reward(RewardConfig(names=(path_of(name),), **options)) as reward:
        return call(reward, completions)


def call(reward, completions: list[str] = TEXTS, prompts: list[str] | None = None) -> RewardResult:
    """One step of a single call."""
    size = len(completions)
    columns = {name: values[:size] for name, values in COLUMNS.items()}
    ids = [[index, 10] for index in range(size)]
    result = reward.score(prompts or ["p"] * size, completions, ids, columns, {"global_step": 7})
    reward.end_step(reward.counts)
    return result


@pytest.fixture(scope="module")
def obeying():
    """One worker for all tests that do not kill it for good: whatever they do, the next one must find it working."""
    with build_reward(RewardConfig(names=(path_of("obeys"),), timeout_seconds=0.4, max_abstain_share=1.0)) as reward:
        yield reward


# ---- what may be returned


@pytest.mark.parametrize(
    "name",
    ["lengths", "as_tuple", "as_numpy", "as_tensor", "as_numpy_scalars", "asynchronous", "Scorer", "AsyncScorer"],
)
def test_every_kind_of_list_of_numbers_counts(name):
    result = score(name)
    assert result.values.tolist() == [1.0, 2.0, 3.0]
    assert result.values.dtype == torch.float64
    assert not result.abstained.any()


def test_bools_count_as_0_and_1():
    assert score("as_bools").values.tolist() == [0.0, 1.0, 1.0]


def test_none_abstains_and_is_counted(caplog):
    with build_reward(RewardConfig(names=(path_of("abstains_from_empty"),))) as reward:
        result = call(reward, ["a", "", "ccc"])
    assert result.abstained.tolist() == [False, True, False]
    assert result.values.tolist() == [1.0, 0.0, 3.0]
    assert reward.state_dict()["num_abstained"] == 1
    assert "abstained from 1 of 3" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "returned 2 values for 3 completions"),
        ("too_many", "returned 4 values for 3 completions"),
        ("strings", r"returned a str, '0.5', not a number, for completion 1 of 3: 'bb'"),
        ("one_number", "returned a float, not a list of 3 numbers"),
        ("nothing", "returned a NoneType"),
        ("a_dict", "returned a dict"),
        ("two_dimensional", r"returned a ndarray of shape \(3, 1\)"),
        ("nested", r"returned a list, \[1.0\], not a number, for completion 0"),
        ("not_a_number", r"returned nan.* for completion 1 of 3: 'bb'"),
        ("infinite", r"returned -inf.* for completion 2 of 3: 'ccc'"),
        ("too_large", r"returned inf.* for completion 0"),
        ("raises", r"raised ZeroDivisionError: .*\(reward_functions.py:\d+\), for 3 completions, the first 'a'"),
        ("exits", "raised SystemExit"),
        ("misuses_log_extra", "1 values for 3 completions"),
        ("raises_later", "raised ZeroDivisionError: .*, for 3 completions"),
        ("exits_later", "raised SystemExit"),
        ("asynchronous_nan", "returned nan.* for completion 0 of 3: 'a'"),
        ("asynchronous_too_few", "returned 2 values for 3 completions"),
    ],
)
def test_a_broken_contract_stops_with_name_and_culprit(name, message):
    with pytest.raises(RewardError, match=message) as caught:
        score(name)
    assert path_of(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_texts_are_shortened_in_messages():
    with pytest.raises(RewardError) as caught:
        score("not_a_number", ["a", "x" * 5000, "c"])
    assert len(str(caught.value)) < 400


# ---- what a function is given


def test_arguments_by_name_and_both_logs():
    result = score("logs")
    assert result.values.tolist() == [10.0, 11.0, 12.0]  # sums of the ids [i, 10]
    assert result.metrics == {"step_seen": 7.0}
    assert result.extra == {"pair": ["pax", "pbby", "pcccz"]}


def test_arguments_and_logs_cross_to_a_worker():
    here, there = score("logs"), score("logs", timeout_seconds=20)
    assert (there.values.tolist(), there.metrics, there.extra) == (here.values.tolist(), here.metrics, here.extra)


@pytest.mark.parametrize("options", [{}, {"timeout_seconds": 20}], ids=["here", "in a worker"])
def test_the_state_is_read_by_name_and_by_attribute(options):
    assert score("reads_the_state", **options).values.tolist() == [7.0] * 3


def test_a_function_cannot_spoil_the_lists_of_the_next():
    names = (path_of("spoils_its_lists"), path_of("lengths"), "exact_match")
    # lengths [1, 2, 3], half of matches [1, 1, 0]
    with build_reward(RewardConfig(names=names, weights=(1.0, 1.0, 0.5))) as reward:
        assert call(reward, list(TEXTS)).values.tolist() == [1.5, 2.5, 3.0]


def test_weighted_sum_abstains_where_any_function_does():
    config = RewardConfig(names=(path_of("abstains_from_empty"), path_of("lengths")), weights=(2.0, -1.0))
    with build_reward(config) as reward:
        result = call(reward, ["aa", "", "c"])
    assert result.values.tolist() == [2.0, 0.0, 1.0]  # 2 * length - length
    assert result.abstained.tolist() == [False, True, False]


def test_an_overflowing_sum_is_refused():
    with pytest.raises(RewardError, match="overflows for completion 0"):
        score("lengths", weights=(1e308,), completions=["x" * 100])


def test_async_functions_run_inside_a_running_loop():
    async def notebook() -> list[float]:
        return score("asynchronous").values.tolist()

    assert asyncio.run(notebook()) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("options", [{}, {"timeout_seconds": 20}], ids=["here", "in a worker"])
def test_async_functions_stay_on_one_loop(options):
    """So that a client which a function keeps open serves every step."""
    with build_reward(RewardConfig(names=(path_of("remembers_its_loop"),), **options)) as reward:
        assert [call(reward).values.tolist() for _ in range(3)] == [[1.0] * 3] * 3


@pytest.mark.parametrize("names", [("waits", "blocks", "waits_too"), ("blocks", "waits_too", "waits")])
def test_async_functions_run_while_others_do(names):
    with build_reward(RewardConfig(names=tuple(map(path_of, names)))) as reward:
        started = time.monotonic()
        assert call(reward).values.tolist() == [6.0] * 3
        assert time.monotonic() - started < 0.9  # one after another they take 1.5 s


def test_workers_run_at_the_same_time():
    names = tuple(map(path_of, ("blocks", "waits", "blocks")))
    with build_reward(RewardConfig(names=names, timeout_seconds=5)) as reward:
        started = time.monotonic()
        assert call(reward).values.tolist() == [7.0] * 3
        assert time.monotonic() - started < 1.2


def test_an_async_function_that_never_ends_is_stopped(caplog):
    names = (path_of("never_ends"), path_of("waits"))
    with build_reward(RewardConfig(names=names, timeout_seconds=0.9)) as reward:
        started = time.monotonic()
        assert call(reward).abstained.all()
        assert time.monotonic() - started < 2 * (0.9 + 1)
    assert "never_ends' gave no answer in 0.9 s" in caplog.text and "waits' gave" not in caplog.text


def test_nobody_waits_for_the_others_of_a_function_that_fails():
    names = (path_of("raises"), path_of("never_ends"))
    for options in ({}, {"timeout_seconds": 20}):
        with build_reward(RewardConfig(names=names, **options)) as reward:
            started = time.monotonic()
            with pytest.raises(RewardError, match="ZeroDivisionError"):
                call(reward)
            assert time.monotonic() - started < 5


def test_no_completions_is_no_call():
    assert score("too_many", []).values.tolist() == []


# ---- names, columns, configuration


def test_missing_columns_are_found_before_training():
    config = RewardConfig(names=("bleu", path_of("logs")))
    assert required_columns(config) == ("reference", "source")
    reward = build_reward(config)
    reward.check_columns(["source", "reference", "more"])
    with pytest.raises(ValueError, match=r"'bleu' needs the column 'reference'; the data has source, target"):
        reward.check_columns(["target", "source"])
    with pytest.raises(ValueError, match="column 'prompts'"):
        reward.check_columns(["source", "reference", "prompts"])


def test_columns_required_by_a_function_in_a_worker():
    assert required_columns(RewardConfig(names=(path_of("logs"),), timeout_seconds=5)) == ("source",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (path_of("lenghts"), "did you mean 'lengths'"),
        ("/no/such/file.py:score", "no file /no/such/file.py"),
        ("no_such_package.rewards:score", "no module 'no_such_package'; install it, or name a file"),
        ("math:pi", "is a float, which cannot be called"),
        (path_of("positional_only"), "positional-only"),
        ("reward_functions:lengths", "no module 'reward_functions'"),  # beside this file, but on no search path
    ],
)
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_unusable_names(name, message, timeout, monkeypatch):
    monkeypatch.chdir(Path(FUNCTIONS).parent)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    with pytest.raises(ValueError, match=message):
        build_reward(RewardConfig(names=(name,), timeout_seconds=timeout))


def test_dotted_names_are_imported():
    for name in ("esrl.rewards.text:ExactMatch", "esrl.rewards.text.ExactMatch"):
        assert call(build_reward(RewardConfig(names=(name,)))).values.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("blue",)}, "unknown reward 'blue'; did you mean 'bleu'"),
        ({"names": ()}, "names is empty"),
        ({"names": ("rewards.py",)}, "name the function in it: rewards.py:function"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 rewards"),
        ({"weights": (float("nan"),)}, "finite"),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0"),
        ({"max_abstain_share": 1.5}, "max_abstain_share is 1.5"),
        ({"abstain_window": 0}, "abstain_window is 0"),
    ],
)
def test_configuration_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options)


def test_lists_of_different_lengths_are_refused():
    reward = build_reward(RewardConfig())
    with pytest.raises(ValueError, match="reference has 1 entries for 2 completions"):
        reward.score(["p", "p"], ["a", "b"], [[1], [2]], {"reference": ["a"]}, {})


# ---- abstentions over time


def test_too_many_abstentions_stop_the_run_and_survive_a_restart():
    config = RewardConfig(names=(path_of("abstains_from_empty"),), abstain_window=4, max_abstain_share=0.5)
    reward = build_reward(config)
    call(reward, ["", ""])  # 1 of 4 steps
    call(reward, ["a", ""])  # 1.5 of 4
    call(reward, ["a", ""])  # 2 of 4: at the limit, not over it
    saved = json.loads(json.dumps(reward.state_dict()))
    resumed = build_reward(config)
    resumed.load_state_dict(saved)
    for one in (reward, resumed):
        with pytest.raises(RewardError, match=r"abstained from 62% of the samples of 4 steps"):
            call(one, ["a", ""])  # 2.5 of 4
    assert saved["num_abstained"] == 4


def test_the_calls_of_a_step_count_together():
    """First estimates and samples: 2 of 2 and 1 of 4 abstained, so 3 of 6; another process adds 0 of 6."""
    reward = build_reward(RewardConfig(names=(path_of("abstains_from_empty"),)))
    for texts in (["", ""], ["", "a", "b", "c"]):
        reward.score(["p"] * len(texts), texts, [[1]] * len(texts), {}, {})
    assert reward.counts == (6, 3, 0)
    assert reward.state_dict()["num_samples"] == 0  # the step has not ended
    reward.end_step(StepCounts(reward.counts.samples + 6, reward.counts.abstained, 0))
    state = reward.state_dict()
    assert (state["abstain_shares"], state["num_samples"], state["num_abstained"]) == ([0.25], 12, 3)
    reward.score(["p"], [""], [[1]], {}, {})
    reward.load_state_dict(state)  # an interrupted step leaves nothing
    assert reward.counts == (0, 0, 0) and reward.state_dict() == state


def test_old_abstentions_are_forgotten():
    reward = build_reward(RewardConfig(names=(path_of("abstains_from_empty"),), abstain_window=2))
    for _ in range(3):
        call(reward, [""])  # with the next one 1 of 2 steps, never more than half
        call(reward, ["a"])


def test_default_limit_stops_an_always_abstaining_function_in_its_eleventh_step():
    reward = build_reward(RewardConfig(names=(path_of("always_abstains"),)))
    for _ in range(10):  # 10 of 20 steps are half, which is allowed
        call(reward)
    with pytest.raises(RewardError, match=r"max_abstain_share = 0\.5"):
        call(reward)


# ---- worker processes


def test_worker_stays_between_calls_and_is_another_process(obeying):
    first, second = call(obeying, ["pid"]), call(obeying, ["pid", "abstain"])
    assert first.metrics["pid"] == second.metrics["pid"] != os.getpid()
    assert second.values.tolist() == [3.0, 0.0]
    assert second.abstained.tolist() == [False, True]


@pytest.mark.parametrize(
    ("order", "message"),
    [("nan", "returned nan.* for completion 0 of 1: 'nan'"), ("raise", r"raised KeyError: .*\.py:")],
)
def test_contract_holds_in_a_worker(obeying, order, message):
    with pytest.raises(RewardError, match=message):
        call(obeying, [order])
    assert call(obeying, ["abc"]).values.tolist() == [3.0]


@pytest.mark.parametrize("order", ["sleep", "hold the lock", "leave a child"])
def test_hanging_calls_are_tried_twice_then_abstain(obeying, order, caplog):
    before = obeying.state_dict()["num_failed_tries"]
    start = time.monotonic()
    result = call(obeying, [order, "b"])
    assert time.monotonic() - start < 2 * (0.4 + 1.0)
    assert result.abstained.tolist() == [True, True]
    assert obeying.state_dict()["num_failed_tries"] == before + 2
    assert "gave no answer in 0.4 s; trying once more" in caplog.text
    assert "its 2 samples abstain" in caplog.text
    assert call(obeying, ["abc"]).values.tolist() == [3.0]


@pytest.mark.parametrize(("order", "fate"), [("exit", "exit code 3"), ("be killed", "signal 9")])
def test_crashing_calls_are_tried_twice_then_abstain(obeying, order, fate, caplog):
    assert call(obeying, [order]).abstained.tolist() == [True]
    assert caplog.text.count(f"died ({fate})") == 2
    assert call(obeying, ["abc"]).values.tolist() == [3.0]


def test_a_second_try_can_succeed(obeying, tmp_path):
    result = call(obeying, ["exit once"], prompts=[str(tmp_path / "tried")])
    assert result.values.tolist() == [9.0]


def test_an_interrupted_call_leaves_no_late_answer_to_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    process = WorkerProcess(path_of("obeys"))
    process.start()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            process.call({"prompts": ["p"], "completions": ["sleep"]}, 20)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process.pid is None
    assert process.call({"prompts": ["p"], "completions": ["abc"]}, 5).values == [3.0]
    process.stop()


def test_only_json_crosses(obeying):
    with pytest.raises(RewardError, match="can only be given JSON"):
        obeying.score(["p"], ["abc"], [[1]], {}, {"model": object()})


def test_an_import_that_hangs_is_a_configuration_error(tmp_path, monkeypatch):
    monkeypatch.setattr("esrl.rewards.process.START_SECONDS", 0.3)
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"hangs.py:f' gave no answer in 0.3 s at its start"):
        build_reward(RewardConfig(names=(f"{tmp_path}/hangs.py:f",), timeout_seconds=1.0))


def test_failures_leave_no_process_thread_or_descriptor():
    process = WorkerProcess(path_of("obeys"))
    process.start()
    process.stop()
    descriptors, threads = len(os.listdir("/dev/fd")), threading.active_count()
    logging.getLogger("esrl").setLevel(logging.ERROR)
    with build_reward(RewardConfig(names=(path_of("obeys"),), timeout_seconds=0.1, max_abstain_share=1.0)) as reward:
        worker = reward._components[0].worker
        for order in ("sleep", "exit", "sleep"):
            if worker.pid is None:
                worker.start()
            pid = worker.pid
            assert call(reward, [order]).abstained.all()
            with pytest.raises(ProcessLookupError):  # a zombie would still take the signal
                os.kill(pid, 0)
    assert (len(os.listdir("/dev/fd")), threading.active_count()) == (descriptors, threads)
    logging.getLogger("esrl").setLevel(logging.NOTSET)


def test_large_requests_pass(obeying):
    # 2 MB do not fit into a pipe: the worker must be reading while the parent writes
    assert call(obeying, ["x" * 2_000_000]).values.tolist() == [2_000_000.0]


@pytest.mark.parametrize("order", ["sleep", "hold the lock"])
def test_worker_dies_with_its_parent(order):
    script = f"""
import os, signal, threading
from esrl.rewards.process import WorkerProcess
process = WorkerProcess({path_of("obeys")!r})
process.start()
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
process.call({{"prompts": ["p"], "completions": [{order!r}]}}, 0.5)
"""
    # The worker holds its parent's standard error too, so that ends when both are gone.
    parent = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, timeout=10, check=False)
    assert parent.returncode == -9


def test_built_in_metrics_need_no_worker():
    reward = build_reward(RewardConfig(names=("exact_match",), timeout_seconds=0.5))
    assert reward._components[0].worker is None
    assert call(reward).values.tolist() == [1.0, 1.0, 0.0]
