"""Attention with a gradient over rows that share keys and values: compiled on CPUs, for stage two's many short rows."""

from __future__ import annotations

from ctypes import Structure, byref, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esrl.kernels import Native, kernels

HEAD_VECTORS = (1, 2, 4, 8, 16)
"""Widths of a head, in vectors, that the kernels are compiled for."""


class _Heads(Structure):
    _fields_ = (("at", c_void_p), ("item", c_int64), ("position", c_int64), ("head", c_int64))


class _AttentionStruct(Structure):
    _fields_ = (
        *((name, _Heads) for name in ("query", "key", "value", "out")),
        *((f"{name}_gradient", _Heads) for name in ("query", "key", "value", "out")),
        *((name, c_void_p) for name in ("rows", "starts", "mask")),
        *((name, c_int64) for name in ("items", "heads", "queries", "keys", "causal")),
    )


@dataclass(frozen=True, slots=True)
class Shared:
    """Which rows read which prompt: the rows in the order of prompts, and where each prompt's begin."""

    rows: Tensor  # (R,) int64
    starts: Tensor  # (P + 1,) int64
    mask: Tensor | None  # (P, S) bool, contiguous; None where everything may be read

    @classmethod
    def of(cls, prompt_index: Tensor, mask: Tensor) -> Shared:
        """From (R,) each row's prompt, in any order, and (P, S) the keys that may be read."""
        counts = torch.bincount(prompt_index, minlength=len(mask))
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(torch.argsort(prompt_index, stable=True), starts, None if bool(mask.all()) else mask.contiguous())


def fitting_kernels(heads: int, *tensors: Tensor) -> Native | None:
    """The kernels, where they can take these queries, keys and values (..., D): float32 on the CPU, whole vectors."""
    if any(part.device.type != "cpu" or part.dtype != torch.float32 for part in tensors):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    native = kernels()
    width = tensors[0].shape[-1] // heads
    return native if native is not None and width in [native.vector * count for count in HEAD_VECTORS] else None


def attention(native: Native, query: Tensor, key: Tensor, value: Tensor, shared: Shared | None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017), differentiable once.

    Args:
        query: (R, T, H, d).
        key: (P, S, H, d), the prompts', or without ``shared`` the rows' own, (R, T, H, d): position t then reads those
            up to t.
        value: like ``key``.

    Returns:
        (R, T, H, d).
    """
    result: Tensor = _Attention.apply(native, query, key, value, shared)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, native: Native, query: Tensor, key: Tensor, value: Tensor, shared: Shared | None
    ) -> Tensor:
        query, key, value = (_dense(part) for part in (query, key, value))
        out = torch.empty(query.shape)
        _run(native, shared, {"query": query, "key": key, "value": value, "out": out})
        ctx.save_for_backward(query, key, value)
        ctx.native, ctx.shared = native, shared
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        given = dict(zip(("query", "key", "value"), ctx.saved_tensors, strict=True))
        gradients = {f"{name}_gradient": torch.empty_like(part) for name, part in given.items()}
        _run(ctx.native, ctx.shared, {**given, **gradients, "out_gradient": _dense(grad_outputs[0])}, back=True)
        return (None, *gradients.values(), None)


def _run(native: Native, shared: Shared | None, tensors: dict[str, Tensor], *, back: bool = False) -> None:
    query, key = tensors["query"], tensors["key"]
    struct = _AttentionStruct(
        **{name: _Heads(part.data_ptr(), *part.stride()[:3]) for name, part in tensors.items()},
        rows=None if shared is None else shared.rows.data_ptr(),
        starts=None if shared is None else shared.starts.data_ptr(),
        mask=None if shared is None or shared.mask is None else shared.mask.data_ptr(),
        items=len(key),
        heads=query.shape[2],
        queries=query.shape[1],
        keys=key.shape[1],
        causal=shared is None,
    )
    if not native.library.esrl_attention(byref(struct), query.shape[3], back, torch.get_num_threads()):
        raise MemoryError(f"there is no memory for attention to {key.shape[1]} positions.")


def _dense(part: Tensor) -> Tensor:
    """(..., d), each head's numbers side by side."""
    return part if part.stride(-1) == 1 else part.contiguous()
