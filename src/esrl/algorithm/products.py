"""Linear layers with a gradient, in the compiled kernels or in oneDNN where PyTorch takes MKL.

On CPUs PyTorch sends products in float32 to MKL. On AMD's processors with AVX-512, of which MKL uses AVX2 alone, the
compiled kernels are up to twice as fast at the sizes of both stages, for the result and for both gradients, on weights
as they are. Where there are none, oneDNN is so for the result and the input's gradient. On Intel's processors that have
a matrix unit the kernels use it (``kernels/tiles.h``); on the others, and with AVX2 alone on any, MKL is as fast or
faster (docs/performance.md).
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
from esrl.kernels.processor import is_intels

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
    if not torch.backends.mkl.is_available():
        return True
    if is_intels():
        native = kernels()
        return native is not None and native.tiles
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def other_layers() -> bool:
    """Whether ``linear`` is at present more than ``functional.linear``."""
    return faster_here() or _accumulating.get()


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, room: Tensor | None = None) -> Tensor:
    """``functional.linear``: (..., D), (N, D), (N,) -> (..., N); differentiable once where it is not PyTorch's.

    Args:
        room: contiguous numbers among which the result may be put, where there is no graph.
    """
    plain = weight.dim() == 2 and _plain(hidden, weight, bias)
    elsewhere, accumulate = plain and _elsewhere(weight.numel()), _accumulating.get()
    if torch.is_grad_enabled():
        if elsewhere or (plain and accumulate):
            result: Tensor = _Linear.apply(hidden, weight, bias, accumulate)
            return result
    elif elsewhere or (plain and room is not None):
        return _forward(hidden, weight, bias, room)
    return functional.linear(hidden, weight, bias)


def takes_room(weight: Tensor) -> bool:
    """Whether ``linear`` without a graph puts its result where it is told to."""
    return _plain(weight) and (kernels() is not None or not _elsewhere(weight.numel()))


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight: (..., N), (N, D) -> (..., D), without a graph."""
    if not (_plain(gradient, weight) and _elsewhere(weight.numel())):
        return gradient @ weight
    return _product(gradient, weight, None, transposed=True)


def weight_gradient(gradient: Tensor, hidden: Tensor, out: Tensor | None = None) -> Tensor:
    """gradient.T @ hidden: (n, N), (n, D) -> (N, D), without a graph; added to ``out``, in place, if there is one."""
    elsewhere = _plain(gradient, hidden, out) and _elsewhere(gradient.shape[1] * hidden.shape[1])
    native = kernels() if elsewhere else None
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
        return _forward(hidden, weight, bias)

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


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor | None = None) -> Tensor:
    """hidden @ weight.T + bias, without a graph, elsewhere or by PyTorch."""
    if _elsewhere(weight.numel()):
        return _product(hidden, weight, bias, room=room)
    flat = hidden.reshape(-1, hidden.shape[-1])
    out, across = _place(room, len(flat), weight.shape[0]), weight.t()
    product = torch.mm(flat, across, out=out) if bias is None else torch.addmm(bias, flat, across, out=out)
    return _shaped(product, hidden)


def _product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False, room: Tensor | None = None
) -> Tensor:
    """hidden @ weight.T + bias, or hidden @ weight if it is ``transposed``, not by PyTorch."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows, native = len(flat), kernels()
    if native is not None:
        out = _place(room, rows, weight.shape[1] if transposed else weight.shape[0])
        product = native.product(flat, weight, bias, transposed=transposed, out=out)
    else:
        step = ROWS if rows > 64 else min(rows, 8)
        if rows % step:
            flat = functional.pad(flat, (0, 0, 0, -rows % step))
        across = weight.t() if transposed else weight
        product = torch.ops.mkldnn._linear_pointwise.default(flat, across, bias, "none", [], "")
    return _shaped(product[:rows], hidden)


def _place(room: Tensor | None, rows: int, outputs: int) -> Tensor | None:
    return None if room is None else room[: rows * outputs].view(rows, outputs)


def _shaped(product: Tensor, hidden: Tensor) -> Tensor:
    """(rows, N) as (..., N). In autograd's eyes no view: what a function gives may be changed in place unless it is."""
    return torch.ops.aten._unsafe_view(product, [*hidden.shape[:-1], product.shape[1]])


def _elsewhere(weights: int) -> bool:
    """Whether the product of so many weights is faster elsewhere than in PyTorch, and can be computed there."""
    return faster_here() and weights >= MIN_WEIGHTS and (kernels() is not None or _has_onednn())


def _plain(*given: Tensor | None) -> bool:
    """Whether all are ordinary tensors in float32 on the CPU, some numbers in each; a distributed one has its ways."""
    return not torch.is_autocast_enabled("cpu") and all(
        part.device.type == "cpu"
        and part.dtype == torch.float32
        and part.numel() > 0
        and type(part) in (Tensor, nn.Parameter)
        for part in given
        if part is not None
    )


def _has_onednn() -> bool:
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return usable and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not in every build
