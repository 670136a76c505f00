"""Token ids of prompts and answers for causal models.

A row is ``prompt ids + answer ids + end token``. Prompt and answer are tokenized *separately*: the prompt's ids are the
same with and without its answer, in training as in sampling, where the model has to begin the answer behind just these
ids. What a tokenizer puts in front of any text (BOS) comes once, in front of the prompt; what it puts behind (an EOS)
is left out there. A chat template writes such tokens itself, so that nothing is added to its text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from esrl.data.batching import pad
from esrl.data.examples import MESSAGES, Example, LengthReport, limit_token_counts
from esrl.data.templates import generic_chat
from esrl.types import Prompts

_PROBE = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """How prompts and answers become token ids of a causal model."""

    chat_template: Literal["model", "generic"] = "model"
    """For conversations: the tokenizer's own chat template, or the generic text ("### User:", ...)."""
    as_chat: bool = False
    """Make a plain-text prompt the one user message of a conversation, as chat models expect."""
    max_source_tokens: int = 512
    """Longest prompt; what happens to longer ones says `overlong`."""
    max_target_tokens: int = 512
    """Longest answer, end token included (of a reward model's pairs: without it); examples with longer ones are left
    out, counted and reported."""
    overlong: Literal["skip", "truncate_left"] = "skip"
    """Leave examples with longer prompts out, or drop the prompt's beginning (BOS stays); counted either way."""

    def __post_init__(self) -> None:
        for name in ("max_source_tokens", "max_target_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.chat_template not in ("model", "generic"):
            raise ValueError(f'chat_template is {self.chat_template!r}; it must be "model" or "generic".')
        if self.overlong not in ("skip", "truncate_left"):
            raise ValueError(f'overlong is {self.overlong!r}; it must be "skip" or "truncate_left".')


class Encoder:
    """Examples to token ids with a Hugging Face tokenizer, which is not changed.

    Attributes:
        prefix: what the tokenizer puts in front of a text: BOS, or nothing.
        end_token: what ends a plain answer: EOS.
        chat_end_token: what ends an answer in a conversation: the chat template's end of turn, or EOS. A sampler must
            take both as ends.
        pad_token: PAD, or EOS where there is none; masks tell padding from text, never this id.

    Raises:
        ValueError: the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so no answer could end; set eos_token in its folder.")
        self.tokenizer = tokenizer
        self.config = config
        self.prefix = special_prefix(tokenizer)
        self.end_token: int = tokenizer.eos_token_id
        self.pad_token: int = self.end_token if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        has_template = config.chat_template == "model" and tokenizer.chat_template
        self.chat_end_token = self._end_of_turn() if has_template else self.end_token

    def prompt_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Ids of whole prompts, over-long ones included.

        Raises:
            ValueError: a prompt without any token: there would be nothing to predict the answer from.
        """
        rows = self._tokenize([prompt_text(example, self.tokenizer, self.config) for example in examples])
        for i, example in enumerate(examples):
            if not (is_chat(example, self.config) and self.config.chat_template == "model"):
                rows[i] = self.prefix + rows[i]
            if not rows[i]:
                raise ValueError(f"example {example.id} has a prompt without tokens ({example.source!r}); remove it.")
        return rows

    def cut(self, ids: list[int]) -> list[int]:
        """At most ``max_source_tokens`` ids: a leading BOS, and as much of the end as fits."""
        limit = self.config.max_source_tokens
        if len(ids) <= limit:
            return ids
        prefix = self.prefix if ids[: len(self.prefix)] == self.prefix and len(self.prefix) < limit else []
        return prefix + ids[len(ids) - (limit - len(prefix)) :]

    def answer_ids(self, examples: Sequence[Example], answers: Sequence[str]) -> list[list[int]]:
        """Ids of answers to these prompts, each with its end token.

        Control tokens written out in an answer are text: a literal EOS within it does not become one.
        """
        rows = self._tokenize(list(answers), split_special_tokens=True)
        ends = [self.chat_end_token if is_chat(example, self.config) else self.end_token for example in examples]
        return [[*row, end] for row, end in zip(rows, ends, strict=True)]

    def _tokenize(self, texts: list[str], **options: Any) -> list[list[int]]:
        # the tokenizer takes no empty batch
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, **options)["input_ids"] if texts else []
        return rows

    def _end_of_turn(self) -> int:
        """The first special token that the template writes behind an answer; EOS where it writes none."""
        _, _, behind = _render(self.tokenizer, _PROBE).rpartition(_PROBE[1]["content"])
        special = {int(i) for i in self.tokenizer.all_special_ids} | set(self.tokenizer.added_tokens_decoder)
        found = [token for token in self._tokenize([behind])[0] if token in special]
        return found[0] if found else self.end_token


