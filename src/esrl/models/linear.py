"""Matrix products with weights that stay as they are for a whole stage one.

On CPUs a weight in float32 is laid out once in the order in which oneDNN's kernels read it. A product with few rows,
of which sampling has many, is then two to three times as fast as with the plain layout (docs/performance.md).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from esrl.algorithm.log_probs import Projection

MAX_PACKED = 1 << 25
"""Weights of more numbers than this (128 MB) are not copied: a vocabulary of 250,000 would double its memory."""


class FrozenLinear:
    """``functional.linear`` with a weight that does not change, without a graph.

    Args:
        weight: (N, D); bias: (N,).
        activation: applied to the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Literal["none", "relu"] = "none") -> None:
        self.weight, self.bias, self.activation = weight.detach(), bias, activation
        self._packed: Any = _pack(self.weight)

    def __call__(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., N); ``residual`` is added to the result, after the activation."""
        if self._packed is None:
            result = functional.linear(hidden, self.weight, self.bias)
            result = result.relu_() if self.activation == "relu" else result
            return result if residual is None else result.add_(residual)
        linear = torch.ops.mkldnn._linear_pointwise
        if residual is None or self.activation != "none":
            product: Tensor = linear(hidden, self._packed, self.bias, self.activation, [], "")
            return product if residual is None else product.add_(residual)
        total: Tensor = linear.binary(hidden, residual, self._packed, self.bias, "add")
        return total


class FrozenProjection:
    """A ``Projection`` whose weight does not change."""

    def __init__(self, projection: Projection) -> None:
        self.vocabulary = projection.vocabulary
        self._linear = FrozenLinear(projection.weight, projection.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V), in at least float32."""
        logits = self._linear(hidden)
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _pack(weight: Tensor) -> Any:
    """The weight in oneDNN's own layout, or None where there is none for it."""
    usable = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() <= MAX_PACKED
    if not usable or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return None
    # what TorchInductor calls for frozen weights; not in every build
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
