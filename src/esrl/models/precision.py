"""The precision of matrix products: float32, or bfloat16 by PyTorch's autocast over weights that stay float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import torch

from esrl.algorithm import products

Precision = Literal["float32", "bfloat16"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _HasPrecision(Protocol):
    precision: Precision

    @property
    def device(self) -> torch.device: ...


Owner = TypeVar("Owner", bound=_HasPrecision)


def autocast(device: torch.device, precision: Precision, *, keep: bool = True) -> AbstractContextManager[Any]:
    """Within it, matrix products and attention are computed in this precision; sums and norms in float32.

    Args:
        keep: keep a weight's copy in bfloat16 until the end, for its next use.
    """
    return nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16, cache_enabled=keep)


def in_precision(
    function: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Run a function, or method, of a policy in the policy's precision, its linear layers by the fastest way here."""

    @functools.wraps(function)
    def wrapped(policy: Owner, *args: Arguments.args, **options: Arguments.kwargs) -> Result:
        fast = policy.device.type == "cpu" and products.other_layers()  # a mode costs time at every operation
        with autocast(policy.device, policy.precision), products.FastLinear() if fast else nullcontext():
            return function(policy, *args, **options)

    return wrapped