def is_chat(example: Example, config: PromptConfig) -> bool:
    """Whether the example is read as a conversation."""
    return config.as_chat or bool(example.columns.get(MESSAGES))  # empty where other examples have some


def prompt_text(example: Example, tokenizer: Any, config: PromptConfig) -> str:
    """The prompt as text, template applied; BOS is in it only where a chat template writes it.

    Raises:
        ValueError: a conversation, and the tokenizer has no chat template.
    """
    if not is_chat(example, config):
        return example.source
    messages = [{"role": "user", "content": example.source}]
    if example.columns.get(MESSAGES):
        messages = json.loads(example.columns[MESSAGES])
    if config.chat_template == "generic":
        return generic_chat(messages)
    if not tokenizer.chat_template:
        raise ValueError(
            "the data are conversations, but the tokenizer has no chat template. Put one into the model's folder "
            '(chat_template.jinja), or set chat_template = "generic".'
        )
    return _render(tokenizer, messages, add_generation_prompt=True)


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts in front of any text, such as BOS."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if starts and bare else []


def make_causal_prompts(examples: Sequence[Example], encoder: Encoder) -> Prompts:
    """Tokenize prompts, padded on the right; one longer than ``max_source_tokens`` loses its beginning."""
    input_ids, mask = pad([encoder.cut(ids) for ids in encoder.prompt_ids(examples)], encoder.pad_token)
    names = examples[0].columns if examples else ()
    return Prompts(
        example_ids=tuple(example.id for example in examples),
        input_ids=input_ids,
        mask=mask,
        columns={name: [example.columns[name] for example in examples] for name in names},
    )


def within_positions(config: PromptConfig, positions: int | None) -> PromptConfig:
    """The settings with a prompt limit that leaves ``max_target_tokens`` of the model's positions (None: no limit).

    Raises:
        ValueError: that leaves nothing for a prompt.
    """
    if positions is None or config.max_source_tokens + config.max_target_tokens <= positions:
        return config
    if positions <= config.max_target_tokens:
        raise ValueError(
            f"max_target_tokens is {config.max_target_tokens}, but the model has {positions} positions for prompt and "
            "answer together; lower max_target_tokens."
        )
    return replace(config, max_source_tokens=positions - config.max_target_tokens)


def limit_prompts(
    examples: Sequence[Example], encoder: Encoder, *, with_answers: bool
) -> tuple[tuple[Example, ...], LengthReport]:
    """Apply the rule for over-long prompts and, for training on them, answers; everything is counted.

    Args:
        with_answers: whether answers count; reinforcement learning samples its own.

    Raises:
        ValueError: nothing is left.
    """
    config = encoder.config
    answers = [example.reference or "" for example in examples]
    return limit_token_counts(
        examples,
        [len(ids) for ids in encoder.prompt_ids(examples)],
        [len(ids) for ids in encoder.answer_ids(examples, answers)] if with_answers else None,
        max_source_tokens=config.max_source_tokens,
        max_target_tokens=config.max_target_tokens if with_answers else None,
        rule=config.overlong,
    )
