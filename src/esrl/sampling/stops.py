"""Stop strings in what a model has drawn or decoded; the rule itself is ``data.stops``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esrl.data.stops import Decode, stop_rows
from esrl.types import Rollouts


def decoder(tokenizer: Any) -> Decode:
    """Ids to text as everywhere here: without special tokens, spaces as they are."""
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut_at_stops(rollouts: Rollouts, tokenizer: Any, stops: Sequence[str]) -> Rollouts:
    """The samples as if each had ended with the token that completes a stop string (see ``data.stops``)."""
    if not stops or rollouts.num_rows == 0:
        return rollouts
    kept, stopped, texts = stop_rows(rollouts.tokens.cpu(), rollouts.mask.cpu(), decoder(tokenizer), stops)
    mask = kept.to(rollouts.mask.device)

    def cut(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0)

    return replace(
        rollouts,
        tokens=cut(rollouts.tokens),
        mask=mask,
        finished=rollouts.finished | stopped.to(rollouts.finished.device),
        log_probs=cut(rollouts.log_probs),
        sampling_log_probs=cut(rollouts.sampling_log_probs),
        texts=tuple(texts),
        records={name: cut(values) for name, values in rollouts.records.items()},
    )
