"""NaN and infinity put in at every stage of a step: the run stops, and the disk holds the state before that step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from run_helpers import bits, metric_rows, mle_config, rl_config, saved_state, steps_of

from esrl import commands
from esrl.errors import EsrlError, NumericsError, RewardError
from esrl.models.seq2seq import MarianPolicy, load_policy
from esrl.training import learning as learning_module
from esrl.training import mle as mle_module
from esrl.training import planning
from esrl.training.checkpoint import unpack_tensors
from esrl.training.gradient import StageTwo
from esrl.training.mle import MLETask
from esrl.training.rl import RLTask

BAD_STEP = 3  # the third step; the state of the second is what must stand
# nothing is saved but because of the error; and l is computed anew, so that it can be spoilt by itself
QUIET = {"training": {"save_steps": 100, "eval_on_start": False, "eval_steps": 100, "max_steps": 5}}
RESCORE = {"gradient": {"rescore": True}}

REWARDS = """
import math

calls = 0

def at_sixth(value):
    global calls
    calls += 1
    return value if calls == 6 else 0.5  # two calls a step: greedy first estimates, samples

def nan(completions, **columns):
    return [at_sixth(math.nan)] + [0.5] * (len(completions) - 1)

def infinite(completions, **columns):
    return [at_sixth(-math.inf)] + [0.5] * (len(completions) - 1)

def huge(completions, **columns):
    return [at_sixth(1e200)] + [0.5] * (len(completions) - 1)

def nan_metric(completions, log_metric, **columns):
    log_metric("share", at_sixth(math.nan))
    return [len(text) / 100 for text in completions]

def taken_metric(completions, log_metric, **columns):
    if at_sixth(0.0) == 0.0:
        log_metric("loss", 1.0)
    return [len(text) / 100 for text in completions]
"""


@pytest.fixture
def bad_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A list whose only entry is True while the third step is computed."""
    now = [False]
    for task in (RLTask, MLETask):
        real = task.compute

        def compute(self: Any, epoch: int, batch: int, real: Callable = real) -> Any:
            now[0] = (epoch, batch) == (0, BAD_STEP - 1)
            try:
                return real(self, epoch, batch)
            finally:
                now[0] = False

        monkeypatch.setattr(task, "compute", compute)
    yield now


def stops_before_the_bad_step(run: Path, start: Callable[[], Any], error: type[EsrlError]) -> str:
    """Run it; the message, once everything on the disk has been compared with an undisturbed run's second step."""
    with pytest.raises(error) as caught:
        start()
    assert [row["step"] for row in steps_of(run)] == list(range(1, BAD_STEP))
    assert saved_state(run)["step"] == BAD_STEP - 1
    assert_finite(run)
    return str(caught.value)


def assert_finite(run: Path) -> None:
    files = list(run.rglob("*.safetensors"))
    assert files
    for path in files:
        for name, tensor in unpack_tensors(path.read_bytes()).items():
            assert bool(torch.isfinite(tensor).all()), f"{path}: {name}"


def same_state_as_undisturbed(run: Path, other: Path) -> None:
    state, undisturbed = saved_state(run), saved_state(other)
    for each in (state, undisturbed):
        each["state.json"].pop("fingerprint")  # one run was to be longer; the paths of rewards differ
        each["state.json"]["loop"].pop("evaluated_step")  # the other one was at its end there
    assert state == undisturbed
    assert metric_rows(run) == metric_rows(other)


def spoil_first(tensor: torch.Tensor, value: float) -> torch.Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[0] = value
    return spoiled


def nan_logits(monkeypatch: pytest.MonkeyPatch, now: list[bool], value: float) -> None:
    real = MarianPolicy.projection

    def projection(self: Any) -> Any:
        found = real(self)
        return replace(found, bias=torch.full_like(found.bias, value)) if now[0] else found

    monkeypatch.setattr(MarianPolicy, "projection", projection)


