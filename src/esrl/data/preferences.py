"""Reward-model inputs: a prompt and an answer as a sequence classifier reads them.

A causal model's classifier reads what the policy would have written, ``prompt + answer + end token`` (see `encoding`),
and scores it at its last token that is not PAD. An encoder's classifier (its tokenizer has CLS and SEP, as BERT's)
reads the two as a pair, the way its tokenizer joins them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from esrl.data.batching import pad
from esrl.data.encoding import Encoder, PromptConfig, prompt_text
from esrl.data.examples import REJECTED, Example, LengthReport, limit_token_counts

SETTINGS = "esrl_reward.json"
"""In a reward model's folder: the ``PromptConfig`` that it was trained with. Hugging Face passes it over."""

Fields = dict[str, list[int]]
"""``input_ids`` and, for pairs, ``token_type_ids``."""


class ScoreEncoder(Protocol):
    """Prompts and answers to a reward model's inputs."""

    config: PromptConfig
    pad_token: int
    """What the model's ``config.pad_token_id`` must be."""
    special_tokens: int
    """Tokens of an input beside the prompt's and the answer's."""

    def encode(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Fields]:
        """Inputs with over-long prompts cut at their beginning; answers stay whole."""
        ...

    def lengths(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[int], list[int]]:
        """Tokens of the prompts and of the answers, before anything is cut; end tokens do not count."""
        ...


def score_encoder(tokenizer: Any, config: PromptConfig) -> ScoreEncoder:
    """The encoder that fits the tokenizer, which is not changed."""
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return PairInputs(tokenizer, config)
    return CausalInputs(tokenizer, config)


class CausalInputs:
    """Prompt, answer and end token, for decoder-only models.

    Without a PAD token, EOS takes its place: Hugging Face's classifier then passes over the end token like padding and
    scores at the answer's last token, whatever the padding.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        self.config = config
        self.encoder = Encoder(tokenizer, config)
        self.special_tokens = 1  # the end of the answer
        self.pad_token = self.encoder.pad_token

    def encode(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Fields]:
        prompts = [self.encoder.cut(ids) for ids in self.encoder.prompt_ids(examples)]
        rows = self.encoder.answer_ids(examples, answers)
        return [{"input_ids": prompt + row} for prompt, row in zip(prompts, rows, strict=True)]

    def lengths(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[int], list[int]]:
        prompts, rows = self.encoder.prompt_ids(examples), self.encoder.answer_ids(examples, answers)
        return [len(ids) for ids in prompts], [len(ids) - 1 for ids in rows]


class PairInputs:
    """``[CLS] prompt [SEP] answer [SEP]``, or however else the tokenizer joins a pair, for encoders."""

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        self.config = config
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "left"
        self.special_tokens: int = tokenizer.num_special_tokens_to_add(pair=True)
        self.pad_token: int = tokenizer.pad_token_id

    def encode(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Fields]:
        if not examples:
            return []
        texts = [prompt_text(example, self.tokenizer, self.config) for example in examples]
        prompts, rows = self.lengths(examples, answers)
        found = self._fields(texts, list(answers))
        for i, count in enumerate(prompts):
            if count > self.config.max_source_tokens:
                limit = self.config.max_source_tokens + rows[i] + self.special_tokens
                found[i] = self._fields([texts[i]], [answers[i]], truncation="only_first", max_length=limit)[0]
        return found

    def lengths(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[int], list[int]]:
        texts = [prompt_text(example, self.tokenizer, self.config) for example in examples]
        return self._counts(texts), self._counts(list(answers))

    def _counts(self, texts: list[str]) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return [len(ids) for ids in self.tokenizer(texts, **options)["input_ids"]] if texts else []

    def _fields(self, prompts: list[str], answers: list[str], **options: Any) -> list[Fields]:
        batch = self.tokenizer(prompts, answers, split_special_tokens=True, **options)
        names = [name for name in ("input_ids", "token_type_ids") if name in batch]
        return [{name: batch[name][i] for name in names} for i in range(len(prompts))]


def collate(rows: Sequence[Fields], pad_token: int) -> dict[str, Tensor]:
    """(N, longest) of each field, padded on the right, and the attention mask, all int64."""
    ids, mask = pad([row["input_ids"] for row in rows], pad_token)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if rows and all("token_type_ids" in row for row in rows):
        batch["token_type_ids"] = pad([row["token_type_ids"] for row in rows], 0)[0]
    return batch


def limit_pairs(examples: Sequence[Example], encoder: ScoreEncoder) -> tuple[tuple[Example, ...], LengthReport]:
    """Apply the limits to preferences: over-long prompts by their rule; pairs with an over-long answer are left out.

    Raises:
        ValueError: nothing is left.
    """
    prompts, chosen = encoder.lengths(examples, [example.columns["reference"] for example in examples])
    _, rejected = encoder.lengths(examples, [example.columns[REJECTED] for example in examples])
    config = encoder.config
    return limit_token_counts(
        examples,
        prompts,
        [max(two) for two in zip(chosen, rejected, strict=True)],
        max_source_tokens=config.max_source_tokens,
        max_target_tokens=config.max_target_tokens,
        rule=config.overlong,
    )


def margins(examples: Sequence[Example], column: str) -> list[float]:
    """The margin of each preference, from a column of numbers.

    Raises:
        ValueError: the column is missing, or a value is not a finite number of 0 or more.
    """
    found = []
    for number, example in enumerate(examples, 1):
        text = example.columns.get(column)
        if text is None:
            known = ", ".join(example.columns)
            raise ValueError(f'margin_column names "{column}", but the data have {known}.')
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ValueError(
                f'preference {number} has {text!r} as its "{column}"; margin_column needs finite numbers of 0 or more.'
            )
        found.append(value)
    return found
