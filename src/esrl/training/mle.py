"""Maximum likelihood (eq. 1): the start of every RL run, and its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esrl.algorithm.log_probs import Projection, weighted_log_prob_sum
from esrl.data.batching import pad, token_batches
from esrl.data.examples import Example
from esrl.errors import OutOfMemoryError
from esrl.evaluation.development import Development
from esrl.models.precision import autocast
from esrl.models.seq2seq import MarianPolicy
from esrl.training.oom import free_cached_memory, is_out_of_memory
from esrl.training.processes import Processes
from esrl.training.task import Update, export_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodConfig:
    """One step of an encoder-decoder's maximum likelihood."""

    batch_tokens: int = 2000
    """Examples times their longest side, in a step over all processes. fairseq's IWSLT recipe: 4,096."""
    micro_batch_tokens: int = 4096
    """Tokens in one forward pass of a process; a larger batch is accumulated. Halved when memory runs out."""
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
    """The likelihood step of an encoder-decoder for ``training.loop``: -log p of the reference, label-smoothed."""

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
        self.micro_batch_tokens = config.micro_batch_tokens
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        policy.set_dropout(config.dropout)

    def num_batches(self, epoch: int) -> int:
        return len(self._batches(epoch))

    def compute(self, epoch: int, batch: int) -> Update:
        """Forward and backward over this process's share of the batch; the denominator is its target tokens.

        When memory runs out, the step begins anew with half the micro-batch, which is kept.

        Raises:
            OutOfMemoryError: one example alone is too much.
        """
        indices = self._batches(epoch)[batch]
        mine = [indices[i] for i in self.processes.shard(len(indices))]
        self.model.train(self.config.dropout > 0)
        parameters = list(self.model.parameters())
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
        while True:
            try:
                loss, num_tokens = self._accumulate(mine)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(mine, error)
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            free_cached_memory()
        metrics = {"tokens": int(self.processes.sum(num_tokens))}
        return Update(loss, float(num_tokens), metrics, commit=list)

    def evaluate(self) -> dict[str, float]:
        return self.development.evaluate(self.policy)

    def export(self) -> dict[str, bytes]:
        return export_folder(self.policy.save)

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batch_tokens": self.micro_batch_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.micro_batch_tokens = min(self.micro_batch_tokens, state.get("micro_batch_tokens", self.micro_batch_tokens))

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, token_batches(self.lengths, self.config.batch_tokens, self.seed, epoch))
        return self._epoch[1]

    def _micro_batch_size(self, indices: Sequence[int]) -> int:
        """Examples in one forward pass."""
        return max(1, self.micro_batch_tokens // max((self.lengths[i] for i in indices), default=1))

    def _halve(self, indices: Sequence[int], error: BaseException) -> None:
        size = min(self._micro_batch_size(indices), len(indices))
        if size == 1:
            raise OutOfMemoryError(
                "out of memory with one example per micro-batch; take a smaller model or shorter examples "
                "(likelihood.max_source_tokens, max_target_tokens)."
            ) from error
        self.micro_batch_tokens = size // 2 * max(self.lengths[i] for i in indices)

    def _accumulate(self, indices: Sequence[int]) -> tuple[float, int]:
        """Add the gradient of these examples to the parameters; their loss and target tokens."""
        size = self._micro_batch_size(indices)
        loss, num_tokens = 0.0, 0
        for start in range(0, len(indices), size):
            part_loss, part_tokens = self._backward(indices[start : start + size])
            loss, num_tokens = loss + part_loss, num_tokens + part_tokens
        return loss, num_tokens

    def _backward(self, indices: Sequence[int]) -> tuple[float, int]:
        device, plain = self.policy.device, self.policy.plain
        source, source_mask = pad([self.sources[i] for i in indices], self.policy.pad_token)
        target, target_mask = pad([self.targets[i] for i in indices], self.policy.pad_token)
        start = torch.full_like(target[:, :1], self.policy.start_token)
        weight, bias = plain.lm_head.weight, plain.final_logits_bias[0]
        # nothing is suppressed here: a reference may hold any token
        projection = Projection(weight, bias.to(weight.dtype))
        with autocast(device, self.policy.precision):
            output = plain.model(
                input_ids=source.to(device),
                attention_mask=source_mask.to(device),
                decoder_input_ids=torch.cat([start, target[:, :-1]], 1).to(device),
            )
            hidden: Tensor = output.last_hidden_state[target_mask.to(device)]
            loss = smoothed_loss(hidden, target[target_mask].to(device), projection, self.config.label_smoothing)
        loss.backward()
        return float(loss.detach()), int(target_mask.sum())


def smoothed_loss(hidden: Tensor, targets: Tensor, projection: Projection, smoothing: float) -> Tensor:
    """sum_n (1 - e) * -log p(y_n) + e * mean_v -log p(v), without ever holding (N, V) logits.

    Args:
        hidden: (N, D); targets: (N,).
        smoothing: e, the probability mass spread over the vocabulary.

    log p(v) = z_v - log Z, and log Z = z_y - log p(y), so the sum is that of -log p(y_n) - e * (mean_v z_v - z_y):
    the mean of the logits z is the product with the mean of the projection's rows.
    """
    loss = -weighted_log_prob_sum(hidden, targets, torch.ones_like(hidden[:, 0]), projection)
    if smoothing:
        difference = projection.weight.mean(0) - projection.weight[targets]
        margin = (hidden * difference).sum()
        if projection.bias is not None:
            margin = margin + (projection.bias.mean() - projection.bias[targets]).sum()
        loss = loss - smoothing * margin
    return loss
