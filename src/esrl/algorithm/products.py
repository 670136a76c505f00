"""Linear layers with a gradient, in the compiled kernels or in oneDNN where PyTorch takes MKL.

On CPUs PyTorch sends products in float32 to MKL. On processors with AVX-512 the compiled kernels are up to twice as
fast at the sizes of both stages, for the result and for both gradients, on weights as they are. Where there are none,
oneDNN is so for the result and the input's gradient. With AVX2 alone MKL is the fastest (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from esrl.kernels import kernels

MIN_WEIGHTS = 1 << 16
"""Smaller weights (below 256 x 256) are not worth a kernel of their own."""

ROWS = 32
"""For oneDNN rows are filled up to a multiple of it, few of them of 8: it makes and keeps kernels for each number."""


_accumulating = ContextVar("accumulating", default=False)


@contextmanager
def accumulating() -> Iterator[None]:
    """Layers that are called within it add their weight's gradient to its ``grad`` themselves, where there is one.

    That spares a matrix and an addition for each. It is for ``backward``, once: ``torch.autograd.grad`` would not see
    these gradients, nor would hooks on them.
    """
    token = _accumulating.set(True)
    try:
        yield
    finally:
        _accumulating.reset(token)


@cache
def faster_here() -> bool:
    """Whether other products than PyTorch's are the faster ones on this processor."""
    return not (torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2")


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, room: Tensor | None = None) -> Tensor:
    """``functional.linear``: (..., D), (N, D), (N,) -> (..., N); differentiable once where it is not PyTorch's.

    Args:
        room: contiguous numbers among which the result may be put, where there is no graph.
    """
    if weight.dim() != 2 or not _fits(weight.numel(), hidden, weight, bias):
        return functional.linear(hidden, weight, bias)
    if not torch.is_grad_enabled():
        return _product(hidden, weight, bias, room=room)
    result: Tensor = _Linear.apply(hidden, weight, bias, _accumulating.get())
    return result


def takes_room(weight: Tensor) -> bool:
    """Whether ``linear`` without a graph puts its result where it is told to."""
    return kernels() is not None and _fits(weight.numel(), weight)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight: (..., N), (N, D) -> (..., D), without a graph."""
    if not _fits(weight.numel(), gradient, weight):
        return gradient @ weight
    return _product(gradient, weight, None, transposed=True)


def weight_gradient(gradient: Tensor, hidden: Tensor, out: Tensor | None = None) -> Tensor:
    """gradient.T @ hidden: (n, N), (n, D) -> (N, D), without a graph; added to ``out``, in place, if there is one."""
    native = kernels() if _fits(gradient.shape[1] * hidden.shape[1], gradient, hidden, out) else None
    if native is not None and (out is None or out.is_contiguous()):
        return native.weight_gradient(gradient, hidden, out)
    if out is None:
        return gradient.t() @ hidden
    # not addmm_, which PyTorch's counter of operations overlooks
    return torch.addmm(out, gradient.t(), hidden, out=out)


class FastLinear(TorchFunctionMode):
    """Within it, every ``functional.linear`` is ``linear``, whosever module calls it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = linear if func is functional.linear else func
        return chosen(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, accumulate: bool) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.accumulate = accumulate
        return _product(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        grad = grad_outputs[0]
        flat = grad.reshape(-1, weight.shape[0])
        of_weight: Tensor | None = None
        if ctx.needs_input_grad[1]:
            total = weight.grad if ctx.accumulate and weight.is_leaf else None
            found = weight_gradient(flat, hidden.reshape(-1, weight.shape[1]), total)
            of_weight = found if total is None else None  # it is where it belongs
        return (
            input_gradient(grad, weight) if ctx.needs_input_grad[0] else None,
            of_weight,
            flat.sum(0) if ctx.needs_input_grad[2] else None,
            None,
        )


def _product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False, room: Tensor | None = None
) -> Tensor:
    """hidden @ weight.T + bias, or hidden @ weight if it is ``transposed``."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows, native = len(flat), kernels()
    if native is not None:
        outputs = weight.shape[1] if transposed else weight.shape[0]
        out = None if room is None else room[: rows * outputs].view(rows, outputs)
        product = native.product(flat, weight, bias, transposed=transposed, out=out)
    else:
        step = ROWS if rows > 64 else min(rows, 8)
        if rows % step:
            flat = functional.pad(flat, (0, 0, 0, -rows % step))
        across = weight.t() if transposed else weight
        product = torch.ops.mkldnn._linear_pointwise.default(flat, across, bias, "none", [], "")
    return product[:rows].view(*hidden.shape[:-1], -1)


def _fits(weights: int, *given: Tensor | None) -> bool:
    """Whether the product of so many weights is faster elsewhere than in PyTorch, and can be computed there."""
    return (
        faster_here()
        and weights >= MIN_WEIGHTS
        and all(part is None or _plain(part) for part in given)
        and not torch.is_autocast_enabled("cpu")
        and (kernels() is not None or _has_onednn())
    )


def _plain(part: Tensor) -> bool:
    cpu = part.device.type == "cpu" and part.dtype == torch.float32 and part.numel() > 0
    return cpu and type(part) in (Tensor, nn.Parameter)  # a distributed tensor has ways of its own


def _has_onednn() -> bool:
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return usable and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not in every build