def nan_log_probs(monkeypatch: pytest.MonkeyPatch, now: list[bool], value: float) -> None:
    real = StageTwo.scores

    def scores(self: Any, *args: Any) -> Any:
        log_probs, values = real(self, *args)
        return (spoil_first(log_probs, value) if now[0] else log_probs), values

    monkeypatch.setattr(StageTwo, "scores", scores)


def nan_loss(monkeypatch: pytest.MonkeyPatch, now: list[bool], value: float) -> None:
    real = learning_module.coefficients

    def coefficients(*args: Any) -> Any:
        loss, gradient = real(*args)
        return (torch.tensor(value) if now[0] else loss), gradient

    monkeypatch.setattr(learning_module, "coefficients", coefficients)


def nan_coefficients(monkeypatch: pytest.MonkeyPatch, now: list[bool], value: float) -> None:
    real = learning_module.coefficients

    def coefficients(*args: Any) -> Any:
        loss, gradient = real(*args)
        return loss, (spoil_first(gradient, value) if now[0] else gradient)

    monkeypatch.setattr(learning_module, "coefficients", coefficients)


def nan_gradient(monkeypatch: pytest.MonkeyPatch, now: list[bool], value: float) -> None:
    real = StageTwo.backward

    def backward(self: Any, *args: Any) -> None:
        real(self, *args)
        if now[0]:
            weight = self.policy.model.model.encoder.layers[0].fc1.weight
            weight.grad[0, 0] = value

    monkeypatch.setattr(StageTwo, "backward", backward)


def nan_capability(monkeypatch: pytest.MonkeyPatch, now: list[bool], value: float) -> None:
    real = planning.metric_capability
    monkeypatch.setattr(
        planning,
        "metric_capability",
        lambda *args: torch.full_like(real(*args), value) if now[0] else real(*args),
    )


@pytest.fixture(scope="module")
def undisturbed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    commands.rl(rl_config(assets, run, QUIET, RESCORE, {"training": {"max_steps": 2}, "development": {"data": False}}))
    return run


