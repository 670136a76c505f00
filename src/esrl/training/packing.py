"""Several examples in one row: no padding is computed, and no example sees another.

Positions begin anew with each example. Hugging Face's causal models read from them where an example ends (given neither
a mask nor a cache) and keep attention within it, sliding windows included. `packs_exactly` asks the model itself
whether it does, so that one which does not (a recurrent one, say) is trained a row an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esrl.algorithm.log_probs import Projection, token_log_probs, weighted_log_prob_sum
from esrl.data.batching import pad

# what some models do to their logits behind the projection
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "mup_width_scale")


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most ``capacity``: first-fit-decreasing (Johnson 1973).

    It needs at most 11/9 of the fewest possible bins, plus 6/9. Equal lengths keep their order.

    Raises:
        ValueError: a length above the capacity or below 1.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"length {length} of item {index} does not lie in [1, {capacity}], the bins' capacity.")
        place = next((number for number, free in enumerate(room) if free >= length), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= length
    return bins


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """B rows of S positions, each holding one or several examples, then padding.

    Every example begins with a prompt token, so that no answer token stands first.
    """

    tokens: Tensor  # (B, S) int64
    positions: Tensor  # (B, S) int64: 0, 1, ... within each example, and again within the padding
    answer: Tensor  # (B, S) bool: tokens of answers, which the loss is about


def pack_rows(
    bins: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_token: int
) -> PackedRows:
    """Lay out examples: row b holds those of ``bins[b]``, one behind the other."""
    tokens, positions, answer = [], [], []
    for members in bins:
        tokens.append([token for i in members for token in (*prompts[i], *answers[i])])
        positions.append([place for i in members for place in range(len(prompts[i]) + len(answers[i]))])
        answer.append([flag for i in members for flag in [0] * len(prompts[i]) + [1] * len(answers[i])])
    ids, mask = pad(tokens, pad_token)
    padding = (torch.arange(ids.shape[1])[None, :] - mask.sum(1, keepdim=True)).clamp(min=0)
    return PackedRows(
        tokens=ids, positions=torch.where(mask, pad(positions, 0)[0], padding), answer=pad(answer, 0)[0].bool()
    )


def packed_loss(model: Any, rows: PackedRows, head: Projection | None, *, packed: bool = True) -> Tensor:
    """sum over answer tokens of -log p(token | its example's tokens before it); a scalar with its graph.

    Args:
        model: a Hugging Face causal model, or a PEFT model around one.
        rows: on the model's device.
        head: its vocabulary projection, see `vocabulary_projection`; None takes the model's own (B, S, V) logits.
        packed: False for rows of one example each: positions and masks are then left to the model.
    """
    hidden, targets = answer_states(model, rows, head, packed)
    if head is not None:
        weights = hidden.new_ones(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        return -weighted_log_prob_sum(hidden, targets, weights, head)
    return torch.nn.functional.cross_entropy(hidden, targets, reduction="sum")


def packed_log_probs(model: Any, rows: PackedRows, head: Projection | None, *, packed: bool = True) -> Tensor:
    """(N,) log-probabilities of the answer tokens, row by row; for evaluation, without a graph in mind."""
    hidden, targets = answer_states(model, rows, head, packed)
    if head is not None:
        return token_log_probs(hidden, targets, head)
    return hidden.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def answer_states(model: Any, rows: PackedRows, head: Projection | None, packed: bool) -> tuple[Tensor, Tensor]:
    """The states that predict the answer tokens, (N, D) or without a head the logits (N, V), and these tokens (N,)."""
    output = _forward(model, rows.tokens, rows.positions if packed else None, whole=head is None)
    before = rows.answer[:, 1:]  # the state at s - 1 predicts token s
    states = output[:, :-1][before]
    if head is None and states.dtype in (torch.bfloat16, torch.float16):
        states = states.float()
    return states, rows.tokens[:, 1:][before]


def causal_parts(model: Any) -> tuple[Any, Any]:
    """The causal model inside a PEFT model (adapters work in place), and its body without the vocabulary projection."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal, causal.base_model


def vocabulary_projection(model: Any) -> Projection | None:
    """The projection behind the body, or None where the model does more with its logits than project.

    Some models cap or scale their logits; that is read from their settings and found by trying: both ways must give
    the same logits for a few tokens.
    """
    causal, body = causal_parts(model)
    layer = causal.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or body is causal:  # an adapted layer is more than its weight
        return None
    settings = causal.config.get_text_config()
    if any(getattr(settings, name, None) not in (None, 1, 1.0) for name in _LOGIT_SETTINGS):
        return None
    head = Projection(layer.weight, layer.bias)
    with _undisturbed(causal), torch.no_grad():
        tokens = _probe_tokens(causal, 1, 4)
        hidden = body(input_ids=tokens, use_cache=False).last_hidden_state[0]
        expected = causal(input_ids=tokens, use_cache=False).logits[0]
        return head if _close(head.logits(hidden), expected.to(hidden.dtype).to(expected.dtype)) else None


def packs_exactly(model: Any) -> bool:
    """Whether examples in one row leave each other alone: as alone in their rows, and whatever the others are."""
    causal, _ = causal_parts(model)
    with _undisturbed(causal), torch.no_grad():
        first, second, other = _probe_tokens(causal, 3, 5).unsqueeze(1)
        positions = torch.arange(5, device=first.device).repeat(2)[None, :]
        try:
            packed = _forward(causal, torch.cat([first, second], 1), positions)
            changed = _forward(causal, torch.cat([other, second], 1), positions)
            two = _forward(causal, torch.cat([first, second]), positions[:, :5].expand(2, 5))
            rows = _forward(causal, torch.cat([torch.cat([first, second], 1)] * 2), positions.expand(2, 10))
        except (TypeError, ValueError, RuntimeError):  # it takes no positions
            return False
        alone = _forward(causal, second, None)
        same = _close(packed[0, 5:], alone[0]) and _close(packed[0], two.flatten(0, 1))
        return same and _close(packed[0, 5:], changed[0, 5:], slack=4) and _close(rows[1], packed[0])


def _forward(model: Any, tokens: Tensor, positions: Tensor | None, whole: bool = False) -> Tensor:
    """(B, S, D) states, or the (B, S, V) logits of the ``whole`` model. A cache would undo the packing."""
    options = {} if positions is None else {"position_ids": positions}
    causal, body = causal_parts(model)
    if whole:
        logits: Tensor = causal(input_ids=tokens, use_cache=False, **options).logits
        return logits
    states: Tensor = body(input_ids=tokens, use_cache=False, **options).last_hidden_state
    return states


def _probe_tokens(causal: Any, rows: int, count: int) -> Tensor:
    """(rows, count) different tokens from all over the vocabulary."""
    vocabulary = causal.get_input_embeddings().num_embeddings
    numbers = torch.arange(rows * count, device=causal.device) + 1
    return (numbers * max(1, vocabulary // (rows * count + 1)) % vocabulary).view(rows, count)


def _close(found: Tensor, expected: Tensor, slack: float = 100) -> bool:
    """Equal up to ``slack`` rounding errors of the largest value: float32's at least, through which many norms go."""
    rounding = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    limit = slack * rounding * float(expected.abs().max())
    return bool((found - expected).abs().max() <= limit)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Without dropout, and in the mode it had again afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
