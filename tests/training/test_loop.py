"""The loop with a task small enough to be worked out by hand: when it evaluates, saves, stops, and what it logs."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import evaluations_of, json_lines, metric_rows, saved_state, steps_of
from torch import nn

from esrl.errors import Interrupted, NumericsError
from esrl.report.runs import read_run
from esrl.training.alarms import AlarmConfig
from esrl.training.checkpoint import CheckpointStore, unpack_tensors
from esrl.training.loop import Loop, LoopState, Update
from esrl.training.loop_config import LoopConfig
from esrl.training.optimization import OptimizerConfig
from esrl.training.run_folder import RunFolder

BATCHES = 4
CONFIG = LoopConfig(num_epochs=2, eval_steps=1, save_steps=1, metric_for_best_model="dev_score")


class Walk(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))


class WalkTask:
    """Pulls the number up with a gradient of -3 over a denominator of 2; AdamW moves it by the learning rate.

    ``scores`` are what the evaluations say, one after the other; None: there is no development set.
    """

    def __init__(self, scores: list[float] | None = None, seconds: float = 0.0) -> None:
        self.model = Walk()
        self.scores = scores
        self.seconds = seconds
        self.committed: list[tuple[int, int]] = []
        self.gradient = -3.0
        self.evaluations = 0

    def num_batches(self, epoch: int) -> int:
        return BATCHES

    def compute(self, epoch: int, batch: int) -> Update:
        time.sleep(self.seconds)
        self.model.place.grad = torch.tensor([self.gradient])

        def commit() -> list[dict[str, Any]]:
            self.committed.append((epoch, batch))
            return [{"line": len(self.committed)}]

        return Update(loss=6.0, denominator=2.0, metrics={"own": batch, "tokens_sampled": 10}, commit=commit)

    def evaluate(self) -> dict[str, float]:
        if self.scores is None:
            return {}
        self.evaluations += 1
        return {"dev_score": self.scores[self.evaluations - 1], "dev_other": 1.0}

    def export(self) -> dict[str, bytes]:
        return {"place.txt": f"{float(self.model.place.detach()):.3f}".encode()}

    def state_dict(self) -> dict[str, Any]:
        return {"committed": self.committed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.committed = [tuple(pair) for pair in state["committed"]]


def run_loop(
    folder: Path,
    task: WalkTask,
    config: LoopConfig = CONFIG,
    tracker: Callable[[dict[str, Any], int], None] | None = None,
    **changes: Any,
) -> Loop:
    optimizer = changes.pop("optimizer", OptimizerConfig(learning_rate=1.0, max_grad_norm=0.0))
    resume = changes.pop("resume", False)
    with RunFolder(folder, resume=resume, save_total_limit=config.save_total_limit) as run:
        loop = Loop(task, replace(config, **changes), optimizer, run, 1, {"what": "walk"}, tracker)
        loop.run()
    return loop


def exported(folder: Path) -> float:
    """Where the walk stood when its model was exported: a step is about 1 (AdamW: lr * g / |g|)."""
    return round(float((folder / "model" / "place.txt").read_text()))


def test_a_step_divides_once_and_logs_what_it_did(tmp_path):
    seen = []
    loop = run_loop(tmp_path, WalkTask([0.0] * 9), tracker=lambda values, step: seen.append((step, values)))
    rows = steps_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["epoch"] for row in rows] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert [row["own"] for row in rows] == [0, 1, 2, 3] * 2
    assert {row["loss"] for row in rows} == {6.0 / 2.0}
    assert {row["grad_norm"] for row in rows} == {3.0 / 2.0}
    assert {row["learning_rate"] for row in rows} == {1.0}
    assert all(row["seconds_total"] >= 0 and row["peak_memory_mb"] > 0 for row in rows)
    # a constant gradient: m / sqrt(v) is 1 after bias correction, so eight steps lead to 8
    assert loop.task.model.place.item() == pytest.approx(8.0, abs=1e-4)
    assert loop.task.committed == [(epoch, batch) for epoch in (0, 1) for batch in range(4)]
    assert json_lines(tmp_path / "samples.jsonl") == [{"step": n, "line": n} for n in range(1, 9)]
    assert [step for step, _ in seen] == [row["step"] for row in json_lines(tmp_path / "metrics.jsonl")]
    assert [values for _, values in seen] == json_lines(tmp_path / "metrics.jsonl")


def test_gradients_are_clipped_after_the_division(tmp_path):
    """|-3 / 2| = 1.5 is logged, 0.5 goes into Adam's first moment: (1 - 0.9) * -0.5."""
    optimizer = OptimizerConfig(learning_rate=1.0, max_grad_norm=0.5)
    loop = run_loop(tmp_path, WalkTask([0.0] * 2), max_steps=1, optimizer=optimizer)
    assert steps_of(tmp_path)[0]["grad_norm"] == 1.5
    assert loop.optimizer.tensors()["exp_avg.place"].item() == pytest.approx(-0.05)


