"""Weights laid out for stage one give what the plain product gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from esrl.algorithm.log_probs import Projection
from esrl.kernels import kernels, why_not
from esrl.models import linear
from esrl.models.linear import FrozenLinear, FrozenProjection


@pytest.fixture(params=["compiled", "oneDNN"])
def each_way(request, monkeypatch):
    """With the compiled kernels and without."""
    if request.param == "oneDNN":
        monkeypatch.setattr(linear, "kernels", lambda: None)
    elif kernels() is None:
        pytest.skip(f"no compiled kernels: {why_not()}")


def weights(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(70, 48, generator=generator, dtype=torch.float64).to(dtype)
    return weight, torch.randn(70, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("rows", [1, 3, 16, 130])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13), (torch.bfloat16, 2.0**-3)]
)
def test_it_equals_the_plain_product(dtype, tolerance, rows, activation):
    weight, bias = weights(dtype)
    hidden = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).to(dtype)
    plain = functional.linear(hidden, weight, bias)
    expected = plain.relu() if activation == "relu" else plain
    frozen = FrozenLinear(weight, bias, activation)
    torch.testing.assert_close(frozen(hidden), expected, rtol=0, atol=tolerance)
    packed = {
        torch.float32: linear.kernels() is None,
        torch.float64: False,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    assert (frozen._packed is not None) == packed[dtype]  # else the fast way was not tried at all
    assert (frozen.compiled is not None) == (dtype == torch.float32 and linear.kernels() is not None)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_residual_is_added_after_the_activation(dtype, activation):
    weight, bias = weights(dtype)
    generator = torch.Generator().manual_seed(3)
    hidden, residual = (torch.randn(9, width, generator=generator, dtype=dtype) for width in (48, 70))
    plain = functional.linear(hidden, weight, bias)
    expected = (plain.relu() if activation == "relu" else plain) + residual
    before = residual.clone()
    torch.testing.assert_close(FrozenLinear(weight, bias, activation)(hidden, residual), expected, rtol=0, atol=2e-5)
    assert torch.equal(residual, before)


def test_within_autocast_products_are_in_bfloat16_and_residuals_stay_wide():
    weight, bias = weights(torch.float32)
    generator = torch.Generator().manual_seed(3)
    hidden, residual = (torch.randn(9, width, generator=generator) for width in (48, 70))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = functional.linear(hidden, weight, bias)
        frozen = FrozenLinear(weight, bias)
        found, total = frozen(hidden), frozen(hidden, residual)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=2.0**-3)
    assert torch.equal(total, residual + found)  # in float32


@pytest.mark.usefixtures("each_way")
def test_without_bias_and_with_suppressed_tokens():
    weight, bias = weights(torch.float32)
    hidden = torch.ones(5, 48)
    torch.testing.assert_close(FrozenLinear(weight, None)(hidden), hidden @ weight.T, rtol=0, atol=2e-5)
    bias[[3, 60]] = -torch.inf
    logits = FrozenProjection(Projection(weight, bias)).logits(hidden)
    assert (logits == -torch.inf).nonzero().tolist() == [[row, token] for row in range(5) for token in (3, 60)]


def test_large_weights_are_not_copied(monkeypatch):
    weight, bias = weights(torch.float32)
    monkeypatch.setattr(linear, "MAX_PACKED", weight.numel() - 1)
    frozen = FrozenLinear(weight, bias)
    assert frozen._packed is None and frozen.compiled is None and frozen.weight.data_ptr() == weight.data_ptr()
    torch.testing.assert_close(frozen(torch.ones(2, 48)), functional.linear(torch.ones(2, 48), weight, bias))


def test_builds_without_onednn_take_the_plain_product():
    weight, bias = weights(torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert FrozenLinear(weight, bias)._packed is None


def test_half_precision_logits_come_in_float32():
    weight, bias = weights(torch.bfloat16)
    projection = FrozenProjection(Projection(weight, bias))
    assert projection.vocabulary == 70
    assert projection.logits(torch.ones(2, 48, dtype=torch.bfloat16)).dtype == torch.float32
