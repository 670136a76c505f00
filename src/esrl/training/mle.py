"""Maximum likelihood (eq. 1): the start of every RL run, and its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from esrl.data.batching import pad, token_batches
from esrl.data.examples import Example
from esrl.evaluation.development import Development
from esrl.models.seq2seq import MarianPolicy
from esrl.training.loop import Update, export_folder
from esrl.training.processes import Processes


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodConfig:
    """One step of maximum likelihood."""

    batch_tokens: int = 2000
    """Examples times their longest side, in a step over all processes. fairseq's IWSLT recipe: 4,096."""
    micro_batch_tokens: int = 4096
    """Tokens in one forward pass of a process; a larger batch is accumulated."""
    label_smoothing: float = 0.1
    """Probability mass spread over the vocabulary."""
    dropout: float = 0.1
    """On embeddings and sub-layer outputs; fairseq's IWSLT recipe: 0.3."""
    max_source_tokens: int = 256
    """Longer pairs are left out, counted and reported."""
    max_target_tokens: int = 256
    """Likewise."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "micro_batch_tokens", "max_source_tokens", "max_target_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1).")


class MLETask:
    """The likelihood step for ``training.loop``: -log p of the reference tokens, label-smoothed."""

    def __init__(
        self,
        policy: MarianPolicy,
        examples: Sequence[Example],
        config: LikelihoodConfig,
        development: Development,
        seed: int,
    ) -> None:
        self.policy = policy
        self.model = policy.model
        self.config = config
        self.development = development
        self.seed = seed
        self.processes = Processes()
        tokenizer = policy.tokenizer
        self.sources: list[list[int]] = tokenizer([example.columns["source"] for example in examples])["input_ids"]
        self.targets: list[list[int]] = tokenizer(text_target=[e.columns["reference"] for e in examples])["input_ids"]
        self.lengths = [max(len(s), len(t)) for s, t in zip(self.sources, self.targets, strict=True)]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        policy.set_dropout(config.dropout)

    def num_batches(self, epoch: int) -> int:
        return len(self._batches(epoch))

    def compute(self, epoch: int, batch: int) -> Update:
        """Forward and backward over this process's share of the batch; the denominator is its target tokens."""
        indices = self._batches(epoch)[batch]
        mine = [indices[i] for i in self.processes.shard(len(indices))]
        size = max(1, self.config.micro_batch_tokens // max((self.lengths[i] for i in mine), default=1))
        self.model.train(self.config.dropout > 0)
        loss, num_tokens = 0.0, 0
        for start in range(0, len(mine), size):
            part_loss, part_tokens = self._backward(mine[start : start + size])
            loss, num_tokens = loss + part_loss, num_tokens + part_tokens
        metrics = {"tokens": int(self.processes.sum(num_tokens))}
        return Update(loss, float(num_tokens), metrics, commit=list)

    def evaluate(self) -> dict[str, float]:
        return self.development.evaluate(self.policy)

    def export(self) -> dict[str, bytes]:
        return export_folder(self.policy.save)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, "maximum likelihood keeps no state of its own"

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, token_batches(self.lengths, self.config.batch_tokens, self.seed, epoch))
        return self._epoch[1]

    def _backward(self, indices: Sequence[int]) -> tuple[float, int]:
        device = self.policy.device
        source, source_mask = pad([self.sources[i] for i in indices], self.policy.pad_token)
        target, target_mask = pad([self.targets[i] for i in indices], self.policy.pad_token)
        start = torch.full_like(target[:, :1], self.policy.start_token)
        output = self.model.model(
            input_ids=source.to(device),
            attention_mask=source_mask.to(device),
            decoder_input_ids=torch.cat([start, target[:, :-1]], 1).to(device),
        )
        hidden: Tensor = output.last_hidden_state[target_mask.to(device)]
        logits = self.model.lm_head(hidden) + self.model.final_logits_bias
        loss = functional.cross_entropy(
            logits,
            target[target_mask].to(device),
            reduction="sum",
            label_smoothing=self.config.label_smoothing,
        )
        loss.backward()
        return float(loss.detach()), int(target_mask.sum())