def test_the_best_model_is_the_first_of_the_highest_scores(tmp_path):
    loop = run_loop(tmp_path, WalkTask([1.0, 3.0, 2.0, 3.0, 0.0]), max_steps=4)
    assert (loop.state.best_step, loop.state.best_score, loop.state.start_score) == (1, 3.0, 1.0)
    assert exported(tmp_path) == 1
    lines = evaluations_of(tmp_path)
    assert [(line["step"], line["best"], line["dev_score"]) for line in lines] == [
        (0, True, 1.0),
        (1, True, 3.0),
        (2, False, 2.0),
        (3, False, 3.0),
        (4, False, 0.0),
    ]
    assert lines[0].keys() == {"step", "epoch", "kind", "best", "dev_score", "dev_other", "seconds_total"}


@given(scores=st.lists(st.floats(-5, 5), min_size=9, max_size=9), patience=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_best_and_patience_follow_their_definitions(tmp_path_factory, scores, patience):
    folder = tmp_path_factory.mktemp("loop")
    loop = run_loop(folder, WalkTask(scores), patience=patience, save_steps=100)
    last, best = 0, 0
    for step in range(1, 9):
        last = step
        if scores[step] > scores[best]:
            best = step
        if step - best == patience:  # so many evaluations in a row without a better one
            break
    assert (loop.state.step, loop.state.best_step) == (last, best)
    assert loop.state.best_score == scores[best] and exported(folder) == best


def test_more_patience_takes_a_stopped_run_up_again(tmp_path):
    loop = run_loop(tmp_path, WalkTask([5.0, 1.0, 1.0]), patience=2)
    assert loop.state.step == 2
    assert run_loop(tmp_path, WalkTask(), resume=True, patience=2).was_complete
    loop = run_loop(tmp_path, WalkTask([1.0, 6.0, 1.0, 1.0, 1.0]), resume=True, patience=3)
    # without gain at 1, 2, 3 would end it there; the third evaluation is step 3's
    assert loop.state.step == 3 and loop.state.best_step == 0


def test_without_a_development_set_the_last_model_is_kept(tmp_path):
    loop = run_loop(tmp_path, WalkTask(None))
    assert exported(tmp_path) == 8 and evaluations_of(tmp_path) == []
    assert (loop.state.best_step, loop.state.best_score, loop.state.start_score) == (-1, None, None)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eval_steps": None}, [0, 4, 8]),  # the ends of the epochs
        ({"eval_steps": 3}, [0, 3, 6, 8]),  # and always the end of the run
        ({"eval_steps": 3, "eval_on_start": False}, [3, 6, 8]),
        ({"eval_steps": 100, "eval_on_start": False, "max_steps": 5}, [5]),
    ],
)
def test_when_it_evaluates(tmp_path, changes, steps):
    loop = run_loop(tmp_path, WalkTask([0.0] * 9), **changes)
    assert [line["step"] for line in evaluations_of(tmp_path)] == steps
    assert (loop.state.start_score is None) == (steps[0] != 0)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"save_total_limit": None}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"save_total_limit": 2}, [7, 8]),
        ({"save_total_limit": None, "save_steps": 3}, [0, 3, 6, 8]),
        # older than 0 seconds is every one
        ({"save_total_limit": None, "save_steps": 100, "save_seconds": 0.0}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_which_checkpoints_there_are(tmp_path, changes, kept):
    run_loop(tmp_path, WalkTask([0.0] * 9), replace(CONFIG, **changes))
    assert sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir()) == kept
    checkpoint = CheckpointStore(tmp_path / "checkpoints").latest()
    assert checkpoint is not None
    assert round(unpack_tensors(checkpoint.files["model.safetensors"])["place"].item()) == 8


