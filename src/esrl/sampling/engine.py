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
from esrl.kernels import memory
from esrl.models.policy import FrozenDecoder, Policy, PromptState
from esrl.models.precision import autocast
from esrl.sampling.decoding import Output, Pace, Rows, Work, decode
from esrl.sampling.draw import Temperature, Truncation
from esrl.types import Prompts, Rollouts, SamplingPlan

_RECORDS = ("entropy", "max_prob")
_PLACES, _WIDE_PLACES, _WIDE = 128, 80, 512
"""Rows at a time with compiled kernels, and for models of this width, whose keys and values take most of the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """What stage one draws from, and its limits; of these only the two on length change what is drawn."""

    max_new_tokens: int = 128
    """Longest sample in tokens, EOS included."""
    max_length_ratio: float | None = None
    """If set, a sample is also cut at ceil(ratio * source tokens) + 10."""
    top_k: int | None = None
    """If set, each token is drawn from the k most probable ones."""
    top_p: float | None = None
    """If set, from the fewest most probable ones that together have this probability, at the row's temperature."""
    min_p: float | None = None
    """If set, from those at least this times as probable as the most probable one."""
    max_cache_tokens: int | None = None
    """Rows decoded at a time, times max_new_tokens: bounds the key/value cache whatever k_x is, up to a factor for rows
    that have ended and room to grow. Unset: 524,288 on CUDA; 20,480 on CPUs, but not more than 128 rows (80 of a
    model as wide as 512) where compiled kernels make few of them nearly as fast as many."""
    max_prompt_tokens: int = 16384
    """Source tokens encoded at a time, padding included."""
    compaction_share: float | None = None
    """Finished rows are dropped from the batch once they are about this share of it; 0 drops them as soon as can be.
    Unset: 0.03 with compiled kernels, 0.125 without. Where the whole loop is compiled (``decoding.decode``), rows are
    dropped as soon as they end, whatever is set."""
    max_logits: int | None = None
    """Logits computed at a time. Unset: on CPUs 1,048,576, so that they stay in the cache, but those of 16 rows at
    least; 67,108,864 on CUDA."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_cache_tokens", "max_prompt_tokens", "max_logits"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.max_length_ratio is not None and not self.max_length_ratio > 0:
            raise ValueError(f"max_length_ratio is {self.max_length_ratio}; it must be above 0.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more, or be left out.")
        for name in ("top_p", "min_p"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is {share}; it must lie in (0, 1], or be left out.")
        if self.compaction_share is not None and not 0 <= self.compaction_share <= 1:
            raise ValueError(f"compaction_share is {self.compaction_share}; it must lie in [0, 1].")

    @property
    def truncation(self) -> Truncation | None:
        """Which tokens may be drawn; None: all."""
        if self.top_k is None and self.top_p is None and self.min_p is None:
            return None
        return Truncation(self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True, slots=True)
class _Request:
    """One call of ``sample``."""

    prompts: Prompts
    plan: SamplingPlan
    epoch: int
    records: tuple[str, ...]


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
            ValueError: a record of another name.
            NumericsError: the model gave a log-probability that is not finite.
        """
        if unknown := [name for name in records if name not in _RECORDS]:
            raise ValueError(f"records are {', '.join(_RECORDS)}; there is no {unknown[0]!r}.")
        # the decoder has its own copies of the weights
        in_precision = autocast(self.policy.device, self.policy.precision, keep=False)
        with memory.stage(self.policy.device), _without_dropout(self.policy.model), in_precision:
            request = _Request(prompts, plan, epoch, records)
            outputs: list[Output] = []
            decoder: FrozenDecoder | None = None
            for state, rows in self._encoded(prompts, plan):
                # after the encoder, whose laid-out weights are gone by then
                decoder = decoder or self.policy.frozen_decoder()
                outputs.append(self._decode(request, decoder, state, rows))
        rollouts = self._collect(outputs, records)
        check_log_probs(rollouts.log_probs, rollouts.prompt_index, prompts)
        check_log_probs(rollouts.sampling_log_probs, rollouts.prompt_index, prompts)
        return rollouts

    def _encoded(self, prompts: Prompts, plan: SamplingPlan) -> Iterator[tuple[PromptState, Rows]]:
        """Encode the prompts part by part; each part comes with its rows."""
        counts = plan.num_samples.tolist()
        used = [i for i, count in enumerate(counts) if count > 0]
        size = max(1, self.config.max_prompt_tokens // max(1, prompts.mask.shape[1]))
        for start in range(0, len(used), size):
            part = used[start : start + size]
            state = self.policy.encode(prompts.select(part))
            local = torch.tensor([j for j, i in enumerate(part) for _ in range(counts[i])], dtype=torch.int64)
            sample = torch.tensor([s for i in part for s in range(counts[i])], dtype=torch.int64)
            yield state, Rows(local, torch.tensor(part, dtype=torch.int64)[local], sample)

    def limits(self, prompts: Prompts, prompt_index: Tensor) -> Tensor:
        """(R,) longest sample of each row, in tokens."""
        room = self.policy.room(prompts)[prompt_index]
        limits = room.clamp_max(self.config.max_new_tokens)
        if self.config.max_length_ratio is None:
            return limits
        lengths = prompts.mask.sum(1).cpu()[prompt_index].tolist()
        ratio = self.config.max_length_ratio
        return limits.minimum(torch.tensor([math.ceil(ratio * length) + 10 for length in lengths]))

    def _decode(self, request: _Request, frozen: FrozenDecoder, state: PromptState, rows: Rows) -> Output:
        """Draw the rows of an encoded part."""
        device, limits = self.policy.device, self.limits(request.prompts, rows.prompt)
        temperature = Temperature.of(request.plan.temperature[rows.prompt], self.config.truncation)
        uniforms = self._uniforms(request, rows, 0 if temperature.greedy else int(limits.max()))
        work = Work(
            state=state,
            rows=rows,
            starts=self.policy.start_tokens(request.prompts)[rows.prompt].to(device),
            limits=limits,
            uniforms=uniforms.to(device),
            temperature=replace(temperature, values=temperature.values.to(device)),
        )
        return decode(frozen, work, self._pace(frozen), self.policy.eos_tokens, request.records)

    def _pace(self, frozen: FrozenDecoder) -> Pace:
        """The limits; what is left to device and decoder where the configuration does not say it."""
        config, cuda = self.config, self.policy.device.type == "cuda"
        few = frozen.batch_sizes == "few"
        cache_tokens = config.max_cache_tokens or (1 << 19 if cuda else 20_480)
        places = max(1, cache_tokens // config.max_new_tokens)
        if config.max_cache_tokens is None and not few:
            wide = self.policy.projection().weight.shape[1] >= _WIDE
            places = min(places, _WIDE_PLACES if wide else _PLACES)
        share = config.compaction_share
        return Pace(
            places=places,
            logits=config.max_logits or (1 << 26 if cuda else max(1 << 20, 16 * self.policy.vocabulary)),
            check_steps=8 if cuda else 1,
            compaction_share=(0.125 if few else 0.03) if share is None else share,
            free_share=0.5 if few else 0.125,
            batch_sizes=frozen.batch_sizes,
        )

    def _uniforms(self, request: _Request, rows: Rows, steps: int) -> Tensor:
        """(steps, R), or (1, R) zeros where nothing is drawn."""
        if not steps:
            return torch.zeros(1, len(rows.prompt), dtype=torch.float64)
        ids = [request.prompts.example_ids[i] for i in rows.prompt.tolist()]
        return sample_uniforms(self.seed, request.epoch, ids, rows.sample.tolist(), steps).T.contiguous()

    def _collect(self, outputs: list[Output], records: tuple[str, ...]) -> Rollouts:
        """Join the parts, cut to the longest sample, decode to text."""
        width = max((int(output.tensors["mask"].sum(1).max()) for output in outputs), default=1)
        cpu = torch.device("cpu")

        def join(name: str) -> Tensor:
            parts = [output.tensors[name][:, :width] for output in outputs]
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
            return torch.cat(parts) if parts else torch.empty(0, width)

        def rows(values: list[Tensor], dtype: torch.dtype) -> Tensor:
            return torch.cat(values) if values else torch.empty(0, dtype=dtype)

        mask, tokens = join("mask").bool(), join("tokens").long()
        return Rollouts(
            prompt_index=rows([output.rows.prompt for output in outputs], torch.int64),
            sample_index=rows([output.rows.sample for output in outputs], torch.int64),
            tokens=tokens,
            mask=mask,
            finished=rows([output.finished for output in outputs], torch.bool),
            log_probs=join("log_probs"),
            sampling_log_probs=join("sampling_log_probs"),
            texts=decode_texts(self.policy, tokens.to(cpu), mask.to(cpu)),
            records={name: join(name) for name in records},
        )


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


def decode_texts(policy: Policy, tokens: Tensor, mask: Tensor) -> tuple[str, ...]:
    """Detokenize (R, T) rows; special tokens are left out."""
    lengths = mask.sum(1).tolist()
    ids = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    if not ids:  # the tokenizer makes one empty text of no rows
        return ()
    return tuple(policy.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
