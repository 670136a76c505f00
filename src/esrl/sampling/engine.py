"""Stage one, our engine: sample without a graph, fast (paper, "Two-stage Sampling"; method.md, section 4).

Its slow twin is ``generate.py``. What it draws depends on (seed, epoch, example id, sample) alone: waves, compaction,
batch size and the number of processes change the order of work, not the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from esrl.algorithm.streams import sample_uniforms
from esrl.errors import NumericsError
from esrl.models.policy import FrozenDecoder, Policy, PromptState
from esrl.models.precision import autocast
from esrl.sampling.draw import Drawn, Temperature, draw_tokens
from esrl.types import Prompts, Rollouts, SamplingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Limits of stage one; none of them changes what is drawn except the two on length."""

    max_new_tokens: int = 128
    """Longest sample in tokens, EOS included."""
    max_length_ratio: float | None = None
    """If set, a sample is also cut at ceil(ratio * source tokens) + 10."""
    max_cache_tokens: int | None = None
    """Rows times max_new_tokens of one wave; bounds the key/value cache whatever k_x is. Unset: 20,480 on CPUs, 524,288
    on CUDA."""
    max_prompt_tokens: int = 16384
    """Source tokens encoded at a time, padding included."""
    compaction_share: float = 0.125
    """Finished rows are dropped from the batch once they are about this share of it; 0 drops them as soon as can be."""
    max_logits: int | None = None
    """Logits computed at a time. Unset: on CPUs 1,048,576, so that they stay in the cache, but those of 16 rows at
    least; 67,108,864 on CUDA."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_cache_tokens", "max_prompt_tokens", "max_logits"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.max_length_ratio is not None and not self.max_length_ratio > 0:
            raise ValueError(f"max_length_ratio is {self.max_length_ratio}; it must be above 0.")
        if not 0 <= self.compaction_share <= 1:
            raise ValueError(f"compaction_share is {self.compaction_share}; it must lie in [0, 1].")


@dataclass(frozen=True, slots=True)
class _Limits:
    """What is left to the device where the configuration does not say it."""

    cache_tokens: int
    logits: int
    check_steps: int  # steps between two looks at how many rows have ended: each look waits for the device

    @classmethod
    def of(cls, config: SamplingConfig, policy: Policy) -> _Limits:
        cuda = policy.device.type == "cuda"
        return cls(
            cache_tokens=config.max_cache_tokens or (1 << 19 if cuda else 5 << 12),
            logits=config.max_logits or (1 << 26 if cuda else max(1 << 20, 16 * policy.vocabulary)),
            check_steps=8 if cuda else 1,
        )


@dataclass(frozen=True, slots=True)
class _Request:
    """One call of ``sample``."""

    prompts: Prompts
    plan: SamplingPlan
    epoch: int
    records: tuple[str, ...]
    limits: _Limits


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
        limits = _Limits.of(self.config, self.policy)
        # the decoder has its own copies of the weights
        in_precision = autocast(self.policy.device, self.policy.precision, keep=False)
        with _without_dropout(self.policy.model), in_precision:
            request = _Request(prompts, plan, epoch, records, limits)
            waves: list[_Wave] = []
            decoder: FrozenDecoder | None = None
            for state, rows in self._encoded(prompts, plan):
                # after the encoder, whose laid-out weights are gone by then
                decoder = decoder or self.policy.frozen_decoder()
                waves += [self._wave(request, decoder, state, part) for part in self._waves(rows, limits)]
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

    def _waves(self, rows: _Rows, limits: _Limits) -> Iterator[_Rows]:
        most = max(1, limits.cache_tokens // self.config.max_new_tokens)
        num_waves = -(-len(rows.prompt) // most)
        size = -(-len(rows.prompt) // num_waves)  # equal ones: a last one of few rows takes as many steps
        for start in range(0, len(rows.prompt), size):
            part = slice(start, start + size)
            yield _Rows(rows.local[part], rows.prompt[part], rows.sample[part])

    def limits(self, prompts: Prompts, prompt_index: Tensor) -> Tensor:
        """(R,) longest sample of each row, in tokens."""
        room = self.policy.room(prompts)[prompt_index]
        limits = room.clamp_max(self.config.max_new_tokens)
        if self.config.max_length_ratio is None:
            return limits
        lengths = prompts.mask.sum(1).cpu()[prompt_index].tolist()
        ratio = self.config.max_length_ratio
        return limits.minimum(torch.tensor([math.ceil(ratio * length) + 10 for length in lengths]))

    def _wave(self, request: _Request, frozen: FrozenDecoder, state: PromptState, rows: _Rows) -> _Wave:
        """Decode rows until all have ended; ``alive`` holds the rows that are still in the batch."""
        device, config = self.policy.device, self.config
        limits = self.limits(request.prompts, rows.prompt)
        steps = int(limits.max())
        temperature = Temperature.of(request.plan.temperature[rows.prompt])
        uniforms = self._uniforms(request, rows, 0 if temperature.greedy else steps).to(device)
        temperature = replace(temperature, values=temperature.values.to(device))
        output = _Wave(rows, steps, request.records, state.keys[0].dtype, device)
        # encoded parts may be larger than a wave: take this wave's prompts only
        used, local = torch.unique_consecutive(rows.local.to(device), return_inverse=True)
        state = state if len(used) == state.mask.shape[0] else state.select(used)
        decoder, projection = frozen.start(state, local), frozen.projection
        alive = torch.arange(len(local), device=device)
        done = torch.zeros(len(local), dtype=torch.bool, device=device)
        tokens = self.policy.start_tokens(request.prompts)[rows.prompt].to(device)
        eos = torch.tensor(self.policy.eos_tokens, device=device)
        cuts = None if bool((limits == steps).all()) else limits.to(device)
        for position in range(steps):
            hidden = decoder.step(tokens)
            numbers = uniforms[0 if temperature.greedy else position]
            drawn = draw_tokens(hidden, projection, temperature, numbers, request.records, request.limits.logits)
            tokens = drawn.tokens
            ended = tokens == eos if len(eos) == 1 else torch.isin(tokens, eos)
            output.append(drawn, ~done, ended)
            done = done | ended if cuts is None else done | ended | (cuts == position + 1)
            if (position + 1) % request.limits.check_steps:
                continue
            num_done = int(done.sum())
            if num_done == len(alive):
                break
            size = _batch_size(len(alive) - num_done)
            if size < len(alive) and size <= (1 - config.compaction_share) * len(alive):
                left = _survivors(done, size)
                decoder.keep(left)
                output.flush(alive)
                alive, tokens, done, temperature = alive[left], tokens[left], done[left], temperature.rows(left)
                uniforms, cuts = uniforms[:, left], None if cuts is None else cuts[left]
        output.flush(alive)
        return output

    def _uniforms(self, request: _Request, rows: _Rows, steps: int) -> Tensor:
        """(steps, R), or (1, R) zeros where nothing is drawn."""
        if not steps:
            return torch.zeros(1, len(rows.prompt), dtype=torch.float64)
        ids = [request.prompts.example_ids[i] for i in rows.prompt.tolist()]
        return sample_uniforms(self.seed, request.epoch, ids, rows.sample.tolist(), steps).T.contiguous()

    def _collect(self, waves: list[_Wave], records: tuple[str, ...]) -> Rollouts:
        """Join the waves, cut to the longest sample, decode to text."""
        width = max((int(wave.tensors["mask"].sum(1).max()) for wave in waves), default=1)
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
    """The output of one wave. What is drawn is kept position by position, and put in place when rows leave."""

    def __init__(
        self, rows: _Rows, steps: int, records: tuple[str, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        num_rows = len(rows.prompt)
        self.rows = rows
        self.finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        values = {name: torch.zeros(num_rows, steps, dtype=_accumulate(dtype), device=device) for name in records}
        for name in ("log_probs", "sampling_log_probs"):
            values[name] = torch.zeros(num_rows, steps, dtype=_accumulate(dtype), device=device)
        values["tokens"] = torch.zeros(num_rows, steps, dtype=torch.int64, device=device)
        values["mask"] = torch.zeros(num_rows, steps, dtype=torch.bool, device=device)
        self.tensors = values
        self.written = 0  # positions
        self.waiting: list[tuple[Drawn, Tensor, Tensor]] = []

    def append(self, drawn: Drawn, real: Tensor, ended: Tensor) -> None:
        """One position: what was drawn, for which rows it counts, which of them it ends."""
        self.waiting.append((drawn, real, ended))

    def flush(self, alive: Tensor) -> None:
        """Put the positions since the last flush in place; ``alive`` are the rows they belong to."""
        if not self.waiting:
            return
        drawn = [entry[0] for entry in self.waiting]
        real = torch.stack([entry[1] for entry in self.waiting], 1)
        ended = torch.stack([entry[2] for entry in self.waiting], 1)
        columns = {
            "tokens": [values.tokens for values in drawn],
            "log_probs": [values.log_probs for values in drawn],
            "sampling_log_probs": [values.sampling_log_probs for values in drawn],
        }
        columns |= {name: [values.records[name] for values in drawn] for name in drawn[0].records}
        positions = slice(self.written, self.written + len(drawn))
        for name, values in columns.items():
            self.tensors[name][alive, positions] = torch.where(real, torch.stack(values, 1), 0)
        self.tensors["mask"][alive, positions] = real
        self.finished[alive] |= (ended & real).any(1)
        self.written += len(drawn)
        self.waiting = []


def _batch_size(rows: int) -> int:
    """A size for so many rows; few different ones, since oneDNN makes a new kernel for each (docs/performance.md)."""
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def _survivors(done: Tensor, size: int) -> Tensor:
    """``size`` rows with all that have not ended: the last ones take the places of those that have, the others stay."""
    order = torch.arange(size, device=done.device)
    movers = (~done[size:]).nonzero()[:, 0] + size
    holes = done[:size].nonzero()[:, 0]
    order[holes[: len(movers)]] = movers
    return order


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