def test_the_step_that_passes_max_seconds_is_the_last(tmp_path):
    config = replace(CONFIG, num_epochs=None, max_seconds=0.12, eval_steps=100)
    task = WalkTask([0.0] * 9, seconds=0.05)
    loop = run_loop(tmp_path, task, config)
    times = [row["seconds_total"] for row in steps_of(tmp_path)]
    assert sum(times[:-1]) < 0.12 <= sum(times) == pytest.approx(loop.state.seconds)
    assert 1 <= len(times) <= 3
    assert run_loop(tmp_path, task, config, resume=True).was_complete


@pytest.mark.parametrize(("limit", "steps"), [(1, 1), (30, 3), (31, 4)])
def test_the_step_that_reaches_max_sampled_tokens_is_the_last(tmp_path, limit, steps):
    config = replace(CONFIG, num_epochs=None, max_sampled_tokens=limit, eval_steps=100)
    assert run_loop(tmp_path, WalkTask(), config).state.step == steps  # 10 tokens each
    longer = run_loop(tmp_path, WalkTask(), replace(config, max_sampled_tokens=61), resume=True)
    assert (longer.state.step, longer.state.sampled_tokens) == (7, 70)  # a resumed run goes on counting


def test_evaluation_and_saving_do_not_count_as_training_time(tmp_path):
    class Slow(WalkTask):
        def evaluate(self) -> dict[str, float]:
            time.sleep(0.2)
            return super().evaluate()

    loop = run_loop(tmp_path, Slow([0.0] * 9), max_steps=2)
    assert sum(line["seconds_total"] for line in evaluations_of(tmp_path)) >= 0.6
    assert loop.state.seconds < 0.4


def test_the_schedule_ends_at_the_last_step(tmp_path):
    """linear over 8 steps: 1, 7/8, ..., 1/8."""
    run_loop(tmp_path, WalkTask([0.0] * 9), optimizer=OptimizerConfig(learning_rate=1.0, lr_scheduler="linear"))
    assert [row["learning_rate"] for row in steps_of(tmp_path)] == [1 - step / 8 for step in range(8)]


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler 'linear' falls to 0 at the last step"):
        run_loop(
            tmp_path / "a",
            WalkTask(),
            LoopConfig(max_seconds=1.0),
            optimizer=OptimizerConfig(lr_scheduler="linear"),
        )
    with pytest.raises(ValueError, match=r"metric_for_best_model is 'dev_bleu'; the evaluation has dev_score"):
        run_loop(tmp_path / "b", WalkTask([0.0]), metric_for_best_model="dev_bleu")
    with pytest.raises(ValueError, match="without any of them a run never ends"):
        LoopConfig()
    limits = ("max_steps", "num_epochs", "max_seconds", "max_sampled_tokens")
    for name in (*limits, "eval_steps", "patience", "save_steps"):
        for value in (0, -1, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name} is {value}; it must be above 0"):
                LoopConfig(**{"num_epochs": 1, name: value})
    with pytest.raises(ValueError, match="skip_nonfinite is -1; it must be 0 or more"):
        LoopConfig(num_epochs=1, skip_nonfinite=-1)
    with pytest.raises(ValueError, match="save_seconds is nan"):
        LoopConfig(num_epochs=1, save_seconds=math.nan)


def test_a_step_that_fails_commits_nothing(tmp_path):
    class Failing(WalkTask):
        def compute(self, epoch: int, batch: int) -> Update:
            self.gradient = math.inf if batch == 2 else -3.0
            return super().compute(epoch, batch)

    task = Failing([0.0] * 9)
    with pytest.raises(NumericsError, match="the gradient of place is not finite"):
        run_loop(tmp_path, task, save_steps=100)
    assert task.committed == [(0, 0), (0, 1)] and round(task.model.place.item()) == 2
    state = saved_state(tmp_path)
    assert state["step"] == 2 and state["state.json"]["task"] == {"committed": [[0, 0], [0, 1]]}
    assert len(metric_rows(tmp_path)) == 2 + 3  # evaluations at 0, 1, 2


def test_a_resumed_loop_is_the_uninterrupted_one(tmp_path):
    """Stopped by max_steps at each step in turn; evaluation is at every step, so the logs agree as well."""
    scores = [1.0, 3.0, 2.0, 5.0, 4.0, 6.0, 0.0, 7.0, 1.0]
    run_loop(tmp_path / "whole", WalkTask(scores))
    for stop in range(1, 8):
        run_loop(tmp_path / str(stop), WalkTask(scores), max_steps=stop)
        run_loop(tmp_path / str(stop), WalkTask(scores[stop + 1 :]), resume=True)
        assert saved_state(tmp_path / str(stop)) == saved_state(tmp_path / "whole")
        assert metric_rows(tmp_path / str(stop)) == metric_rows(tmp_path / "whole")
        assert exported(tmp_path / str(stop)) == exported(tmp_path / "whole") == 7
        logs = [(tmp_path / name / "samples.jsonl").read_bytes() for name in (str(stop), "whole")]
        assert logs[0] == logs[1]


