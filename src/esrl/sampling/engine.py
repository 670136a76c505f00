"""Stage one, our engine: sample without a graph, fast (paper, "Two-stage Sampling"; method.md, section 4).

Its slow twin is ``generate.py``. What it draws depends on (seed, epoch, example id, sample) alone: waves, compaction,
batch size and the number of processes change the order of work, not the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esrl.algorithm.log_probs import MAX_LOGITS
from esrl.algorithm.streams import sample_uniforms
from esrl.errors import NumericsError
from esrl.models.policy import Policy, PromptState
from esrl.sampling.draw import Drawn, draw_tokens
from esrl.types import Prompts, Rollouts, SamplingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Limits of stage one; none of them changes what is drawn except the two on length."""

    max_new_tokens: int = 128
    """Longest sample in tokens, EOS included."""
    max_length_ratio: float | None = None
    """If set, a sample is also cut at ceil(ratio * source tokens) + 10."""
    max_cache_tokens: int = 65536
    """Rows times max_new_tokens of one wave; bounds the key/value cache whatever k_x is."""
    max_prompt_tokens: int = 16384
    """Source tokens encoded at a time, padding included."""
    compaction_share: float = 0.125
    """Finished rows are dropped from the batch once they are this share of it; 0 drops them at every step."""
    max_logits: int = MAX_LOGITS
    """Logits computed at a time."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_cache_tokens", "max_prompt_tokens", "max_logits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.max_length_ratio is not None and not self.max_length_ratio > 0:
            raise ValueError(f"max_length_ratio is {self.max_length_ratio}; it must be above 0.")
        if not 0 <= self.compaction_share <= 1:
            raise ValueError(f"compaction_share is {self.compaction_share}; it must lie in [0, 1].")


class EngineSampler:
    """Samples with our own decoder.

    Args:
        policy: the model family.
        config: limits.
        seed: of the run.
    """

    def __init__(self, policy: Policy, config: SamplingConfig, seed: int) -> None:
        if config.max_new_tokens > policy.max_length:
            raise ValueError(
                f"max_new_tokens is {config.max_new_tokens}, but the model has {policy.max_length} positions."
            )
        self.policy = policy
        self.config = config
        self.seed = seed

    @torch.no_grad()
    def sample(self, prompts: Prompts, plan: SamplingPlan, epoch: int = 0, records: tuple[str, ...] = ()) -> Rollouts:
        """Draw ``plan.num_samples[x]`` sequences for each prompt x at ``plan.temperature[x]``.

        Args:
            records: what to record per token besides the log-probabilities: "entropy", "max_prob".

        Raises:
            NumericsError: the model gave a log-probability that is not finite.
        """
        with _without_dropout(self.policy.model):
            waves = [
                self._wave(state, prompts, plan, rows, epoch, records)
                for state, all_rows in self._encoded(prompts, plan)
                for rows in self._waves(all_rows)
            ]
        rollouts = self._collect(waves, records)
        check_log_probs(rollouts.log_probs, rollouts.prompt_index, prompts)
        check_log_probs(rollouts.sampling_log_probs, rollouts.prompt_index, prompts)
        return rollouts

    def _encoded(self, prompts: Prompts, plan: SamplingPlan) -> Iterator[tuple[PromptState, _Rows]]:
        """Encode the prompts part by part; each part comes with its rows."""
        counts = plan.num_samples.tolist()
        used = [i for i, count in enumerate(counts) if count > 0]
        size = max(1, self.config.max_prompt_tokens // max(1, prompts.mask.shape[1]))
        for start in range(0, len(used), size):
            part = used[start : start + size]
            state = self.policy.encode(prompts.select(part))
            local = torch.tensor([j for j, i in enumerate(part) for _ in range(counts[i])], dtype=torch.int64)
            sample = torch.tensor([s for i in part for s in range(counts[i])], dtype=torch.int64)
            yield state, _Rows(local, torch.tensor(part, dtype=torch.int64)[local], sample)

    def _waves(self, rows: _Rows) -> Iterator[_Rows]:
        size = max(1, self.config.max_cache_tokens // self.config.max_new_tokens)
        for start in range(0, len(rows.prompt), size):
            part = slice(start, start + size)
            yield _Rows(rows.local[part], rows.prompt[part], rows.sample[part])

    def limits(self, prompts: Prompts, prompt_index: Tensor) -> Tensor:
        """(R,) longest sample of each row, in tokens."""
        limits = torch.full_like(prompt_index, self.config.max_new_tokens)
        if self.config.max_length_ratio is None:
            return limits
        lengths = prompts.mask.sum(1).cpu()[prompt_index].tolist()
        ratio = self.config.max_length_ratio
        return limits.minimum(torch.tensor([math.ceil(ratio * length) + 10 for length in lengths]))

    def _wave(
        self,
        state: PromptState,
        prompts: Prompts,
        plan: SamplingPlan,
        rows: _Rows,
        epoch: int,
        records: tuple[str, ...],
    ) -> _Wave:
        """Decode rows until all have ended; a row's number in the batch is looked up in ``alive``."""
        policy, device, config = self.policy, self.policy.device, self.config
        limits = self.limits(prompts, rows.prompt)
        steps = int(limits.max())
        temperature = plan.temperature[rows.prompt].to(device)
        greedy = bool((temperature == 0).all())
        ids = [prompts.example_ids[i] for i in rows.prompt.tolist()]
        uniforms = (
            torch.zeros(len(ids), steps, dtype=torch.float64)
            if greedy
            else sample_uniforms(self.seed, epoch, ids, rows.sample.tolist(), steps)
        ).to(device)
        output = _Wave(rows, len(ids), steps, records, state.keys[0].dtype, device)
        # encoded parts may be larger than a wave: take this wave's prompts only
        used, local = torch.unique_consecutive(rows.local.to(device), return_inverse=True)
        state = state if len(used) == state.mask.shape[0] else state.select(used)
        decoder, projection = policy.decoder(state, local), policy.projection()
        alive = torch.arange(len(ids), device=device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=device)
        tokens = torch.full((len(ids),), policy.start_token, device=device)
        eos, limits = torch.tensor(policy.eos_tokens, device=device), limits.to(device)
        for position in range(steps):
            hidden = decoder.step(tokens)
            drawn = draw_tokens(
                hidden, projection, temperature[alive], uniforms[alive, position], records, config.max_logits
            )
            ended = torch.isin(drawn.tokens, eos)
            output.write(position, alive, ~done, drawn, ended)
            done |= ended | (limits[alive] == position + 1)
            num_done = int(done.sum())
            if num_done == len(alive):
                break
            tokens = drawn.tokens
            if num_done and num_done >= config.compaction_share * len(alive):
                left = (~done).nonzero()[:, 0]
                decoder.keep(left)
                alive, tokens = alive[left], tokens[left]
                done = torch.zeros_like(alive, dtype=torch.bool)
        return output

    def _collect(self, waves: list[_Wave], records: tuple[str, ...]) -> Rollouts:
        """Join the waves, cut to the longest sample, decode to text."""
        width = max((wave.width for wave in waves), default=1)
        cpu = torch.device("cpu")

        def join(name: str) -> Tensor:
            parts = [wave.tensors[name][:, :width] for wave in waves]
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
            return torch.cat(parts) if parts else torch.empty(0, width)

        mask, tokens = join("mask").bool(), join("tokens").long()
        rollouts = Rollouts(
            prompt_index=torch.cat([wave.rows.prompt for wave in waves]) if waves else torch.empty(0, dtype=torch.long),
            sample_index=torch.cat([wave.rows.sample for wave in waves]) if waves else torch.empty(0, dtype=torch.long),
            tokens=tokens,
            mask=mask,
            finished=torch.cat([wave.finished for wave in waves]) if waves else torch.empty(0, dtype=torch.bool),
            log_probs=join("log_probs"),
            sampling_log_probs=join("sampling_log_probs"),
            texts=decode_texts(self.policy, tokens.to(cpu), mask.to(cpu)),
            records={name: join(name) for name in records},
        )
        return rollouts


