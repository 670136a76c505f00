"""Reward models: a score for an answer to a prompt, learnt from pairs of a better and a worse one.

The loss of a pair (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1), with an optional margin m (Touvron et al. 2023,
eq. 2) and a term that centres rewards at 0 (Eisenstein et al. 2023):

    -log sigmoid(r_chosen - r_rejected - m) + centering * (r_chosen + r_rejected)^2
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from esrl.algorithm.streams import seed_of
from esrl.data.batching import shuffled_batches
from esrl.data.examples import REJECTED, Example
from esrl.data.preferences import SETTINGS, Fields, ScoreEncoder, collate, margins
from esrl.evaluation.reward_model import PreferenceReport, preference_report
from esrl.models.adapters import ADAPTER_CONFIG, LoraSettings
from esrl.models.classifier_adapters import adapt_classifier, save_merged
from esrl.models.precision import Precision, autocast
from esrl.training.accumulation import Accumulation
from esrl.training.processes import Processes
from esrl.training.task import Update, export_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PairwiseConfig:
    """One step of reward-model training."""

    batch_size: int = 64
    """Pairs of a step over all processes; Ouyang et al. (2022) use 64 prompts."""
    micro_batch_tokens: int = 8192
    """Answers times the longest of them in one forward pass of a process. Halved when memory runs out."""
    margin: float = 0.0
    """What the chosen reward should lead by, for all pairs."""
    margin_column: str | None = None
    """The data's column with each pair's own margin, which is added."""
    centering: float = 0.0
    """Weight of the squared sum of both rewards; 0.01 in Eisenstein et al. (2023)."""
    use_dropout: bool = False
    """Train with the dropout rates in the model's own configuration."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("margin", "centering"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more and finite.")


def load_classifier(
    path: str | Path, seed: int, dtype: torch.dtype = torch.float32, lora: LoraSettings | None = None
) -> tuple[Any, Any]:
    """A sequence classifier with one label, and its tokenizer, from any model folder or hub name.

    A folder without such a head gets a new one, whose weights the seed decides.

    Args:
        lora: new adapters, whose first weights the seed decides, too; they and the head are trained. None: all weights.

    Raises:
        ValueError: a classifier with another number of labels, a kind of model that has no classifier, adapters without
            their base, or see `adapt_classifier`.
    """
    if (Path(path) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{path}: this holds adapters, no whole model; join them with their base: `esrl merge`.")
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"{path}: no model folder with a tokenizer ({_one_line(error)}); check the path.") from error
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if is_classifier and config.num_labels != 1:
        raise ValueError(
            f"{path} classifies into {config.num_labels} labels, but a reward model gives one score; start from the "
            "language model beneath it, or from a classifier with num_labels = 1."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("reward head", seed))
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: no readable safetensors weights ({_one_line(error)}).") from error
        except ValueError as error:
            raise ValueError(f"{path}: {config.model_type} models have no classifier ({_one_line(error)}).") from error
        # a head may be new, a layer may not: Hugging Face would go on with random weights
        if layers := sorted(str(key) for key in report["missing_keys"] if re.search(r"\.\d+\.", str(key))):
            raise ValueError(
                f"{path}: config.json and the weights do not belong together: {len(layers)} tensors of layers are "
                f"missing, the first is {layers[0]}. Take both from the same save_pretrained."
            )
        model.config.problem_type = "regression"
        if lora is not None:
            new = {str(key).rpartition(".")[0] for key in report["missing_keys"]}
            model = adapt_classifier(model, lora, new)
    return model, tokenizer


