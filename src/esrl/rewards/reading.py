"""What a reward model reads: prompt and answer as token ids, cut where they are too long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from esrl.data.encoding import PromptConfig, special_prefix
from esrl.data.examples import MESSAGES, SOURCE, Example
from esrl.data.preferences import SETTINGS, Fields, score_encoder
from esrl.rewards.common import plain_text

_MAX_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingConfig:
    """How a reward model's input is made of a prompt and an answer."""

    form: Literal["trained", "template", "chat"] = "trained"
    """`trained`: as `esrl reward-model` trains: tokens of the prompt, of the answer, and the end token; for encoders
    such as BERT the tokenizer's pair of texts. `template`: one text. `chat`: the conversation with the answer, by the
    chat template of the model's tokenizer."""
    template: str = "{prompt}{completion}"
    """The text of form `template`."""
    append_eos: bool = False
    """With form `template`: end the text with the tokenizer's EOS."""
    as_chat: bool | None = None
    """With form `trained`: whether a plain prompt is made a conversation. Unset: as in the model's training, which
    `esrl reward-model` notes in its folder (`esrl_reward.json`); without that file it is not."""
    chat_template: Literal["model", "generic"] | None = None
    """With form `trained`: how conversations become text, as `prompts.chat_template`. Unset: as in the model's
    training; without that file `model`."""
    max_tokens: int | None = None
    """A longer input loses the beginning of its prompt (BOS or CLS stays), so that the end of the answer, where the
    score is read, stays; counted as `model_truncated_share`. Unset: with form `trained`, the longest prompt and the
    longest answer of the model's training together; else, or without that file, 2048. Never more than the model has
    positions for."""

    def __post_init__(self) -> None:
        allowed = {"form": ("trained", "template", "chat"), "chat_template": ("model", "generic")}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices and (name, getattr(self, name)) != ("chat_template", None):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        if "{completion}" not in self.template:
            raise ValueError(f"template is {self.template!r}; it must hold {{completion}} (and {{prompt}}).")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be 1 or more.")


def trained_prompts(folder: Path) -> PromptConfig | None:
    """How prompts were encoded when ``esrl reward-model`` trained the model of a folder; None where that is not noted.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    file = folder / SETTINGS
    if not file.is_file():
        return None
    try:
        return PromptConfig(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} is no note of how prompts were encoded ({error}). Copy it from the run that trained the model, or "
            "delete it and set reward.model.reading."
        ) from error


class Reader:
    """Prompts and answers to a reward model's inputs.

    Args:
        positions: how many tokens the model can read.
        trained: how prompts were encoded in its training (``trained_prompts``), where that is known.

    Raises:
        ValueError: the tokenizer lacks the EOS or the chat template that the settings ask for.
    """

    def __init__(
        self, tokenizer: Any, config: ReadingConfig, positions: int, trained: PromptConfig | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        limit = _MAX_TOKENS
        self._prefix = special_prefix(tokenizer)
        if config.form == "chat" and not tokenizer.chat_template:
            raise ValueError(
                'reading.form is "chat", but the reward model\'s tokenizer has no chat template; put one into its '
                'folder (chat_template.jinja), or set reading.form = "template".'
            )
        if config.form == "template" and config.append_eos and not tokenizer.eos_token:
            raise ValueError("reading.append_eos is set, but the reward model's tokenizer has no EOS; unset it.")
        if config.form == "trained":
            known = trained or PromptConfig()
            # nothing is cut there, since the limit here is one for prompt and answer together
            whole = PromptConfig(
                chat_template=config.chat_template or known.chat_template,
                as_chat=known.as_chat if config.as_chat is None else config.as_chat,
                max_source_tokens=1 << 30,
                max_target_tokens=1 << 30,
            )
            self._encoder = score_encoder(tokenizer, whole)
            if trained is not None:
                limit = trained.max_source_tokens + trained.max_target_tokens + self._encoder.special_tokens
        self.max_tokens = min(config.max_tokens or limit, positions)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], messages: Sequence[str] | None = None
    ) -> tuple[list[Fields], int]:
        """One input for each answer, and how many of them were cut.

        Args:
            prompts: texts, or lists of chat messages; completions likewise.
            messages: conversations as JSON, the data's column of that name; an empty one is none.

        Raises:
            ValueError: an input has no token; or what ``score_encoder`` refuses.
        """
        answers = [plain_text(completion, "completion") for completion in completions]
        chats = [_conversation(prompt, messages[i] if messages else "") for i, prompt in enumerate(prompts)]
        if self.config.form == "trained":
            examples = [
                Example(str(i), {SOURCE: str(prompt)} | ({MESSAGES: json.dumps(chat)} if chat else {}))
                for i, (prompt, chat) in enumerate(zip(prompts, chats, strict=True))
            ]
            rows = self._encoder.encode(examples, answers)
        else:
            texts = [self._text(*row) for row in zip(prompts, chats, answers, strict=True)]
            special = self.config.form == "template"  # a chat template writes BOS and the like itself
            ids = self.tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
            rows = [{"input_ids": row} for row in ids]
        for answer, row in zip(answers, rows, strict=True):
            if not row["input_ids"]:
                raise ValueError(f"the reward model has nothing to read: the answer {answer[:60]!r} gives no tokens.")
        return [self._cut(row) for row in rows], sum(len(row["input_ids"]) > self.max_tokens for row in rows)

    def _text(self, prompt: Any, chat: list[dict[str, str]] | None, answer: str) -> str:
        if self.config.form == "chat":
            turns = chat or [{"role": "user", "content": str(prompt)}]
            turns = [*turns, {"role": "assistant", "content": answer}]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        # not str.format: texts and templates may hold braces of their own
        parts = self.config.template.split("{completion}")
        text = answer.join(part.replace("{prompt}", plain_text(prompt, "prompt")) for part in parts)
        return text + self.tokenizer.eos_token if self.config.append_eos else text

    def _cut(self, row: Fields) -> Fields:
        ids = row["input_ids"]
        if len(ids) <= self.max_tokens:
            return row
        kept = len(self._prefix)
        if ids[:kept] != self._prefix or kept >= self.max_tokens:
            kept = 0
        start = len(ids) - (self.max_tokens - kept)
        return {name: values[:kept] + values[start:] for name, values in row.items()}


def _conversation(prompt: Any, messages: str) -> list[dict[str, str]] | None:
    """The messages of a prompt that is a conversation."""
    if isinstance(prompt, list):
        return prompt
    return json.loads(messages) if messages else None
