"""Learning-rate schedules, clipping, and an optimizer that refuses what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from esrl.errors import NumericsError
from esrl.training.checkpoint import pack_tensors, unpack_tensors
from esrl.training.optimization import Optimizer, OptimizerConfig, learning_rate


def rates(steps: list[int], total: int | None, **config: object) -> list[float]:
    return [learning_rate(step, total, OptimizerConfig(learning_rate=8.0, **config)) for step in steps]


def test_warm_up_rises_linearly_to_the_peak():
    # step n is the (n + 1)-th: 8 * 1/4, 2/4, 3/4, 4/4, then constant
    assert rates([0, 1, 2, 3, 4, 99], None, warmup_steps=4) == [2, 4, 6, 8, 8, 8]
    assert rates([0, 7], None) == [8, 8]


def test_linear_falls_to_0_over_what_the_warm_up_leaves():
    # 4 of warm-up, 8 left: step 4 is at the peak, step 4 + n has 1 - n/8 of it, and beyond the end it stays 0
    assert rates([3, 4, 6, 8, 11, 12, 50], 12, lr_scheduler="linear", warmup_steps=4) == [8, 8, 6, 4, 1, 0, 0]


def test_cosine_is_half_way_down_in_the_middle():
    # (1 + cos(pi n / 8)) / 2: 1 at n = 0, (1 + sqrt .5) / 2 at 2, 1/2 at 4, 0 at 8
    found = rates([4, 6, 8, 12], 12, lr_scheduler="cosine", warmup_steps=4)
    assert found == pytest.approx([8, 4 * (1 + math.sqrt(0.5)), 4, 0], abs=1e-12)


def test_inverse_square_root_is_vaswanis():
    # peak at the last step of warm-up, step number 4 (index 3); then sqrt(4 / number): 4 -> 1, 16 -> 1/2, 64 -> 1/4
    assert rates([0, 3, 15, 63], None, lr_scheduler="inverse_sqrt", warmup_steps=4) == pytest.approx([2, 8, 4, 2])
    # without warm-up from the first step on: sqrt(1 / number)
    assert rates([0, 3, 99], None, lr_scheduler="inverse_sqrt") == pytest.approx([8, 4, 0.8])


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 200])
def test_rates_never_jump_up_after_the_warm_up(scheduler, warmup):
    found = rates(list(range(150)), 100, lr_scheduler=scheduler, warmup_steps=warmup)
    assert all(0 <= rate <= 8 for rate in found)
    assert max(found) == pytest.approx(8 * min(1, 150 / max(1, warmup)))
    assert all(a >= b for a, b in zip(found[warmup:], found[warmup + 1 :], strict=False))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"lr_scheduler": "cosin"}, "choose one of constant, linear, cosine, inverse_sqrt"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0"),
        ({"adam_epsilon": 0.0}, "adam_epsilon is 0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    return model


def set_gradients(model: nn.Module, first: list[list[float]], second: list[list[float]] | None) -> None:
    model[0].weight.grad = torch.tensor(first)
    model[1].weight.grad = None if second is None else torch.tensor(second)


def test_what_is_trained_comes_into_huge_pages(monkeypatch):
    asked: list[nn.Parameter] = []
    monkeypatch.setattr("esrl.training.optimization.collapse", asked.extend)
    model = small_model()
    Optimizer(model, OptimizerConfig())
    assert [id(weight) for weight in asked] == [id(model[0].weight), id(model[1].weight)]  # the bias is not trained


def test_gradients_are_divided_then_clipped():
    model = small_model()
    optimizer = Optimizer(model, OptimizerConfig(max_grad_norm=1.0))
    set_gradients(model, [[6.0, 0.0], [0.0, 8.0]], [[0.0, 24.0]])
    # divided by 2: 3, 4, 12, whose norm is 13; clipped to 1: each divided by 13
    assert optimizer.scale_and_clip(2.0) == pytest.approx(13)
    assert model[0].weight.grad.flatten().tolist() == pytest.approx([3 / 13, 0, 0, 4 / 13])
    assert model[1].weight.grad.flatten().tolist() == pytest.approx([0, 12 / 13])


@pytest.mark.parametrize("limit", [20.0, 0.0])
def test_gradients_within_the_limit_are_left(limit):
    model = small_model()
    optimizer = Optimizer(model, OptimizerConfig(max_grad_norm=limit))
    set_gradients(model, [[3.0, 0.0], [0.0, 4.0]], [[0.0, 12.0]])
    assert optimizer.scale_and_clip(1.0) == pytest.approx(13)
    assert model[1].weight.grad.flatten().tolist() == [0, 12]
    optimizer.zero_grad()
    assert optimizer.scale_and_clip(1.0) == 0.0  # no gradient at all is no error


def test_first_step_by_hand():
    """Adam's first step has the bias-corrected moments g and g^2: every entry moves by rate * g / (|g| + eps); the
    decay takes rate * decay of the weight before; a frozen weight and one without a gradient stay."""
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = Optimizer(model, OptimizerConfig(adam_epsilon=0.5, weight_decay=0.1, max_grad_norm=0.0))
    set_gradients(model, [[2.0, 0.0], [-1.0, 0.5]], None)
    optimizer.step(0.01)
    moved = torch.tensor([[2 / 2.5, 0.0], [-1 / 1.5, 0.5]])
    torch.testing.assert_close(model[0].weight.detach(), before["0.weight"] * (1 - 0.01 * 0.1) - 0.01 * moved)
    assert torch.equal(model[1].weight, before["1.weight"])
    assert torch.equal(model[1].bias, before["1.bias"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_names_the_parameter_and_changes_nothing(bad):
    model = small_model()
    optimizer = Optimizer(model, OptimizerConfig())
    set_gradients(model, [[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]])
    optimizer.scale_and_clip(1.0)
    optimizer.step(0.1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = optimizer.tensors()
    state = {name: value.clone() for name, value in state.items()}
    set_gradients(model, [[1.0, 2.0], [3.0, 4.0]], [[5.0, bad]])
    with pytest.raises(
        NumericsError, match=r"the gradient of 1\.weight is not finite \(norm .*nothing was updated"
    ) as caught:
        optimizer.scale_and_clip(1.0)
    assert caught.value.exit_code == 4
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert all(torch.equal(optimizer.tensors()[name], value) for name, value in state.items())


def test_a_norm_that_overflows_is_an_error_of_its_own():
    """Entries of 2e38 are finite in float32, the norm of three of them is not."""
    model = small_model()
    optimizer = Optimizer(model, OptimizerConfig())
    set_gradients(model, [[2e38, 2e38], [2e38, 0.0]], [[0.0, 2e38]])
    with pytest.raises(NumericsError, match="all parameters together"):
        optimizer.scale_and_clip(1.0)


def take_steps(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.scale_and_clip(3.0)
        optimizer.step(learning_rate(seed, None, optimizer.config))


def test_state_comes_back_to_the_last_bit():
    """Five steps at once, and three, a checkpoint's bytes, and two by another optimizer: the same bits."""
    config = OptimizerConfig(learning_rate=0.05, warmup_steps=2, lr_scheduler="inverse_sqrt", weight_decay=0.01)
    whole = small_model()
    optimizer = Optimizer(whole, config)
    assert optimizer.tensors() == {}
    take_steps(whole, optimizer, range(5))

    first = small_model()
    stopped = Optimizer(first, config)
    take_steps(first, stopped, range(3))
    data = pack_tensors(stopped.tensors())
    names = {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in ("0.weight", "1.weight")}
    assert set(stopped.tensors()) == names

    second = small_model()
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, config)
    resumed.load_tensors(unpack_tensors(data))
    take_steps(first, stopped, range(100, 103))  # the copy must not follow the original
    take_steps(second, resumed, range(3, 5))
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert pack_tensors(resumed.tensors()) == pack_tensors(optimizer.tensors())