class RewardModelTask:
    """The pairwise step for ``training.loop``.

    Args:
        model: a Hugging Face sequence classifier with one label, or a PEFT model around one, on its device.
        examples: preferences (format ``preferences``), within the length limits (`data.preferences.limit_pairs`).
        development: preferences to report on; may be empty.
        precision: of matrix products.
    """

    def __init__(  # noqa: PLR0913 - the parts of a task
        self,
        model: Any,
        tokenizer: Any,
        encoder: ScoreEncoder,
        examples: Sequence[Example],
        config: PairwiseConfig,
        seed: int,
        *,
        development: Sequence[Example] = (),
        precision: Precision = "float32",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.config = config
        self.seed = seed
        self.precision = precision
        self.processes = Processes()
        set_padding(model, tokenizer, encoder.pad_token)
        self.chosen, self.rejected = _sides(examples, encoder)
        self.sizes = [max(len(c["input_ids"]), len(r["input_ids"])) for c, r in zip(*self._sides, strict=True)]
        own = margins(examples, config.margin_column) if config.margin_column else [0.0] * len(examples)
        self.margins = [config.margin + margin for margin in own]
        self.development = development
        remedy = "take a smaller model or shorter pairs (prompts.max_source_tokens, max_target_tokens)."
        self.accumulation = Accumulation(model, config.micro_batch_tokens, remedy)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def num_batches(self, epoch: int) -> int:
        return len(self._batches(epoch))

    def compute(self, epoch: int, batch: int) -> Update:
        """Forward and backward over this process's share of the pairs; the denominator is their number.

        Raises:
            OutOfMemoryError: one pair alone is too much.
        """
        indices = self._batches(epoch)[batch]
        mine = [indices[i] for i in self.processes.shard(len(indices))]
        self.model.train(self.config.use_dropout)
        loss, right, margin = self.accumulation.run(lambda tokens: self._split(mine, tokens), self._backward, 3)
        count = self.processes.sum(len(mine))
        metrics = {
            "pairs": int(count),
            "accuracy": self.processes.sum(right) / count,
            "margin": self.processes.sum(margin) / count,
        }
        return Update(loss, float(len(mine)), metrics, commit=list)

    def evaluate(self) -> dict[str, float]:
        """``dev_accuracy``, ``dev_ece``, ``dev_accuracy_chosen_shorter``, ``dev_length_accuracy`` and more."""
        report = self.report()
        return {} if report is None else report.scores()

    def report(self) -> PreferenceReport | None:
        """The development pairs in full, reliability bins included; None without any."""
        if not self.development:
            return None
        pairs = list(self.development)
        mine = [pairs[i] for i in self.processes.shard(len(pairs))]
        limit = self.accumulation.micro_batch_tokens
        with autocast(self.model.device, self.precision):
            sides = [score_rows(self.model, rows, self.encoder.pad_token, limit) for rows in _sides(mine, self.encoder)]
        rewards = [self.processes.gather(side) for side in sides]
        _, chosen_tokens = self.encoder.lengths(pairs, [pair.columns["reference"] for pair in pairs])
        _, rejected_tokens = self.encoder.lengths(pairs, [pair.columns[REJECTED] for pair in pairs])
        return preference_report(rewards[0], rewards[1], chosen_tokens, rejected_tokens)

    def export(self) -> dict[str, bytes]:
        return export_folder(self._export)

    def state_dict(self) -> dict[str, Any]:
        return self.accumulation.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accumulation.load_state_dict(state)

    @property
    def _sides(self) -> tuple[list[Fields], list[Fields]]:
        return self.chosen, self.rejected

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, shuffled_batches(len(self.chosen), self.config.batch_size, self.seed, epoch))
        return self._epoch[1]

    def _split(self, indices: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Pairs of like length together: twice their number times their longest answer is at most ``max_tokens``."""
        parts: list[list[int]] = []
        for i in sorted(indices, key=lambda i: -self.sizes[i]):
            if parts and 2 * (len(parts[-1]) + 1) * self.sizes[parts[-1][0]] <= max_tokens:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    def _backward(self, indices: Sequence[int]) -> tuple[float, float, float]:
        rows = [side[i] for side in self._sides for i in indices]
        with autocast(self.model.device, self.precision):
            rewards = rewards_of(self.model, collate(rows, self.encoder.pad_token))
        chosen, rejected = rewards.view(2, -1)
        margin = torch.tensor([self.margins[i] for i in indices], dtype=rewards.dtype, device=rewards.device)
        loss = pairwise_loss(chosen, rejected, margin, self.config.centering)
        loss.backward()
        lead = (chosen - rejected).detach()
        return float(loss.detach()), float((lead.sign() + 1).sum() / 2), float(lead.sum())

    def _export(self, folder: Path) -> None:
        if hasattr(self.model, "peft_config"):
            save_merged(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = asdict(self.encoder.config)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centering: float = 0.0) -> Tensor:
    """sum over pairs of -log sigmoid(r_c - r_r - m) + centering * (r_c + r_r)^2.

    Args:
        chosen, rejected: (N,) rewards; margin: (N,) or one for all.
    """
    loss = -functional.logsigmoid(chosen - rejected - margin).sum()
    if centering:
        loss = loss + centering * (chosen + rejected).square().sum()
    return loss


def rewards_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(N,) scores of a padded batch, in at least float32."""
    logits: Tensor = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
    scores = logits[:, 0]
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Fields], pad_token: int, max_tokens: int) -> list[float]:
    """The reward of each row, without dropout; rows of like length go together."""
    training = model.training
    model.eval()
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    while order:
        count = max(1, max_tokens // len(rows[order[0]]["input_ids"]))
        part, order = order[:count], order[count:]
        values = rewards_of(model, collate([rows[i] for i in part], pad_token)).tolist()
        for i, value in zip(part, values, strict=True):
            found[i] = value
    model.train(training)
    return found


def set_padding(model: Any, tokenizer: Any, pad_token: int) -> None:
    """Tell model and tokenizer what padding is: a causal classifier looks for the last token that is something else."""
    model.config.pad_token_id = pad_token
    model.config.get_text_config().pad_token_id = pad_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token)


def _sides(examples: Sequence[Example], encoder: ScoreEncoder) -> tuple[list[Fields], list[Fields]]:
    for number, example in enumerate(examples, 1):
        if REJECTED not in example.columns or example.reference is None:
            raise ValueError(
                f"example {number} is no preference; a reward model learns from prompt, chosen and rejected: set "
                'data.format = "preferences".'
            )
    answers = ([e.columns["reference"] for e in examples], [e.columns[REJECTED] for e in examples])
    return encoder.encode(examples, answers[0]), encoder.encode(examples, answers[1])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
