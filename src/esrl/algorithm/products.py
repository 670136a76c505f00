"""Linear layers with a gradient, in oneDNN where PyTorch takes MKL.

On CPUs PyTorch sends products in float32 to MKL. oneDNN's kernels are up to twice as fast at the sizes of both stages
on processors with AVX-512, on weights as they are; on those with AVX2 alone MKL's are the faster ones
(docs/performance.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MIN_WEIGHTS = 1 << 16
"""Smaller weights (below 256 x 256) are not worth a kernel of their own."""

ROWS = 32
"""Rows are filled up to a multiple of it, few of them of 8: oneDNN makes and keeps kernels for each number of rows."""


@cache
def faster_here() -> bool:
    """Whether oneDNN's products are the faster ones on this processor."""
    return not (torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2")


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear``: (..., D), (N, D), (N,) -> (..., N); differentiable once where oneDNN computes it."""
    if not _fits(hidden, weight, bias):
        return functional.linear(hidden, weight, bias)
    if not torch.is_grad_enabled():
        return _product(hidden, weight, bias)
    result: Tensor = _Linear.apply(hidden, weight, bias)
    return result


class FastLinear(TorchFunctionMode):
    """Within it, every ``functional.linear`` is ``linear``, whosever module calls it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = linear if func is functional.linear else func
        return chosen(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return _product(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        grad = grad_outputs[0]
        flat = grad.reshape(-1, weight.shape[0])
        return (
            _product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
            # MKL is as fast here
            flat.t() @ hidden.reshape(-1, weight.shape[1]) if ctx.needs_input_grad[1] else None,
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = len(flat)
    step = ROWS if rows > 64 else min(rows, 8)
    if rows % step:
        flat = functional.pad(flat, (0, 0, 0, -rows % step))
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(flat, weight, bias, "none", [], "")
    return product[:rows].view(*hidden.shape[:-1], -1)


def _fits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    return (
        faster_here()
        and all(part.device.type == "cpu" and part.dtype == torch.float32 for part in given)
        and all(type(part) in (Tensor, nn.Parameter) for part in given)  # a distributed tensor has ways of its own
        and weight.dim() == 2
        and weight.numel() >= MIN_WEIGHTS
        and hidden.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not in every build
    )
