"""What the compiled encoder and decoder share: a Transformer's weights as the kernels want them."""

from __future__ import annotations

from ctypes import Structure, c_double, c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esrl.kernels import LaidOut, Native
from esrl.kernels.native import LinearStruct
from esrl.models.attention import packing_kernels


class NormStruct(Structure):
    """A layer's norm."""

    _fields_ = (("scale", c_void_p), ("shift", c_void_p), ("epsilon", c_double))


class LaidOutWeights:
    """Keeps what the structures point to, as long as it lives.

    Args:
        tiles: products are on the processor's matrix unit where there is one; weights then stay as they are.
    """

    def __init__(self, native: Native, *, tiles: bool = False) -> None:
        self.native, self._tiles = native, tiles
        self._kept: list[Any] = []

    def linear(self, linear: Any, activation: str = "none") -> LinearStruct:
        """A linear layer, its weight laid out."""
        laid_out = LaidOut(self.native, linear.weight.detach(), linear.bias, activation, tiles=self._tiles)
        self._kept.append(laid_out)
        return laid_out.struct

    def norm(self, norm: Any) -> NormStruct:
        """A LayerNorm."""
        return NormStruct(self.at(norm.weight), self.at(norm.bias), norm.eps)

    def at(self, weight: Tensor) -> int:
        """The address of a weight."""
        weight = weight.detach().contiguous()
        self._kept.append(weight)
        return weight.data_ptr()


def fitting_kernels(part: Any) -> Native | None:
    """The kernels, where they can run an encoder or decoder: float32 on the CPU, whole vectors, ReLU or SiLU."""
    parameters = list(part.parameters())
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in parameters):
        return None
    if activation(part.layers[0]) is None or torch.is_autocast_enabled("cpu"):
        return None
    return packing_kernels(part)


def activation(layer: Any) -> str | None:
    """The kernels' name of a layer's activation; None where they have none for it."""
    function = layer.activation_fn
    if isinstance(function, nn.ReLU) or function is functional.relu:
        return "relu"
    return "silu" if isinstance(function, nn.SiLU) or function is functional.silu else None
