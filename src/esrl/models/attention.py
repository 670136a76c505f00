"""A decoder's attention in stage two: over padded rows by PyTorch, or compiled over the real tokens alone.

Both give each row's tokens the row up to themselves, and all rows of a prompt its keys and values without a copy for
each.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_int64, c_void_p
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from esrl.kernels import Native, kernels
from esrl.models.groups import PromptGroups
from esrl.models.policy import PromptState

_HEAD_VECTORS = (1, 2, 4, 8, 16)
"""Widths of a head, in vectors, that the kernels are compiled for."""


class Attention(Protocol):
    """Of a layer's queries, keys and values (..., D), to themselves and to the prompts."""

    def own(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...

    def prompts(self, layer: int, query: Tensor) -> Tensor: ...


class PaddedAttention:
    """Rows (R, T, D). Where prompts have very different numbers of rows, filling up the groups of rows would take more
    room than a copy of the prompt for each row: then each row gets its own.

    Args:
        prompt_index: (R,).
        length: T.
    """

    def __init__(self, state: PromptState, prompt_index: Tensor, length: int) -> None:
        used, local = torch.unique(prompt_index, return_inverse=True)
        groups = PromptGroups.of(local, len(used))
        room = groups.num_prompts * groups.ranks * length
        if room > len(prompt_index) * (length + state.mask.shape[1]):
            used, groups = prompt_index, PromptGroups(len(prompt_index), 1, None)
        everything = len(used) == len(state.mask) and bool((used == torch.arange(len(used), device=used.device)).all())
        self.state, self.groups, self.used = state, groups, None if everything else used
        mask = state.mask if everything else state.mask[used]
        self.mask = None if bool(mask.all()) else mask[:, None, None, :]
        self.heads = state.keys[0].shape[1]

    def own(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (split_heads(states, self.heads) for states in (query, key, value))
        return _merge_heads(functional.scaled_dot_product_attention(query, key, value, is_causal=True))

    def prompts(self, layer: int, query: Tensor) -> Tensor:
        keys, values = self.state.keys[layer], self.state.values[layer]
        if self.used is not None:
            keys, values = keys.index_select(0, self.used), values.index_select(0, self.used)
        length, groups = query.shape[1], self.groups
        together = split_heads(groups.spread(query).flatten(1, 2), self.heads)  # (P, H, ranks * T, d)
        mixed = functional.scaled_dot_product_attention(together, keys, values, attn_mask=self.mask)
        return groups.collect(_merge_heads(mixed).unflatten(1, (groups.ranks, length)))


class PackedAttention:
    """Real tokens (n, D), a row's side by side.

    Args:
        prompt_index: (R,).
        lengths: (R,) of the rows.
    """

    def __init__(self, native: Native, state: PromptState, prompt_index: Tensor, lengths: Tensor) -> None:
        self.native, self.state = native, state
        self.heads = state.keys[0].shape[1]
        self.starts = _starts(lengths)
        self.longest = int(lengths.max()) if len(lengths) else 0
        self.rows = torch.argsort(prompt_index, stable=True)
        self.first_rows = _starts(torch.bincount(prompt_index, minlength=len(state.mask)))
        self.mask = None if bool(state.mask.all()) else state.mask.contiguous()

    def own(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (states.unflatten(1, (self.heads, -1)) for states in (query, key, value))
        mixed: Tensor = _Packed.apply(self, *parts)
        return mixed.flatten(1)

    def prompts(self, layer: int, query: Tensor) -> Tensor:
        keys, values = (states[layer].transpose(1, 2) for states in (self.state.keys, self.state.values))
        mixed: Tensor = _Packed.apply(self, query.unflatten(1, (self.heads, -1)), keys, values)
        return mixed.flatten(1)

    def run(self, tensors: dict[str, Tensor], *, back: bool = False) -> None:
        """The kernel, on (n, H, d) queries and keys, or keys of (P, S, H, d)."""
        key = tensors["key"]
        own = key.dim() == 3
        struct = _AttentionStruct(
            **{name: _heads(part) for name, part in tensors.items()},
            starts=self.starts.data_ptr(),
            rows=None if own else self.rows.data_ptr(),
            first_rows=None if own else self.first_rows.data_ptr(),
            mask=None if own or self.mask is None else self.mask.data_ptr(),
            items=len(self.starts) - 1 if own else len(key),
            heads=self.heads,
            keys=self.longest if own else key.shape[1],
        )
        if not self.native.library.esrl_attention(byref(struct), key.shape[-1], back, torch.get_num_threads()):
            raise MemoryError(f"there is no memory for attention to {struct.keys} positions.")


def packing_kernels(part: Any) -> Native | None:
    """The kernels, where they can take the attention of an encoder or decoder: float32 on the CPU, whole vectors."""
    weight = part.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    native, width = kernels(), weight.shape[1] // part.layers[0].self_attn.num_heads
    return native if native is not None and width in [native.vector * count for count in _HEAD_VECTORS] else None


class _Heads(Structure):
    _fields_ = (("at", c_void_p), ("item", c_int64), ("position", c_int64), ("head", c_int64))


class _AttentionStruct(Structure):
    _fields_ = (
        *((name, _Heads) for name in ("query", "key", "value", "out")),
        *((f"{name}_gradient", _Heads) for name in ("query", "key", "value", "out")),
        *((name, c_void_p) for name in ("starts", "rows", "first_rows", "mask")),
        *((name, c_int64) for name in ("items", "heads", "keys")),
    )


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (_dense(part) for part in (query, key, value))
        out = torch.empty(query.shape)
        attention.run({"query": query, "key": key, "value": value, "out": out})
        ctx.save_for_backward(query, key, value)
        ctx.attention = attention
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        given = dict(zip(("query", "key", "value"), ctx.saved_tensors, strict=True))
        gradients = {f"{name}_gradient": torch.empty_like(part) for name, part in given.items()}
        ctx.attention.run({**given, **gradients, "out_gradient": _dense(grad_outputs[0])}, back=True)
        return (None, *gradients.values())


def _heads(part: Tensor) -> _Heads:
    """Of (n, H, d), whose items are tokens, or (P, S, H, d)."""
    item, position, head = part.stride()[0], part.stride()[-3], part.stride()[-2]
    return _Heads(part.data_ptr(), item, position, head)


def _starts(counts: Tensor) -> Tensor:
    """(N,) -> (N + 1,) int64: where each begins, and the end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _dense(part: Tensor) -> Tensor:
    """(..., d), each head's numbers side by side."""
    return part if part.stride(-1) == 1 else part.contiguous()


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(R, T, D) -> (R, heads, T, head width)."""
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def _merge_heads(states: Tensor) -> Tensor:
    """(R, heads, T, head width) -> (R, T, D)."""
    return states.transpose(1, 2).flatten(2)
