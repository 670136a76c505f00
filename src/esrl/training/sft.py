"""Supervised fine-tuning: maximum likelihood (eq. 1) of answers to prompts, for decoder-only models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esrl.algorithm.log_probs import Projection
from esrl.algorithm.streams import permutation
from esrl.data.encoding import Encoder
from esrl.data.examples import Example
from esrl.models.precision import Precision, autocast
from esrl.training.accumulation import Accumulation
from esrl.training.packing import (
    PackedRows,
    causal_parts,
    pack,
    pack_rows,
    packed_log_probs,
    packed_loss,
    packs_exactly,
    vocabulary_projection,
)
from esrl.training.processes import Processes
from esrl.training.task import Update, export_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig:
    """One step of supervised fine-tuning."""

    batch_tokens: int = 8192
    """Tokens of a step over all processes, prompts and answers, without padding."""
    micro_batch_tokens: int = 4096
    """Positions in one forward pass of a process; a larger batch is accumulated. Halved when memory runs out."""
    row_tokens: int = 256
    """Examples are packed into rows of so many positions (more for a longer example); 0: a row an example. It changes
    the time a step takes, not its gradient: long rows pad less, but attention looks over whole rows on a CPU."""
    use_dropout: bool = False
    """Train with the dropout rates in the model's own configuration."""

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.row_tokens < 0:
            raise ValueError(f"row_tokens is {self.row_tokens}; it must be 0 (no packing) or more.")


