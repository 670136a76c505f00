"""Drawing a token for every row from one pass over its logits (method.md, section 4, "Draws")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esrl.algorithm.log_probs import MAX_LOGITS, Projection


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens and what is recorded with them; (R,) each."""

    tokens: Tensor
    log_probs: Tensor  # at temperature 1
    sampling_log_probs: Tensor  # at the row's temperature; 0 for a greedy row
    records: dict[str, Tensor]


def draw_tokens(
    hidden: Tensor,
    projection: Projection,
    temperature: Tensor,
    uniforms: Tensor,
    records: tuple[str, ...] = (),
    max_logits: int = MAX_LOGITS,
) -> Drawn:
    """Draw the next token of each row by inverting the cumulative distribution at its uniform number.

    Args:
        hidden: (R, D).
        temperature: (R,); 0 takes the most probable token.
        uniforms: (R,) in [0, 1).
        records: any of "entropy" (of the distribution at temperature 1, in nats) and "max_prob".

    Logits exist for one chunk of rows at a time.
    """
    size = max(1, max_logits // projection.weight.shape[0])
    parts = [
        _draw_chunk(
            projection.logits(hidden[start : start + size]),
            temperature[start : start + size],
            uniforms[start : start + size],
            records,
        )
        for start in range(0, hidden.shape[0], size)
    ]
    if len(parts) == 1:
        return parts[0]
    return Drawn(
        tokens=torch.cat([part.tokens for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        sampling_log_probs=torch.cat([part.sampling_log_probs for part in parts]),
        records={name: torch.cat([part.records[name] for part in parts]) for name in records},
    )


def _draw_chunk(logits: Tensor, temperature: Tensor, uniforms: Tensor, records: tuple[str, ...]) -> Drawn:
    best, best_token = logits.max(1)
    logits -= best[:, None]
    greedy = temperature == 0
    if bool(greedy.all()):
        tokens = best_token
        weights = logits.exp()
        log_norm = weights.sum(1).log()
        sampling = torch.zeros_like(log_norm)
    else:
        temperature = torch.where(greedy, 1.0, temperature).to(logits.dtype)
        plain = bool((temperature == 1).all())
        weights = logits.exp() if plain else torch.exp(logits / temperature[:, None])
        tokens, log_total = invert_cumulative(weights, uniforms)
        # a parallel scan (CUDA) need not be monotone to the last bit; a token of weight 0 is never drawn there either
        impossible = weights.gather(1, tokens[:, None])[:, 0] == 0
        tokens = torch.where(greedy | impossible, best_token, tokens)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        sampling = torch.where(greedy, 0.0, chosen / temperature - log_total)
        log_norm = log_total if plain else logits.exp().sum(1).log()
    log_probs = logits.gather(1, tokens[:, None])[:, 0] - log_norm
    return Drawn(tokens, log_probs, sampling, {name: _record(name, logits, log_norm) for name in records})


def invert_cumulative(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative weight exceeds u times the total: (R, V), (R,) -> (R,) tokens, (R,) log total.

    A token of weight 0 is never drawn: its cumulative weight equals its predecessor's.
    """
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1]
    # u < 1, but u * total can round up to total, which no cumulative weight exceeds
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms.to(total.dtype) * total, below)
    tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # where the weights are NaN the search runs off the end; the log-probabilities are NaN too, and checked later
    return tokens.clamp_max(weights.shape[1] - 1), total.log()


def _record(name: str, shifted: Tensor, log_norm: Tensor) -> Tensor:
    if name == "max_prob":
        return torch.exp(-log_norm)
    probabilities = torch.exp(shifted - log_norm[:, None])
    # p ln p = 0 where p = 0, suppressed tokens (-inf) included
    return torch.special.entr(probabilities).sum(1)
