"""Frozen weights of linear layers, and modules that run on them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from esrl.models.frozen import MergedLinear, frozen_linear, linear_weight, merged_linear, twin
from esrl.models.linear import FrozenLinear


class Twice(nn.Module):
    """A module with one layer under two names and another kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.norm = nn.LayerNorm(3)
        self.missing = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.again(self.first(x)))


def test_a_twin_shares_weights_and_leaves_the_original():
    module = Twice()
    other = twin(module, frozen_linear)
    x = torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(other(x), module(x))
    assert other.first is other.again and isinstance(other.first, FrozenLinear)
    assert isinstance(module.first, nn.Linear) and module.again is module.first
    assert other.norm is not module.norm and other.norm.weight is module.norm.weight
    with torch.no_grad():
        module.norm.bias += 1
        torch.testing.assert_close(other(x), module(x))


def test_what_is_a_linear_layer():
    conv = Conv1D(5, 3)  # GPT-2's: (in, out)
    x = torch.randn(2, 3)
    found = frozen_linear(conv)
    torch.testing.assert_close(found(x), conv(x).detach())
    assert linear_weight(conv).shape == (5, 3)
    assert frozen_linear(nn.LayerNorm(3)) is None and linear_weight(nn.Bilinear(2, 2, 2)) is None
    assert merged_linear(nn.Linear(2, 2)) is None


def test_lora_is_added():
    """W + alpha / r * B A, here 2 / 1."""
    module = nn.Sequential(nn.Linear(3, 4))
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=2, target_modules=["0"]), module)
    layer = module[0]
    layer.lora_B["default"].weight.data.normal_()
    expected = layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = merged_linear(layer)
    assert isinstance(merged, MergedLinear)
    torch.testing.assert_close(merged.weight, expected.detach())
    torch.testing.assert_close(merged.bias, layer.base_layer.bias.detach())
    x = torch.randn(2, 3)
    torch.testing.assert_close(frozen_linear(layer)(x), layer(x).detach())


def test_dora_is_no_sum():
    module = nn.Sequential(nn.Linear(3, 4))
    inject_adapter_in_model(LoraConfig(r=1, use_dora=True, target_modules=["0"]), module)
    assert linear_weight(module[0]) is None
    assert frozen_linear(module[0]) is module[0]  # runs as it is
    with pytest.raises(ValueError, match="use plain LoRA"):
        merged_linear(module[0])


def test_a_twin_is_gone_with_its_last_user():
    """Its laid-out weights take as much memory as the model, and would wait for the cyclic garbage collector."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    gc.disable()
    try:
        frozen = twin(layers, frozen_linear)
        watched = weakref.ref(frozen[1][0])
        assert isinstance(watched(), FrozenLinear)
        del frozen
        assert watched() is None
    finally:
        gc.enable()