def test_what_was_logged_behind_the_checkpoint_is_logged_again_once(tmp_path):
    run_loop(tmp_path, WalkTask([0.0] * 9), max_steps=3)
    with open(tmp_path / "metrics.jsonl", "a") as file:  # a killed run got further than its checkpoint
        file.write(json.dumps({"step": 4, "own": "stale"}) + '\n{"step": 5, "ow')
    run_loop(tmp_path, WalkTask([0.0] * 9), resume=True)
    assert [row["step"] for row in steps_of(tmp_path)] == list(range(1, 9))
    assert "stale" not in (tmp_path / "metrics.jsonl").read_text()


class FailingTask(WalkTask):
    """The third step raises an error, before or (``in_commit``) while it is committed."""

    def __init__(self, error: Exception, *, in_commit: bool = False) -> None:
        super().__init__([0.0] * 9)
        self.error, self.in_commit = error, in_commit

    def compute(self, epoch: int, batch: int) -> Update:
        update = super().compute(epoch, batch)
        if (epoch, batch) != (0, 2):
            return update
        if not self.in_commit:
            raise self.error

        def commit() -> list[dict[str, Any]]:
            raise self.error

        return replace(update, commit=commit)


@pytest.mark.parametrize(
    "error", [RuntimeError("a peer is gone"), KeyError("x"), MemoryError(), ValueError("x"), NumericsError("x")]
)
def test_whatever_stops_a_run_the_last_whole_step_is_saved(tmp_path, capsys, error):
    with pytest.raises(type(error)):
        run_loop(tmp_path, FailingTask(error), save_steps=100)
    assert saved_state(tmp_path)["step"] == 2
    assert f"stopped at step 2 ({type(error).__name__}); saved. --resume continues." in capsys.readouterr().err
    run_loop(tmp_path, WalkTask([0.0] * 9), resume=True)
    assert [row["step"] for row in steps_of(tmp_path)] == list(range(1, 9)) and exported(tmp_path) == 0


def test_half_a_step_is_never_saved(tmp_path, capsys):
    """The optimizer has stepped, the task has not: what was saved before stands."""
    with pytest.raises(RuntimeError, match="half"):
        run_loop(tmp_path, FailingTask(RuntimeError("half"), in_commit=True), save_steps=100)
    assert saved_state(tmp_path)["step"] == 0
    said = capsys.readouterr().err
    assert "stopped at step 2 (RuntimeError); --resume continues from step 0, the last one saved." in said
    run_loop(tmp_path, WalkTask([0.0] * 9), resume=True)
    assert [row["step"] for row in steps_of(tmp_path)] == list(range(1, 9))
    checkpoint = CheckpointStore(tmp_path / "checkpoints").latest()
    assert checkpoint is not None
    assert round(unpack_tensors(checkpoint.files["model.safetensors"])["place"].item()) == 8


def test_a_signal_during_the_rescue_does_not_cut_it_short(tmp_path, monkeypatch):
    real = CheckpointStore.save

    def save(self: Any, step: int, files: Any) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, files)

    monkeypatch.setattr(CheckpointStore, "save", save)
    with pytest.raises(Interrupted):
        run_loop(tmp_path, FailingTask(RuntimeError("x")), save_steps=100)
    assert saved_state(tmp_path)["step"] == 2


class SpoiltTask(WalkTask):
    """The gradients of these steps (from 1) are no numbers."""

    def __init__(self, *steps: int) -> None:
        super().__init__([0.0] * 9)
        self.steps = steps

    def compute(self, epoch: int, batch: int) -> Update:
        self.gradient = math.nan if epoch * BATCHES + batch + 1 in self.steps else -3.0
        return super().compute(epoch, batch)


def test_steps_that_are_not_finite_are_skipped_where_that_is_allowed(tmp_path):
    task = SpoiltTask(2, 3, 6)
    with pytest.warns(UserWarning, match="step 2 was skipped: the gradient of place is not finite"):
        loop = run_loop(tmp_path, task, skip_nonfinite=2)
    rows = steps_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in rows if row.get("skipped")] == [2, 3, 6]
    assert all("not finite" in row["reason"] for row in rows if "skipped" in row)
    # the other five moved it by 1 each
    assert task.committed == [(0, 0), (0, 3), (1, 0), (1, 2), (1, 3)] and round(task.model.place.item()) == 5
    assert loop.state.skipped == 0


