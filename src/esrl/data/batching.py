"""From examples to batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esrl.algorithm.streams import permutation
from esrl.data.examples import Example
from esrl.types import Prompts


def make_prompts(examples: Sequence[Example], tokenizer: Any, max_source_tokens: int) -> Prompts:
    """Tokenize sources; one longer than ``max_source_tokens`` is cut, its end-of-sequence kept."""
    sources = [example.columns["source"] for example in examples]
    # the tokenizer takes no empty batch, which a process without a share of the last batch has
    rows = tokenizer(sources, truncation=True, max_length=max_source_tokens)["input_ids"] if sources else []
    input_ids, mask = pad(rows, tokenizer.pad_token_id)
    names = examples[0].columns if examples else ()
    return Prompts(
        example_ids=tuple(example.id for example in examples),
        input_ids=input_ids,
        mask=mask,
        columns={name: [example.columns[name] for example in examples] for name in names},
    )


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Lists of ids -> (N, longest) int64 and the (N, longest) mask of real tokens."""
    width = max((len(row) for row in rows), default=1)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    ids = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64).view(-1, width)
    return ids, torch.arange(width)[None, :] < lengths


def shuffled_batches(count: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches of ``size`` examples in a fresh order; the last one may be smaller."""
    order = permutation(count, "epoch", seed, epoch)
    return [order[start : start + size] for start in range(0, count, size)]


def token_batches(lengths: Sequence[int], max_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches of examples of similar length: examples times longest stays within ``max_tokens``.

    Examples of equal length meet in a fresh order each epoch, and the batches come in a fresh order.
    """
    order = sorted(permutation(len(lengths), "epoch", seed, epoch), key=lambda i: lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return [batches[j] for j in permutation(len(batches), "batches", seed, epoch)]
