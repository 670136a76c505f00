"""Matrix products with weights that stay as they are for a whole stage one.

On CPUs a weight in float32 is laid out once for the compiled kernels. Without them, or in bfloat16 where the processor
has it, it is laid out in the order in which oneDNN's kernels read it. A product with few rows, of which sampling has
many, is then two to four times as fast as with the plain layout (docs/performance.md).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from esrl.algorithm import products
from esrl.algorithm.log_probs import Projection, as_autocast, soft_cap
from esrl.kernels import LaidOut, kernels

MAX_PACKED = 1 << 25
"""Weights of more numbers than this (128 MB) are not copied: a vocabulary of 250,000 would double its memory."""


class FrozenLinear(nn.Module):
    """``functional.linear`` with a weight that does not change, without a graph.

    A module, so that it can stand in the place of one; it has no parameters. Under autocast its weight is cast here,
    once.

    Args:
        weight: (N, D); bias: (N,).
        activation: applied to the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Literal["none", "relu"] = "none") -> None:
        super().__init__()
        self.weight, self.activation = as_autocast(weight.detach()), activation
        self.bias = None if bias is None else as_autocast(bias)
        self.compiled = _compiled(self.weight, self.bias, activation)
        self._packed: Any = None if self.compiled is not None else _pack(self.weight)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., N); ``residual`` is added to the result, after the activation."""
        hidden = hidden.to(self.weight.dtype)
        if self.compiled is not None:
            if residual is None or residual.dtype == hidden.dtype:
                return self.compiled(hidden, residual)
            return residual + self.compiled(hidden)
        if self._packed is None:
            product = products.linear(hidden, self.weight, self.bias)
            product = product.relu_() if self.activation == "relu" else product
        else:
            linear = torch.ops.mkldnn._linear_pointwise
            if residual is not None and residual.dtype == hidden.dtype and self.activation == "none":
                total: Tensor = linear.binary(hidden, residual, self._packed, self.bias, "add")
                return total
            product = linear.default(hidden, self._packed, self.bias, self.activation, [], "")
        return product if residual is None else residual + product  # in the wider of their types


class FrozenProjection:
    """A ``Projection`` whose weight does not change."""

    def __init__(self, projection: Projection) -> None:
        self.vocabulary, self.cap = projection.vocabulary, projection.cap
        self._linear = FrozenLinear(projection.weight, projection.bias)
        self.compiled = self._linear.compiled if self.cap is None else None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V), in at least float32."""
        logits = self._linear(hidden)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return logits if self.cap is None else soft_cap(logits, self.cap)[0]


def _compiled(weight: Tensor, bias: Tensor | None, activation: str) -> LaidOut | None:
    """The layer for the compiled kernels, or None where they are not for it."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() > MAX_PACKED:
        return None
    native = kernels()
    return None if native is None else LaidOut(native, weight, bias, activation)


def _pack(weight: Tensor) -> Any:
    """The weight in oneDNN's own layout, or None where there is none for it."""
    usable = weight.device.type == "cpu" and weight.numel() <= MAX_PACKED
    if not usable or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    # what TorchInductor calls for frozen weights; not in every build
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return None
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype != torch.float32 and not half:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
