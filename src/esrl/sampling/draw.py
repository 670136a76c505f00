"""Drawing a token for every row from one pass over its logits (method.md, section 4, "Draws")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from esrl.algorithm.log_probs import exponential
from esrl.kernels import LaidOut
from esrl.models.linear import FrozenProjection

_BLOCK = 128
"""Tokens whose weights are summed before the search: a sum is vectorised, a cumulative sum over V is not."""

_NUCLEUS = 512
"""Tokens that are looked at first for the ones of ``top_p``."""


class VocabularyProjection(Protocol):
    """Hidden states in, logits out."""

    vocabulary: int

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V), in at least float32; the caller may overwrite them."""
        ...


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens may be drawn, of the distribution at the row's temperature; as Hugging Face's ``generate`` has it:
    first ``top_k``, then ``top_p`` of what that has left, then ``min_p``. Tokens as probable as the last one stay, too.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def cut(self, weights: Tensor) -> Tensor:
        """(R, V) unnormalised probabilities; those of tokens that may not be drawn become 0."""
        if self.top_k is not None and self.top_k < weights.shape[1]:
            weights = _above(weights, weights.topk(self.top_k, 1).values[:, -1:])
        if self.top_p is not None and self.top_p < 1:
            weights = _above(weights, _nucleus(weights, self.top_p))
        if self.min_p is not None:
            weights = _above(weights, self.min_p * weights.amax(1, keepdim=True))
        return weights


@dataclass(frozen=True, slots=True)
class Temperature:
    """(R,) temperatures, which tokens may be drawn at them, and what holds for all: a draw need not ask the device."""

    values: Tensor
    greedy: bool  # all are 0
    some_greedy: bool
    plain: bool  # all are 1
    truncation: Truncation | None  # None: all tokens may be drawn

    @classmethod
    def of(cls, values: Tensor, truncation: Truncation | None = None) -> Temperature:
        """Look at (R,) temperatures; 0 takes the most probable token."""
        greedy = values == 0
        return cls(values, bool(greedy.all()), bool(greedy.any()), bool((values == 1).all()), truncation)

    def rows(self, index: Tensor) -> Temperature:
        """Those of some rows."""
        return self if self.greedy or self.plain else replace(self, values=self.values[index])

    def part(self, rows: slice) -> Temperature:
        """Those of a chunk."""
        return self if self.greedy or self.plain else replace(self, values=self.values[rows])


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens and what is recorded with them; (R,) each."""

    tokens: Tensor
    log_probs: Tensor  # at temperature 1
    sampling_log_probs: Tensor  # at the row's temperature, of what it may draw; 0 for a greedy row
    records: dict[str, Tensor]


def draw_tokens(
    hidden: Tensor,
    projection: VocabularyProjection,
    temperature: Temperature,
    uniforms: Tensor,
    records: tuple[str, ...],
    max_logits: int,
) -> Drawn:
    """Draw the next token of each row by inverting the cumulative distribution at its uniform number.

    Args:
        hidden: (R, D).
        uniforms: (R,) in [0, 1).
        records: any of "entropy" (of the distribution at temperature 1, in nats) and "max_prob".
        max_logits: logits that exist at a time.
    """
    size = max(1, max_logits // projection.vocabulary)
    if isinstance(projection, FrozenProjection) and projection.compiled is not None and temperature.truncation is None:
        return _draw_compiled(hidden, projection.compiled, temperature, uniforms, records, size)
    parts = [
        _draw_chunk(projection.logits(hidden[rows]), temperature.part(rows), uniforms[rows], records)
        for rows in (slice(start, start + size) for start in range(0, hidden.shape[0], size))
    ]
    if len(parts) == 1:
        return parts[0]
    return Drawn(
        tokens=torch.cat([part.tokens for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        sampling_log_probs=torch.cat([part.sampling_log_probs for part in parts]),
        records={name: torch.cat([part.records[name] for part in parts]) for name in records},
    )


def _draw_compiled(
    hidden: Tensor,
    projection: LaidOut,
    temperature: Temperature,
    uniforms: Tensor,
    records: tuple[str, ...],
    together: int,
) -> Drawn:
    """By the kernels: logits and draw in one call, ``together`` rows at a time."""
    # of more rows, and all the same, if all are 0 or all are 1
    tau = temperature.values.double()
    drawn = projection.native.draw(projection, hidden, tau, uniforms.double(), records, together)
    tokens, log_probs, sampling = (drawn.pop(name) for name in ("tokens", "log_probs", "sampling_log_probs"))
    return Drawn(tokens, log_probs, sampling, drawn)


def _draw_chunk(logits: Tensor, temperature: Temperature, uniforms: Tensor, records: tuple[str, ...]) -> Drawn:
    logits -= logits.amax(1, keepdim=True)
    untouched = temperature.plain and temperature.truncation is None
    if untouched and not records:
        return _draw_in_place(logits, uniforms)
    weights = exponential(logits)
    # where nothing changes the weights, the draw has their sum anyway
    log_norm = None if untouched else weights.sum(1).log()
    if temperature.greedy:
        tokens = logits.argmax(1)
        sampling = torch.zeros_like(uniforms, dtype=logits.dtype)
    else:
        tau: float | Tensor = 1.0
        if not temperature.plain:
            tau = temperature.values.to(logits.dtype)
            tau = torch.where(tau == 0, 1.0, tau) if temperature.some_greedy else tau
            weights = exponential(torch.div(logits, tau[:, None], out=weights), out=weights)
        weights = weights if temperature.truncation is None else temperature.truncation.cut(weights)
        tokens, log_total = invert_cumulative(weights, uniforms)
        log_norm = log_total if log_norm is None else log_norm
        if temperature.some_greedy:
            tokens = torch.where(temperature.values == 0, logits.argmax(1), tokens)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        sampling = chosen / tau - log_total
        if temperature.some_greedy:
            sampling = torch.where(temperature.values == 0, 0.0, sampling)
    assert log_norm is not None
    log_probs = logits.gather(1, tokens[:, None])[:, 0] - log_norm
    return Drawn(tokens, log_probs, sampling, {name: _record(name, logits, log_norm) for name in records})


def _draw_in_place(shifted: Tensor, uniforms: Tensor) -> Drawn:
    """At temperature 1 the log-probability is the drawn weight's logarithm: the logits need not be kept."""
    weights = exponential(shifted, out=shifted)
    tokens, log_total = invert_cumulative(weights, uniforms)
    log_probs = weights.gather(1, tokens[:, None])[:, 0].log() - log_total
    return Drawn(tokens, log_probs, log_probs, {})