@pytest.mark.filterwarnings("ignore:step . was skipped")
def test_one_more_in_a_row_than_allowed_stops_the_run_also_after_a_resume(tmp_path):
    task = SpoiltTask(2, 3, 4)
    with pytest.raises(NumericsError, match="the gradient of place is not finite"):
        run_loop(tmp_path, task, skip_nonfinite=2, save_steps=100)
    assert task.committed == [(0, 0)]
    state = saved_state(tmp_path)
    assert (state["step"], state["state.json"]["loop"]["skipped"]) == (3, 2)
    with pytest.raises(NumericsError):
        run_loop(tmp_path, SpoiltTask(2, 3, 4), resume=True, skip_nonfinite=2)
    loop = run_loop(tmp_path, SpoiltTask(2, 3, 4), resume=True, skip_nonfinite=3)
    assert loop.state.step == 8 and loop.state.skipped == 0
    assert [row["step"] for row in steps_of(tmp_path) if row.get("skipped")] == [2, 3, 4]


class TellingTask(WalkTask):
    """Its reward rises by a tenth with every step, and from the fifth on its answers are three times as long."""

    def compute(self, epoch: int, batch: int) -> Update:
        update, number = super().compute(epoch, batch), epoch * BATCHES + batch
        figures = {"reward_mean": 0.1 * number, "length_mean": 10.0 if number < 4 else 30.0}
        return replace(update, metrics={**update.metrics, **figures})


ALARMED = replace(CONFIG, alarms=AlarmConfig(window=2, evaluations=2))
FALLING = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def alarms_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in json_lines(folder / "metrics.jsonl") if row.get("kind") == "alarm"]


def test_alarms_are_said_and_logged_once_and_change_nothing(tmp_path, capsys):
    """The metric is that of the best model; two evaluations below the best are at step 2, lengths beyond twice those
    of steps 1 and 2, on average over two steps, at step 6."""
    loop = run_loop(tmp_path / "alarmed", TellingTask(FALLING), ALARMED)
    lines = alarms_of(tmp_path / "alarmed")
    assert [(line["step"], line["alarm"].partition(":")[0]) for line in lines] == [
        (2, "reward up, dev_score down"),
        (6, "length drift"),
    ]
    assert all(line.keys() == {"step", "epoch", "kind", "alarm"} for line in lines)
    said = [line for line in capsys.readouterr().err.splitlines() if "alarm" in line]
    assert said == [f"alarm at step {line['step']}: {line['alarm']}" for line in lines]
    run_loop(tmp_path / "calm", TellingTask(FALLING), alarms=AlarmConfig(window=100, evaluations=100))
    assert alarms_of(tmp_path / "calm") == []
    quiet = [row for row in metric_rows(tmp_path / "alarmed") if row.get("kind") != "alarm"]
    assert quiet == metric_rows(tmp_path / "calm")
    assert round(loop.task.model.place.item()) == 8


def test_alarms_resume_where_they_were(tmp_path):
    run_loop(tmp_path / "whole", TellingTask(FALLING), ALARMED)
    for stop in range(1, 8):
        run_loop(tmp_path / str(stop), TellingTask(FALLING), ALARMED, max_steps=stop)
        run_loop(tmp_path / str(stop), TellingTask(FALLING[stop + 1 :]), ALARMED, resume=True)
        assert saved_state(tmp_path / str(stop)) == saved_state(tmp_path / "whole")
        assert metric_rows(tmp_path / str(stop)) == metric_rows(tmp_path / "whole")


@pytest.mark.parametrize("name", ["alarms", "sampled_tokens"])
def test_a_checkpoint_from_before_there_was_something_is_taken_up(name):
    state = LoopState(step=3, epoch=1)
    older = asdict(state)
    del older[name]
    assert LoopState(**older) == state


def test_the_report_reads_a_step_where_an_alarm_was_raised(tmp_path):
    run_loop(tmp_path, TellingTask(FALLING), ALARMED)
    run = read_run(tmp_path)
    assert [row["step"] for row in run.training] == list(range(1, 9)) and all("loss" in row for row in run.training)
    assert [row["step"] for row in run.evaluations] == list(range(9))
