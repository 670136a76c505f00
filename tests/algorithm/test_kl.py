"""Schulman's approximations of the divergence, and the steering of its weight."""

from __future__ import annotations

import math

import pytest
import torch

from esrl.algorithm.kl import kl_estimates, steered

MASK = torch.tensor([[True, True], [True, False]])


def test_estimates_by_hand():
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -7.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -1.0], [-0.5, -3.0]], dtype=torch.float64)
    # log r = -.5, 1, 0; beyond the mask nothing counts
    expected = {
        "k1": [0.5, -1.0, 0.0],
        "k2": [0.125, 0.5, 0.0],
        "k3": [math.exp(-0.5) - 1 + 0.5, math.e - 2, 0.0],
    }
    for how, values in expected.items():
        found = kl_estimates(log_probs, reference, MASK, how)  # type: ignore[arg-type]
        assert found[MASK].tolist() == pytest.approx(values)
        assert float(found[1, 1]) == 0


def test_expectations_over_a_whole_distribution():
    """k1 and k3 are unbiased; the gradient of k2 is that of KL, that of k1 is 0, that of k3 is neither."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 0.5, 0.2, -0.4], dtype=torch.float64), 0)
    log_probs = torch.log_softmax(logits, 0)
    divergence = (log_probs.exp() * (log_probs - reference)).sum()
    (gradient,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    mask = torch.ones(4, 1, dtype=torch.bool)
    weights = log_probs.detach().exp()  # the chance of each token: samples, in expectation
    slopes = {}
    for how in ("k1", "k2", "k3"):
        mean = (weights * kl_estimates(log_probs[:, None], reference[:, None], mask, how)[:, 0]).sum()
        if how != "k2":
            assert float(mean.detach()) == pytest.approx(float(divergence.detach()))
        (slopes[how],) = torch.autograd.grad(mean, logits, retain_graph=True)
    torch.testing.assert_close(slopes["k1"], torch.zeros_like(gradient), rtol=0, atol=1e-12)
    torch.testing.assert_close(slopes["k2"], gradient)
    assert float((slopes["k3"] - gradient).abs().max()) > 0.01
    ratio = (log_probs - log_probs.detach()).exp()
    for how in ("k1", "k3"):  # as the loss has them, with `kl_correction`
        mean = (weights * ratio * kl_estimates(log_probs[:, None], reference[:, None], mask, how)[:, 0]).sum()
        (slope,) = torch.autograd.grad(mean, logits, retain_graph=True)
        torch.testing.assert_close(slope, gradient)


def test_k3_of_an_absurd_ratio_stays_finite():
    log_probs = torch.tensor([[-1e4]], requires_grad=True)
    found = kl_estimates(log_probs, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "k3").sum()
    (slope,) = torch.autograd.grad(found, log_probs)
    assert bool(found.isfinite()) and bool(slope.isfinite().all())


def test_steering_is_proportional_within_a_fifth():
    # 10 % above the target over 100 of 1,000 samples: 1 + .1 * .1; three times it: 1 + .2 * .1
    assert steered(0.5, 6.6, 6.0, 100, 1000) == pytest.approx(0.5 * 1.01)
    assert steered(0.5, 18.0, 6.0, 100, 1000) == pytest.approx(0.5 * 1.02)
    assert steered(0.5, -3.0, 6.0, 100, 1000) == pytest.approx(0.5 * 0.98)
    assert steered(0.5, 6.0, 6.0, 100, 1000) == 0.5
