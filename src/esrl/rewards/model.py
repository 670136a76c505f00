"""A reward model: any Hugging Face sequence-classification model with one label, scoring prompt and answer.

Equal texts get equal bits: the first score of a text is kept, and saved with the run. That first score may depend, by
about 1e-6 of its size in float32 (1e-2 in bfloat16), on the texts it was batched with, as in any batched forward; a
text that has left the cache is scored anew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from esrl.data.encoding import PromptConfig
from esrl.data.preferences import Fields
from esrl.rewards.cache import ScoreCache
from esrl.rewards.loading import load_reward_model
from esrl.rewards.reading import Reader, ReadingConfig, trained_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRewardConfig:
    """The reward model behind the name `model`."""

    path: Path | None = None
    """A folder as `esrl reward-model` writes it: any Hugging Face sequence-classification model with one label."""
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    """What it reads."""
    batch_tokens: int = 16384
    """Tokens, padding included, of a forward pass."""
    device: str | None = None
    """Where the model is, such as `cuda:1` or `cpu`; unset: the current accelerator, without one the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Its precision; scores are taken over as float32."""
    cache_size: int = 10_000
    """Scores kept, by text; the oldest leave first. 0: none, then a resumed run may differ in the last bits."""

    def __post_init__(self) -> None:
        for name, least in (("batch_tokens", 1), ("cache_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}; choose float32, bfloat16 or float16.")


class RewardModel:
    """Scores answers; built by ``load``.

    Args:
        model: a sequence-classification model with one label, on its device, in evaluation mode.
        fingerprint: of its files; scores of another model are not taken for its own.
        trained: how prompts were encoded in its training, where that is known.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: ModelRewardConfig,
        fingerprint: str,
        trained: PromptConfig | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.fingerprint = fingerprint
        self.cache = ScoreCache(config.cache_size)
        text_config = model.config.get_text_config()
        self.read = Reader(tokenizer, config.reading, _positions(text_config), trained)
        self._pad = text_config.pad_token_id
        if self._pad is None:
            # The score is read at the last token that is not PAD. Without one only texts of one length go together,
            # and Hugging Face asks for an id: one that no text has.
            text_config.pad_token_id = -1

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        messages: list[str] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> list[float]:
        """Score each completion as an answer to its prompt.

        Args:
            prompts: texts, or lists of chat messages; completions likewise.
            messages: the data's conversations as JSON, where it has some.

        Returns:
            the model's logits; a model that has become NaN returns NaN, which the contract refuses.
        """
        rows, truncated = self.read(prompts, completions, messages)
        keys = [_digest(row) for row in rows]
        known = self.cache.look_up(dict.fromkeys(keys))
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        scores = dict(zip(new, self.logits(list(new.values())), strict=True))
        self.cache.add(scores)
        if log_metric is not None and rows:
            log_metric("model_truncated_share", truncated / len(rows))
            log_metric("model_cached_share", sum(key in known for key in keys) / len(rows))
        known |= scores
        return [known[key] for key in keys]

    @torch.no_grad()
    def logits(self, rows: list[Fields]) -> list[float]:
        """The scores of inputs, without the cache; shortest first, at most ``batch_tokens`` at once."""
        scores = [math.nan] * len(rows)
        for part in self._batches([row["input_ids"] for row in rows]):
            logits = self.model(**self._padded([rows[index] for index in part])).logits
            for index, score in zip(part, logits[:, 0].to(torch.float32).tolist(), strict=True):
                scores[index] = score
        return scores

    def state_dict(self) -> dict[str, Any]:
        """The cached scores and what they are scores of; JSON-able."""
        return {"fingerprint": self.fingerprint, "scores": self.cache.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with cached scores, unless they are another model's."""
        self.cache.load_state_dict(state["scores"] if state["fingerprint"] == self.fingerprint else {})

    def _batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        part: list[int] = []
        for index in sorted(range(len(rows)), key=lambda index: (len(rows[index]), rows[index])):
            size = len(rows[index])
            another_length = self._pad is None and part and len(rows[part[0]]) != size
            if part and (another_length or (len(part) + 1) * size > self.config.batch_tokens):
                yield part
                part = []
            part.append(index)
        if part:
            yield part

    def _padded(self, rows: list[Fields]) -> dict[str, Tensor]:
        device, lengths = self.model.device, [len(row["input_ids"]) for row in rows]
        width, batch = max(lengths), {}
        for name in rows[0]:
            filler = self._pad or 0 if name == "input_ids" else 0
            padded = [row[name] + [filler] * (width - len(row[name])) for row in rows]
            batch[name] = torch.tensor(padded, device=device)
        ends = torch.tensor(lengths, device=device)
        return batch | {"attention_mask": (torch.arange(width, device=device) < ends[:, None]).long()}


def _digest(row: Fields) -> str:
    content = "|".join(" ".join(map(str, values)) for values in row.values())
    return hashlib.blake2b(content.encode("ascii"), digest_size=16).hexdigest()


def _positions(config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return 1 << 30
    # RoBERTa's positions start behind its PAD
    return positions - (config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0)


def load(config: ModelRewardConfig) -> RewardModel:
    """The reward model of ``config``.

    Raises:
        ValueError: no path, or see ``load_reward_model`` and ``Reader``.
    """
    if config.path is None:
        raise ValueError("reward model: model.path is not set; name the reward model's folder.")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    model, tokenizer, fingerprint = load_reward_model(config.path, dtype, _device(config.device))
    trained = trained_prompts(Path(config.path))
    try:
        return RewardModel(model, tokenizer, config, fingerprint, trained)
    except ValueError as error:
        raise ValueError(f"{config.path}: {error}") from error


def _device(name: str | None) -> torch.device:
    """The device ``name``, or the current accelerator, or the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"reward model: device is {name!r}, which cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return device