STAGES: dict[str, tuple[Callable, str]] = {
    "logits": (nan_logits, "log-probability of token 0 of a sample of example"),
    "log-probabilities": (nan_log_probs, "log-probability of token 0 of a sample of example"),
    "loss": (nan_loss, f"the loss of step {BAD_STEP} is"),
    "coefficients": (nan_coefficients, "the gradient of "),
    "gradient": (nan_gradient, "the gradient of model.encoder.layers.0.fc1.weight is not finite"),
    "capability": (nan_capability, "the capability of example "),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_a_bad_number_never_happened(assets, undisturbed, tmp_path, monkeypatch, bad_step, stage, value):
    inject, message = STAGES[stage]
    inject(monkeypatch, bad_step, value)
    config = rl_config(assets, tmp_path / "run", QUIET, {"development": {"data": False}}, RESCORE)
    said = stops_before_the_bad_step(tmp_path / "run", lambda: commands.rl(config), NumericsError)
    assert message in said
    same_state_as_undisturbed(tmp_path / "run", undisturbed)


def test_after_the_cause_is_gone_the_run_goes_on_as_if_nothing_had_been(assets, tmp_path, monkeypatch, bad_step):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = rl_config(assets, whole, QUIET)
    commands.rl(config)
    with monkeypatch.context() as patch:
        nan_gradient(patch, bad_step, math.nan)
        with pytest.raises(NumericsError):
            commands.rl(replace(config, output_dir=stopped))
    commands.rl(replace(config, output_dir=stopped, resume=True))
    assert bits(stopped) == bits(whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "returned nan"),
        ("infinite", "returned -inf"),
        ("huge", "float32 overflows"),
        ("nan_metric", "logged 'share' as nan"),
        ("taken_metric", "logged 'loss'"),
    ],
)
def test_a_bad_reward_is_the_reward_functions_fault(assets, tmp_path, bad_step, name, message):
    """Exit code 3, and no more of the step is left than of one that is NaN later on."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    reward = {"reward": {"names": [f"{tmp_path}/rewards.py:{name}"]}, "objective": {"kind": "reinforce"}}
    config = rl_config(assets, tmp_path / "run", QUIET, {"development": {"data": False}}, reward)
    said = stops_before_the_bad_step(tmp_path / "run", lambda: commands.rl(config), RewardError)
    assert message in said
    assert RewardError.exit_code == 3 and NumericsError.exit_code == 4


def test_a_skipped_step_leaves_no_trace_but_its_line(assets, undisturbed, tmp_path, monkeypatch, bad_step):
    """Parameters, optimizer, memory, queue and counters after a skipped third step are those after the second."""
    nan_gradient(monkeypatch, bad_step, math.nan)
    skip = {"training": {"max_steps": BAD_STEP, "skip_nonfinite": 1}, "development": {"data": False}}
    with pytest.warns(UserWarning, match=f"step {BAD_STEP} was skipped: the gradient of model.encoder"):
        commands.rl(rl_config(assets, tmp_path / "run", QUIET, skip, RESCORE))
    rows = steps_of(tmp_path / "run")
    assert [row.get("skipped", False) for row in rows] == [False, False, True]
    assert "not finite" in rows[-1]["reason"]
    found, expected = saved_state(tmp_path / "run"), saved_state(undisturbed)
    assert (found["step"], found["state.json"]["loop"]["skipped"]) == (BAD_STEP, 1)
    assert found["state.json"]["task"] == expected["state.json"]["task"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert found[name] == expected[name]


def test_a_gradient_whose_norm_alone_overflows_is_refused(assets, tmp_path, monkeypatch, bad_step):
    """1e25 squared is beyond float32, and so would Adam's second moment be."""
    nan_gradient(monkeypatch, bad_step, 1e25)
    config = rl_config(assets, tmp_path / "run", QUIET, {"development": {"data": False}})
    said = stops_before_the_bad_step(tmp_path / "run", lambda: commands.rl(config), NumericsError)
    assert "the gradient of all parameters together is not finite" in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_of_maximum_likelihood(assets, tmp_path, monkeypatch, bad_step, value):
    real = mle_module.weighted_log_prob_sum
    monkeypatch.setattr(
        mle_module, "weighted_log_prob_sum", lambda *args: real(*args) * (value if bad_step[0] else 1.0)
    )
    config = mle_config(assets, tmp_path / "run", QUIET)
    said = stops_before_the_bad_step(tmp_path / "run", lambda: commands.mle(config), NumericsError)
    assert f"the loss of step {BAD_STEP} is" in said


def test_an_overflowing_update_is_not_saved(assets, tmp_path):
    """An epsilon that is 0 in float32 makes Adam's 0 / 0 of every gradient that is 0, such as that of PAD's bias."""
    changes = {"optimizer": {"adam_epsilon": 1e-300}, "development": {"data": False}}
    with pytest.raises(NumericsError, match=r"step 1 made .* infinite or NaN"):
        commands.rl(rl_config(assets, tmp_path / "run", QUIET, changes))
    assert saved_state(tmp_path / "run")["step"] == 0 and steps_of(tmp_path / "run") == []
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("command", ["rl", "mle"])
def test_a_model_that_is_not_finite_is_not_trained(assets, tmp_path, command):
    policy = load_policy(assets / "model")
    with torch.no_grad():
        policy.model.model.encoder.layers[0].fc1.weight[0, 0] = math.nan
    policy.save(tmp_path / "model")
    (name,) = (tmp_path / "model").glob("*.safetensors")
    assert any(bool(tensor.isnan().any()) for tensor in safetensors.torch.load_file(name).values())
    with pytest.raises(NumericsError, match=r"fc1.weight of the model is infinite or NaN before training"):
        if command == "rl":
            commands.rl(rl_config(assets, tmp_path / "run", {"model": str(tmp_path / "model")}))
        else:
            commands.mle(mle_config(assets, tmp_path / "run", {"model": {"path": str(tmp_path / "model")}}))
    assert list((tmp_path / "run").rglob("*.safetensors")) == []
