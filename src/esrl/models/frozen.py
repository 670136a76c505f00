"""The weights of linear layers as they are now, LoRA included, and modules that run on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from esrl.models.linear import FrozenLinear


def twin(module: nn.Module, replace: Callable[[nn.Module], Any]) -> Any:
    """The same module over the same weights, with every part replaced for which ``replace`` gives something."""
    return _twin(module, replace, {})


def _twin(part: nn.Module, replace: Callable[[nn.Module], Any], known: dict[int, Any]) -> Any:
    # no function within `twin`: one that calls itself is a cycle, and would keep the laid-out weights
    if id(part) not in known:
        other = replace(part)
        if other is None:
            other = copy.copy(part)
            other.__dict__["_modules"] = {
                name: None if child is None else _twin(child, replace, known) for name, child in part._modules.items()
            }
        known[id(part)] = other
    return known[id(part)]


def frozen_linear(module: nn.Module) -> Any:
    """A linear layer, or one with LoRA on it, with its present weights; None for any other module.

    An adapter whose weights are no plain sum (DoRA, a quantized base) stays what it is.
    """
    weight = linear_weight(module)
    if weight is None:
        return module if hasattr(module, "base_layer") else None
    return FrozenLinear(weight, linear_bias(module))


@dataclass(frozen=True, slots=True)
class MergedLinear:
    """The weights of a linear layer with LoRA on it."""

    weight: Tensor  # (N, D)
    bias: Tensor | None


def merged_linear(module: nn.Module) -> MergedLinear | None:
    """The weights of a linear layer with LoRA on it, its adapters added; None for any other module.

    Raises:
        ValueError: an adapter that is not a sum (DoRA).
    """
    if not hasattr(module, "base_layer"):
        return None
    weight = linear_weight(module)
    if weight is None:
        raise ValueError(
            f"an adapter of the kind {type(module).__name__} with options that change the weight in other ways than by "
            "a low-rank sum is not supported here; use plain LoRA."
        )
    return MergedLinear(weight, linear_bias(module))


def linear_bias(module: nn.Module) -> Tensor | None:
    bias: Any = getattr(module, "base_layer", module).bias
    return None if bias is None else bias.detach()


def linear_weight(module: nn.Module) -> Tensor | None:
    """(N, D) the weight that the layer applies; None where it is not a plain product, or LoRA is not all there is."""
    adapted: Any = module
    if type(module) is nn.Linear:
        return module.weight.detach()
    if type(module) is Conv1D:
        transposed: Tensor = adapted.weight.detach().t().contiguous()
        return transposed
    if not hasattr(module, "get_delta_weight") or not hasattr(module, "base_layer"):
        return None
    base = linear_weight(adapted.base_layer)
    if base is None or adapted.merged or adapted.disable_adapters:
        return base
    active = [name for name in adapted.active_adapters if name in adapted.lora_A]
    # DoRA and the like change the weight in other ways
    if any(name in adapted.lora_variant for name in active) or any(adapted.lora_bias.get(n) for n in active):
        return None
    for name in active:
        with torch.autocast(base.device.type, enabled=False):  # what is added is small
            delta = adapted.get_delta_weight(name)
        delta = delta.t() if type(adapted.base_layer) is Conv1D else delta
        base = base + delta.detach().to(base.dtype)
    return base
