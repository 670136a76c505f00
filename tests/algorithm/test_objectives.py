"""Losses and coefficients by hand: REINFORCE, the fusion, abstained rows, importance weights (method.md, section 5)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from esrl.algorithm.objectives import ObjectiveConfig, coefficients, mrt_prompts, objective_loss

KINDS = ["fused", "reinforce", "mrt"]


def logs(*rows: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def test_reinforce_mean_and_sum(make_samples: Any):
    # prompt 0: l = -1 + -2 = -3 and -4, r - b = .5 and -.25: sum -(.5 * -3) - (-.25 * -4) = 1.5 - 1 = .5, mean .25;
    # prompt 1: l = -6, r - b = 1: 6
    log_probs = logs([-1.0, -2.0, 99.0], [-4.0, 99.0, 99.0], [-1.0, -2.0, -3.0])  # 99: beyond the end
    samples = make_samples([0, 0, 1], [1.0, 0.25, 1.5], lengths=[2, 1, 3], baseline=0.5)
    loss, c = coefficients(log_probs, samples, ObjectiveConfig(kind="reinforce"))
    assert float(loss) == pytest.approx(6.25)
    assert c.tolist() == [[-0.25, -0.25, 0], [0.125, 0, 0], [-1, -1, -1]]
    loss, c = coefficients(log_probs, samples, ObjectiveConfig(kind="reinforce", reinforce_reduction="sum"))
    assert float(loss) == pytest.approx(6.5)
    assert c.tolist() == [[-0.5, -0.5, 0], [0.25, 0, 0], [-1, -1, -1]]


def test_reinforce_counts(make_samples: Any):
    # the first row drawn three times, of four: -(3 * .5 * -3 + 1 * -.25 * -4) = 3.5, or / 4; c = -3 * .5, .25
    log_probs = logs([-1.0, -2.0], [-4.0, 0.0])
    samples = make_samples([0, 0], [1.0, 0.25], lengths=[2, 1], counts=[3, 1], baseline=0.5)
    loss, c = coefficients(log_probs, samples, ObjectiveConfig(kind="reinforce", reinforce_reduction="sum"))
    assert float(loss) == pytest.approx(3.5)
    assert c.flatten().tolist() == pytest.approx([-1.5, -1.5, 0.25, 0])
    loss, c = coefficients(log_probs, samples, ObjectiveConfig(kind="reinforce"))
    assert float(loss) == pytest.approx(3.5 / 4)
    assert c.flatten().tolist() == pytest.approx([-0.375, -0.375, 0.0625, 0])


def test_mrt_by_hand(make_samples: Any):
    # alpha 1, l = ln .3 and ln .1: Q = (.75, .25), loss = -(.75 * 1 + .25 * .2) = -.8,
    # c = -Q (r - .8) = (-.75 * .2, -.25 * -.6) = (-.15, .15)
    samples = make_samples([0, 0], [1.0, 0.2])
    loss, c = coefficients(logs([math.log(0.3)], [math.log(0.1)]), samples, ObjectiveConfig(kind="mrt", alpha=1.0))
    assert float(loss) == pytest.approx(-0.8)
    assert c.flatten().tolist() == pytest.approx([-0.15, 0.15])
    # alpha .5: Q = sqrt(.3) : sqrt(.1); divided by alpha
    first = math.sqrt(0.3) / (math.sqrt(0.3) + math.sqrt(0.1))
    loss, _ = coefficients(logs([math.log(0.3)], [math.log(0.1)]), samples, ObjectiveConfig(kind="mrt", alpha=0.5))
    assert float(loss) == pytest.approx(-(first + 0.2 * (1 - first)) / 0.5)


def test_fused_is_mrt_above_one_sample_and_reinforce_at_one(make_samples: Any):
    # by plan: prompt 2 was planned two samples and has one unique row left; prompt 3 takes no part
    log_probs = logs([-1.0], [-2.0], [-3.0], [-1.5])
    samples = make_samples([0, 0, 1, 2], [0.1, 0.9, 0.4, 0.3], baseline=0.2, counts=[1, 1, 1, 2], planned=[2, 1, 2, 0])
    assert mrt_prompts(samples.planned, ObjectiveConfig()).tolist() == [True, False, True, False]
    assert mrt_prompts(samples.planned, ObjectiveConfig(kind="mrt")).tolist() == [True] * 4
    assert mrt_prompts(samples.planned, ObjectiveConfig(kind="reinforce")).tolist() == [False] * 4
    _, fused = coefficients(log_probs, samples, ObjectiveConfig())
    _, mrt = coefficients(log_probs, samples, ObjectiveConfig(kind="mrt"))
    _, reinforce = coefficients(log_probs, samples, ObjectiveConfig(kind="reinforce"))
    assert fused[[0, 1, 3]].tolist() == mrt[[0, 1, 3]].tolist()
    assert fused[2].tolist() == reinforce[2].tolist() == [pytest.approx(-0.2)]
    # the FIFO baseline acts where k = 1 and nowhere else; one unique sample teaches MRT nothing
    assert mrt[2].tolist() == mrt[3].tolist() == [0]
    # loss: MRT of prompt 0 by hand, -(.4 - .2) * -3 = .6 of prompt 1, (.2 - .3) / .005 = -20 of prompt 2
    q = 1 / (1 + math.exp(-0.005))
    expected = (q * 0.1 + (1 - q) * -0.7) / 0.005 + 0.6 - 20
    assert float(objective_loss(log_probs, samples, ObjectiveConfig())) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_abstained_rows_take_no_part(make_samples: Any, kind: str, weighted: bool, dtype: torch.dtype):
    # prompt 0 loses one of three rows, prompt 1 all of its rows, prompt 2 its only one
    log_probs = logs([-1.0, -2.0], [-50.0, -60.0], [-3.0, -1.0], [-2.0, 0.0], [-1.0, 0.0], [-7.0, -7.0], dtype=dtype)
    at_tau = log_probs * 0.9
    config = ObjectiveConfig(kind=kind, importance_weights=weighted, group_correction=True)
    samples = make_samples(
        [0, 0, 0, 1, 1, 2],
        [0.3, 0.0, 0.9, 0.0, 0.0, 0.0],
        lengths=[2, 2, 2, 1, 1, 2],
        counts=[1, 0, 2, 0, 0, 0],
        baseline=0.4,
        planned=[4, 2, 1],
        sampling_log_probs=at_tau,
    )
    loss, c = coefficients(log_probs, samples, config)
    without = make_samples(
        [0, 0], [0.3, 0.9], lengths=[2, 2], counts=[1, 2], baseline=0.4, planned=[4], sampling_log_probs=at_tau[[0, 2]]
    )
    expected_loss, expected = coefficients(log_probs[[0, 2]], without, config)
    assert c[[1, 3, 4, 5]].tolist() == [[0, 0]] * 4
    torch.testing.assert_close(c[[0, 2]], expected, rtol=0, atol=0)
    assert float(loss) == float(expected_loss) != 0
    assert c.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_which_everything_abstained(make_samples: Any, kind: str):
    samples = make_samples([0, 0, 1], [0.0] * 3, counts=[0, 0, 0], baseline=0.5, planned=[2, 1])
    loss, c = coefficients(logs([-1.0], [-2.0], [-3.0]), samples, ObjectiveConfig(kind=kind))
    assert (float(loss), c.flatten().tolist()) == (0, [0, 0, 0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_importance_weights_of_reinforce_by_hand(make_samples: Any, reduction: str):
    # w = exp(l - l at tau): 2, 1/2, and 40, clipped to 10; the second was drawn twice: 2 + 2 * .5 + 10 = 13
    log_probs = logs([-3.0, -1.0], [-2.0, 0.0], [-1.0, -1.0])
    at_tau = log_probs - logs([math.log(2), 0.0], [math.log(0.5), 5.0], [math.log(8), math.log(5)])
    samples = make_samples([0, 0, 0], [0.5, 1.0, 0.2], lengths=[2, 1, 2], counts=[1, 2, 1], sampling_log_probs=at_tau)
    config = ObjectiveConfig(kind="reinforce", importance_weights=True, reinforce_reduction=reduction)
    share = [2 / 13, 2 * 0.5 / 13, 10 / 13]
    if reduction == "sum":  # w / mean(w) with four samples
        share = [4 * value for value in share]
    loss, c = coefficients(log_probs, samples, config)
    assert c[:, 0].tolist() == pytest.approx([-share[0] * 0.5, -share[1] * 1.0, -share[2] * 0.2])
    assert c[1, 1] == 0
    assert float(loss) == pytest.approx(share[0] * 0.5 * 4 + share[1] * 1.0 * 2 + share[2] * 0.2 * 2)


def test_importance_weights_of_mrt_by_hand(make_samples: Any):
    # alpha 1, exp(l) = .3, .1; w = 1/2, 3: Q = .15 : .3 = (1/3, 2/3); r = (1, .4): mean .6, c = -Q (r - .6)
    log_probs = logs([math.log(0.3)], [math.log(0.1)])
    at_tau = log_probs - logs([math.log(0.5)], [math.log(3)])
    samples = make_samples([0, 0], [1.0, 0.4], sampling_log_probs=at_tau)
    config = ObjectiveConfig(kind="mrt", alpha=1.0, importance_weights=True)
    loss, c = coefficients(log_probs, samples, config)
    assert float(loss) == pytest.approx(-0.6)
    assert c.flatten().tolist() == pytest.approx([-0.4 / 3, 0.4 / 3])
    # clipped to 1: w = 1/2, 1: Q = .15 : .1 = (.6, .4)
    clipped = ObjectiveConfig(kind="mrt", alpha=1.0, importance_weights=True, importance_clip=1.0)
    assert float(objective_loss(log_probs, samples, clipped)) == pytest.approx(-(0.6 + 0.4 * 0.4))


@pytest.mark.parametrize("kind", ["reinforce", "mrt"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_importance_weights_of_long_samples_do_not_underflow(make_samples: Any, kind: str, reduction: str):
    # 400 tokens at .5 nats each below their log-probability at tau: w = e^-200 is 0 in float32, yet only ratios
    # matter: two equal weights are the unweighted loss
    log_probs = torch.full((2, 400), -1.0)
    samples = make_samples([0, 0], [0.0, 1.0], lengths=[400, 400], sampling_log_probs=torch.full((2, 400), -0.5))
    plain = ObjectiveConfig(kind=kind, reinforce_reduction=reduction)
    weighted = ObjectiveConfig(kind=kind, reinforce_reduction=reduction, importance_weights=True)
    expected, c = coefficients(log_probs, samples, plain)
    loss, weighted_c = coefficients(log_probs, samples, weighted)
    torch.testing.assert_close(weighted_c, c)
    torch.testing.assert_close(loss, expected)
    assert float(weighted_c.abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.005, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_extreme_log_probabilities_stay_finite(
    make_samples: Any, kind: str, alpha: float, weighted: bool, dtype: torch.dtype
):
    log_probs = logs([-1e4, -1e4], [-1e4, -2e4], [0.0, 0.0], [-1e4, -1e4], [-1e4, 0.0], dtype=dtype)
    for at_tau in (log_probs * 0, log_probs * 2):
        samples = make_samples(
            [0, 0, 0, 1, 2], [0.1, 0.9, 0.5, 1.0, 0.3], lengths=[2] * 5, baseline=0.5, sampling_log_probs=at_tau
        )
        config = ObjectiveConfig(kind=kind, alpha=alpha, importance_weights=weighted, group_correction=True)
        loss, c = coefficients(log_probs, samples, config)
        assert bool(loss.isfinite()) and bool(c.isfinite().all())


def test_no_rows(make_samples: Any):
    samples = make_samples([0], [0.0], planned=[0, 2])
    empty = type(samples)(
        **{
            name: getattr(samples, name)[:0] for name in ("mask", "counts", "rewards", "baseline", "sampling_log_probs")
        },
        groups=type(samples.groups)(samples.groups.index[:0], 2),
        planned=samples.planned,
    )
    for kind in KINDS:
        loss, c = coefficients(torch.zeros(0, 1), empty, ObjectiveConfig(kind=kind))
        assert (float(loss), c.shape) == (0, (0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "trpo"}, "objective is 'trpo'; choose one of fused, reinforce, mrt, grpo, rloo, ppo"),
        ({"mrt_scale": "alpha"}, "mrt_scale is 'alpha'"),
        ({"reinforce_reduction": "max"}, "reinforce_reduction is 'max'"),
        ({"score_temperature": "two"}, "score_temperature is 'two'"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"importance_clip": 0.0}, "importance_clip is 0.0"),
        ({"importance_weights": True, "score_temperature": "sampling"}, "Drop one of the two"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)