class SFTTask:
    """The likelihood step for ``training.loop``: -log p of the answer tokens, end token included, prompts given.

    Args:
        model: a Hugging Face causal model, or a PEFT model around one, on its device.
        examples: within the length limits already (`data.encoding.limit_prompts`); longer prompts are cut.
        development: scored by their mean log-probability; may be empty.
        scores: further development scores, ``dev_*``: those of decoded answers, say.
        save: writes the model folder; None: model and tokenizer by ``save_pretrained``.
        precision: of matrix products.
    """

    def __init__(  # noqa: PLR0913 - the parts of a task
        self,
        model: Any,
        encoder: Encoder,
        examples: Sequence[Example],
        config: SFTConfig,
        seed: int,
        *,
        development: Sequence[Example] = (),
        scores: Callable[[], dict[str, float]] | None = None,
        save: Callable[[Path], None] | None = None,
        precision: Precision = "float32",
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.config = config
        self.seed = seed
        self.scores = scores
        self.save = save
        self.precision = precision
        self.processes = Processes()
        self.prompts, self.answers = _rows(encoder, examples)
        self.lengths = [len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]
        self.development = _rows(encoder, development)
        self.packs = config.row_tokens > 0 and packs_exactly(model)
        self.has_projection = vocabulary_projection(model) is not None
        remedy = "take a smaller model or shorter examples (prompts.max_source_tokens, max_target_tokens)."
        self.accumulation = Accumulation(model, config.micro_batch_tokens, remedy)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    @property
    def warning(self) -> str | None:
        """What the user should be told before training."""
        if self.config.row_tokens and not self.packs:
            name = self.model.config.model_type
            return f"{name} models cannot keep packed examples apart, so each takes a row of its own (row_tokens = 0)."
        return None

    def num_batches(self, epoch: int) -> int:
        return len(self._batches(epoch))

    def compute(self, epoch: int, batch: int) -> Update:
        """Forward and backward over this process's share of the batch; the denominator is its answer tokens.

        Raises:
            OutOfMemoryError: one example alone is too much.
        """
        indices = self._batches(epoch)[batch]
        mine = [indices[i] for i in self.processes.shard(len(indices))]
        self.model.train(self.config.use_dropout)
        loss, positions = self.accumulation.run(
            lambda tokens: micro_batches(self.lengths, mine, tokens, self._row_tokens), self._backward, 2
        )
        num_answer = sum(len(self.answers[i]) for i in mine)
        metrics = {
            "tokens": int(self.processes.sum(num_answer)),
            "packed_share": self._filled(mine, positions),
        }
        return Update(loss, float(num_answer), metrics, commit=list)

    def evaluate(self) -> dict[str, float]:
        """``dev_log_prob``, the mean log-probability of an answer token (nats, higher is better), and perplexity."""
        found = self.scores() if self.scores is not None else {}
        prompts, answers = self.development
        if not prompts:
            return found
        self.model.eval()
        lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
        mine = list(self.processes.shard(len(prompts)))
        total = 0.0
        with torch.no_grad():
            for bins in micro_batches(lengths, mine, self.accumulation.micro_batch_tokens, self._row_tokens):
                rows = self._on_device(pack_rows(bins, prompts, answers, self.encoder.pad_token))
                with autocast(self.model.device, self.precision):
                    log_probs = packed_log_probs(self.model, rows, self._head(), packed=self.packs)
                total += float(log_probs.double().sum())
        mean = self.processes.sum(total) / sum(map(len, answers))
        return found | {"dev_log_prob": mean, "dev_perplexity": math.exp(min(-mean, 700.0))}

    def export(self) -> dict[str, bytes]:
        return export_folder(self.save or self._save)

    def state_dict(self) -> dict[str, Any]:
        return self.accumulation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accumulation.load_state_dict(state)

    @property
    def _row_tokens(self) -> int:
        return self.config.row_tokens if self.packs else 0

    def _head(self) -> Any:
        """The projection with the weights of now; nothing is tried out again."""
        if not self.has_projection:
            return None
        layer = causal_parts(self.model)[0].get_output_embeddings()
        return Projection(layer.weight, layer.bias)

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            order = permutation(len(self.lengths), "epoch", self.seed, epoch)
            self._epoch = (epoch, fill_batches(order, self.lengths, self.config.batch_tokens))
        return self._epoch[1]

    def _filled(self, mine: Sequence[int], positions: float) -> float:
        """Real tokens of this step over the positions computed, in all processes."""
        tokens = self.processes.sum(sum(self.lengths[i] for i in mine))
        return tokens / max(1.0, self.processes.sum(positions))

    def _backward(self, bins: Sequence[Sequence[int]]) -> tuple[float, float]:
        rows = self._on_device(pack_rows(bins, self.prompts, self.answers, self.encoder.pad_token))
        with autocast(self.model.device, self.precision):
            loss = packed_loss(self.model, rows, self._head(), packed=self.packs)
        loss.backward()
        return float(loss.detach()), float(rows.tokens.numel())

    def _on_device(self, rows: PackedRows) -> PackedRows:
        device = self.model.device
        return PackedRows(
            tokens=rows.tokens.to(device), positions=rows.positions.to(device), answer=rows.answer.to(device)
        )

    def _save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.encoder.tokenizer.save_pretrained(folder)


def fill_batches(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Consecutive examples of ``order`` with at most ``max_tokens`` together; a longer one stands alone."""
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if not batches or lengths[i] > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def micro_batches(
    lengths: Sequence[int], indices: Sequence[int], max_tokens: int, row_tokens: int
) -> list[list[list[int]]]:
    """Lists of rows, each a list of examples: rows times the longest is at most ``max_tokens``, or it is one row.

    Args:
        row_tokens: the rows' capacity, at most ``max_tokens``; 0: a row an example.
    """
    if not indices:
        return []
    rows = [[i] for i in indices]
    if row_tokens:
        longest = max(lengths[i] for i in indices)
        bins = pack([lengths[i] for i in indices], max(longest, min(row_tokens, max_tokens)))
        rows = [[indices[place] for place in members] for members in bins]
    found: list[list[list[int]]] = []
    longest = 0
    for size, row in sorted(((sum(lengths[i] for i in row), row) for row in rows), reverse=True):
        if found and (len(found[-1]) + 1) * longest <= max_tokens:
            found[-1].append(row)
        else:
            found.append([row])
            longest = size
    return found


def _rows(encoder: Encoder, examples: Sequence[Example]) -> tuple[list[list[int]], list[list[int]]]:
    for number, example in enumerate(examples, 1):
        if example.reference is None:
            raise ValueError(f"example {number} has no reference; fine-tuning needs an answer for each prompt.")
    prompts = [encoder.cut(ids) for ids in encoder.prompt_ids(examples)]
    return prompts, encoder.answer_ids(examples, [example.reference or "" for example in examples])