def invert_cumulative(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative weight exceeds u times the total: (R, V), (R,) -> (R,) tokens, (R,) log total.

    First the block of tokens is found, then the token in it. One of weight 0 is never drawn: its cumulative weight
    equals its predecessor's.
    """
    vocabulary = weights.shape[1]
    cumulative = _block_sums(weights).cumsum(1)
    total = cumulative[:, -1]
    target = _below(uniforms.to(total.dtype) * total, total)
    block = torch.searchsorted(cumulative, target[:, None], right=True)
    # where the weights are NaN the search runs off the end; the log-probabilities are NaN too, and checked later
    block = block.clamp_max_(cumulative.shape[1] - 1)
    before = cumulative.gather(1, (block - 1).clamp_min_(0)).masked_fill_(block == 0, 0)
    members = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, members.clamp_max(vocabulary - 1)).masked_fill_(members >= vocabulary, 0).cumsum_(1)
    rest = _below(target[:, None] - before, inside[:, -1:])
    offset = torch.searchsorted(inside, rest.clamp_min_(0), right=True)
    tokens = (block * _BLOCK + offset)[:, 0].clamp_max_(vocabulary - 1)
    if weights.is_cuda:  # a parallel scan need not rise to the last bit
        impossible = weights.gather(1, tokens[:, None])[:, 0] == 0
        tokens = torch.where(impossible, weights.argmax(1), tokens)
    return tokens, total.log()


def _above(weights: Tensor, lowest: Tensor) -> Tensor:
    return weights.masked_fill(weights < lowest, 0)


def _nucleus(weights: Tensor, share: float) -> Tensor:
    """(R, 1) the least of the largest weights that together have the share: (R, V) -> (R, 1)."""
    vocabulary = weights.shape[1]
    target = share * weights.sum(1, keepdim=True)
    for width in (min(_NUCLEUS, vocabulary), vocabulary):  # to sort them all is rarely needed, and slow
        largest = weights.topk(width, 1).values
        up_to = largest.cumsum(1)
        if width == vocabulary or bool((up_to[:, -1:] >= target).all()):
            break
    number = (up_to - largest < target).sum(1, keepdim=True)
    return largest.gather(1, (number - 1).clamp_min_(0))


def _block_sums(weights: Tensor) -> Tensor:
    """(R, V) -> (R, V / block), the last block may be shorter."""
    rows, vocabulary = weights.shape
    whole = vocabulary // _BLOCK
    sums = weights[:, : whole * _BLOCK].view(rows, whole, _BLOCK).sum(2)
    if whole * _BLOCK == vocabulary:
        return sums
    return torch.cat([sums, weights[:, whole * _BLOCK :].sum(1, keepdim=True)], 1)


def _below(target: Tensor, total: Tensor) -> Tensor:
    """Rounding can bring u * total up to total, which no cumulative weight exceeds.

    A total times (1 - eps / 2) is its predecessor: what is left out lies between a half and a whole of its last bit.
    """
    return torch.minimum(target, total * (1 - torch.finfo(total.dtype).eps / 2))


def _record(name: str, shifted: Tensor, log_norm: Tensor) -> Tensor:
    if name == "max_prob":
        return torch.exp(-log_norm)
    probabilities = torch.exp(shifted - log_norm[:, None])
    # p ln p = 0 where p = 0, suppressed tokens (-inf) included
    return torch.special.entr(probabilities).sum(1)
