"""Log-probabilities of given tokens, and their gradient, without ever holding (N, V) logits at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from esrl.algorithm.products import input_gradient, linear, takes_room, weight_gradient

_LOG2_E = math.log2(math.e)

MAX_LOGITS = 1 << 22
"""Logits held at a time (16 MB in float32): the positions of a chunk are this divided by V."""


@dataclass(frozen=True, slots=True)
class Projection:
    """The vocabulary projection: logits = hidden @ weight.T + bias, soft-capped where the model caps them.

    ``bias`` (V,) is -inf at suppressed tokens, which so have probability 0 in both stages.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    cap: float | None = None
    """Logits l become cap * tanh(l / cap)."""

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V), of a type that is float32 at least; rounded to bfloat16 where the product is (autocast)."""
        return self.with_slope(hidden)[0]

    def with_slope(self, hidden: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The same, among the numbers of ``room`` if possible, and (N, V) how steep the cap is there; None without."""
        logits = linear(hidden, self.weight, self.bias, room)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return (logits, None) if self.cap is None else soft_cap(logits, self.cap)


def soft_cap(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """cap * tanh(logits / cap) and its slope, 1 - tanh^2; the logits of suppressed tokens stay -inf."""
    bounded = torch.tanh(logits / cap)
    return torch.where(logits == -torch.inf, logits, cap * bounded), 1 - bounded * bounded


def token_log_probs(
    hidden: Tensor,
    targets: Tensor,
    projection: Projection,
    *,
    temperature: Tensor | None = None,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """log p(target) at each position, chunk by chunk.

    Args:
        hidden: (N, D) states of the real tokens only.
        targets: (N,) int64.
        temperature: (N,) divides the logits; None means 1.

    Returns:
        (N,) log-probabilities, at least float32. Under autograd every chunk keeps its logits: take
        ``weighted_log_prob_sum`` where memory matters.
    """
    # cast once, not for each chunk
    projection = Projection(as_autocast(projection.weight), projection.bias, projection.cap)
    parts = [
        _log_probs(projection.logits(hidden[part]), targets[part], None if temperature is None else temperature[part])
        for part in _chunks(len(targets), projection.weight.shape[0], max_logits)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def weighted_log_prob_sum(  # noqa: PLR0913 - the tensors of one formula, and three settings
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    projection: Projection,
    *,
    temperature: Tensor | None = None,
    max_logits: int = MAX_LOGITS,
    accumulate: bool = False,
    room: Tensor | None = None,
) -> Tensor:
    """sum_n weights_n * log p(target_n), with the gradient of the projection taken on the way forward.

    The weights are constants (method.md, section 4), so d/dlogits = weights * (onehot - softmax) is known as soon as a
    chunk's logits are: they are used once and dropped. One chunk of logits exists at any time.

    Args:
        hidden: (N, D); targets: (N,) int64; weights: (N,); temperature: (N,) or None for 1.
        accumulate: add the gradient of the projection's weight to its ``grad`` here and now, which spares a copy of
            it: for a vocabulary of 250,000 that is more than all the rest. The result must then be differentiated as
            it is, not scaled or combined.
        room: from ``room_for_logits``, for a function that is called again and again.

    Returns:
        A scalar in the dtype of ``weights``; differentiable (once) in ``hidden`` and the projection. The gradient of a
        half-precision projection is added up over the chunks in float32.
    """
    result: Tensor = _WeightedLogProbSum.apply(
        hidden,
        projection.weight,
        projection.bias,
        targets,
        weights,
        temperature,
        projection.cap,
        max_logits,
        accumulate,
        room,
    )
    return result


def room_for_logits(projection: Projection, count: int, max_logits: int = MAX_LOGITS) -> Tensor | None:
    """Where the logits of ``count`` positions can be put, chunk by chunk; more positions take more chunks.

    What is allocated between two chunks cannot take pieces of it. None where it would not be used.
    """
    weight = projection.weight.detach()
    if not takes_room(weight):
        return None
    return torch.empty(_chunk_size(count, weight.shape[0], max_logits) * weight.shape[0], dtype=weight.dtype)


def exponential(values: Tensor, out: Tensor | None = None) -> Tensor:
    """exp by way of exp2, which is three times as fast on CPUs (docs/performance.md)."""
    return torch.mul(values, _LOG2_E, out=out).exp2_()


def as_autocast(weight: Tensor) -> Tensor:
    """A weight as autocast would hand it to a product here, for those who cast it once and use it often."""
    kind = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return weight.to(torch.get_autocast_dtype(kind))
    return weight


def _chunks(count: int, vocabulary: int, max_logits: int) -> Iterator[slice]:
    size = _chunk_size(count, vocabulary, max_logits)
    return (slice(start, start + size) for start in range(0, count, size))


def _chunk_size(count: int, vocabulary: int, max_logits: int) -> int:
    """Positions in each of the fewest chunks, which are as good as equal."""
    fewest = math.ceil(count / max(1, max_logits // vocabulary))
    return max(1, math.ceil(count / max(1, fewest)))


def _log_probs(logits: Tensor, targets: Tensor, temperature: Tensor | None) -> Tensor:
    if temperature is not None:
        logits = logits / temperature[:, None].to(logits.dtype)
    return -functional.cross_entropy(logits, targets, reduction="none")


class _WeightedLogProbSum(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd.Function takes tensors one by one
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        temperature: Tensor | None,
        cap: float | None,
        max_logits: int,
        accumulate: bool,
        room: Tensor | None,
    ) -> Tensor:
        projection = Projection(as_autocast(weight), bias, cap)
        inputs = hidden.to(projection.weight.dtype)
        grad_inputs = torch.empty_like(inputs)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # sums over chunks need the wide type: a half-precision gradient is not added to directly
        direct = accumulate and ctx.needs_input_grad[1] and wide == weight.dtype
        if direct and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] and not direct else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        total = weights.new_zeros(())
        most = max_logits if room is None else min(max_logits, room.numel())
        for part in _chunks(len(targets), weight.shape[0], most):
            logits, slope = projection.with_slope(inputs[part], room)
            scale = None if temperature is None else temperature[part].to(logits.dtype)
            if scale is not None:
                logits /= scale[:, None]
            chosen = targets[part, None]
            logits -= logits.amax(1, keepdim=True)
            picked = logits.gather(1, chosen)
            # c * (onehot - p), p in place of the logits
            grad = exponential(logits, out=logits)
            norm = grad.sum(1, keepdim=True)
            total += (weights[part] * (picked - norm.log())[:, 0]).sum()
            factor = weights[part, None].to(grad.dtype)
            grad.mul_(-factor / norm).scatter_add_(1, chosen, factor)
            if scale is not None:
                grad /= scale[:, None]
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            total_weight = weight.grad if direct else grad_weight
            if total_weight is not None:
                weight_gradient(grad.to(wide), hidden[part].to(wide), total_weight)
            grad_inputs[part] = input_gradient(grad.to(inputs.dtype), projection.weight)
        ctx.hidden_dtype, ctx.dtype = hidden.dtype, weight.dtype
        ctx.save_for_backward(grad_inputs, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        scale = grad_outputs[0]
        grad_hidden, grad_weight, grad_bias = (
            None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors
        )
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(ctx.hidden_dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 7