@dataclass(frozen=True, slots=True)
class _Rows:
    local: Tensor  # (R,) prompt within the encoded part
    prompt: Tensor  # (R,) prompt within the batch
    sample: Tensor  # (R,)


class _Wave:
    """The output of one wave, filled position by position."""

    def __init__(
        self,
        rows: _Rows,
        num_rows: int,
        steps: int,
        records: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.width = 1
        self.finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        values = {name: torch.zeros(num_rows, steps, dtype=_accumulate(dtype), device=device) for name in records}
        for name in ("log_probs", "sampling_log_probs"):
            values[name] = torch.zeros(num_rows, steps, dtype=_accumulate(dtype), device=device)
        values["tokens"] = torch.zeros(num_rows, steps, dtype=torch.int64, device=device)
        values["mask"] = torch.zeros(num_rows, steps, dtype=torch.bool, device=device)
        self.tensors = values

    def write(self, position: int, alive: Tensor, real: Tensor, drawn: Drawn, ended: Tensor) -> None:
        """Store what the rows that have not ended drew at this position."""
        self.width = position + 1
        column = {
            "tokens": drawn.tokens * real,
            "mask": real,
            "log_probs": torch.where(real, drawn.log_probs, 0.0),
            "sampling_log_probs": torch.where(real, drawn.sampling_log_probs, 0.0),
        }
        column |= {name: torch.where(real, values, 0.0) for name, values in drawn.records.items()}
        for name, values in column.items():
            self.tensors[name][alive, position] = values
        self.finished[alive] |= ended & real


def check_log_probs(log_probs: Tensor, prompt_index: Tensor, prompts: Prompts) -> None:
    """Refuse (R, T) log-probabilities that are not finite, naming the first one's example."""
    bad = ~torch.isfinite(log_probs)
    if bool(bad.any()):
        row, position = bad.nonzero()[0].tolist()
        i = int(prompt_index[row])
        source = prompts.columns.get("source", [""] * len(prompts))[i]
        raise NumericsError(
            f"the log-probability of token {position} of a sample of example {prompts.example_ids[i]} "
            f"({source[:60]!r}) is {float(log_probs[row, position])}; the model's weights or logits are not finite or "
            "overflow. Lower the learning rate, or start from another model."
        )


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout is stage two's: here it would make the encoder's states, and so the draws, depend on the batch."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def decode_texts(policy: Policy, tokens: Tensor, mask: Tensor) -> tuple[str, ...]:
    """Detokenize (R, T) rows; special tokens are left out."""
    lengths = mask.sum(1).tolist()
    ids = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    if not ids:  # the tokenizer makes one empty text of no rows
        return ()
    return tuple(policy.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
