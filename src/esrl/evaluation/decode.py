"""Decoding a test or development set: greedy with our engine, beam search with Hugging Face's ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esrl.data.batching import make_prompts
from esrl.data.encoding import Encoder, make_causal_prompts
from esrl.data.examples import Example
from esrl.data.stops import check_stops
from esrl.evaluation.scores import Metric
from esrl.kernels import memory
from esrl.models.adapters import AnyPolicy
from esrl.models.causal import CausalPolicy
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.generate import generate_texts
from esrl.sampling.stops import cut_at_stops
from esrl.types import Prompts, SamplingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingConfig:
    """How texts are decoded for evaluation."""

    beam_size: int = 1
    """1 is greedy, by our engine; more is beam search, by Hugging Face's `generate`."""
    length_penalty: float = 1.0
    """Exponent of the length in beam search; greedy decoding has none."""
    max_new_tokens: int = 128
    """Longest output in tokens."""
    max_source_tokens: int = 256
    """Longer sources are cut; `evaluate` and `generate` say how many. A causal model's limit is that of `prompts`."""
    batch_size: int = 128
    """Sources decoded at a time."""
    stop_strings: tuple[str, ...] = ()
    """An output ends before the first of these texts to be completed, as samples do in training: the text is no part
    of it. It is decoded on to its end token, so its time is not saved."""

    def __post_init__(self) -> None:
        for name in ("beam_size", "max_new_tokens", "max_source_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        check_stops(self.stop_strings)


def source_limit(policy: MarianPolicy | CausalPolicy, config: DecodingConfig) -> int:
    """Tokens of an encoder-decoder's source that are read, end-of-sequence included."""
    return min(config.max_source_tokens, policy.max_length)


def on_device(policy: AnyPolicy) -> AnyPolicy:
    """The policy, on the GPU where there is one; training moves its own (Accelerate)."""
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return policy


def decode(
    policy: MarianPolicy | CausalPolicy,
    examples: Sequence[Example],
    config: DecodingConfig,
    encoder: Encoder | None = None,
) -> list[str]:
    """The model's output for each example, in order; sources are batched by length.

    Args:
        encoder: makes token ids of a causal model's prompts; None for an encoder-decoder.
    """
    was_training = policy.model.training
    policy.model.eval()
    texts = [""] * len(examples)
    lengths = [len(example.columns["source"]) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: lengths[i])
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=min(config.max_new_tokens, policy.max_length)), 0)
    with torch.no_grad():
        for start in range(0, len(order), config.batch_size):
            part = order[start : start + config.batch_size]
            prompts = _prompts(policy, [examples[i] for i in part], config, encoder)
            if config.beam_size == 1:
                rollouts = sampler.sample(prompts, SamplingPlan.greedy(len(part)))
                outputs = list(cut_at_stops(rollouts, policy.tokenizer, config.stop_strings).texts)
            else:
                outputs = generate_texts(
                    policy,
                    prompts,
                    config.max_new_tokens,
                    config.beam_size,
                    config.length_penalty,
                    config.stop_strings,
                )
            for i, text in zip(part, outputs, strict=True):
                texts[i] = text
    memory.release()
    policy.model.train(was_training)
    return texts


def _prompts(
    policy: MarianPolicy | CausalPolicy, examples: Sequence[Example], config: DecodingConfig, encoder: Encoder | None
) -> Prompts:
    if encoder is not None:
        return make_causal_prompts(examples, encoder)
    assert isinstance(policy, MarianPolicy), "a causal model's prompts need an encoder"
    return make_prompts(examples, policy.tokenizer, source_limit(policy, config))


def corpus_scores(metrics: Sequence[Metric], texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus scores alone, 0 to 100, by metric name."""
    scores = {}
    for metric in metrics:
        rows = [metric.statistics(text, reference) for text, reference in zip(texts, references, strict=True)]
        scores[metric.name] = float(metric.corpus_score(np.asarray(rows, dtype=np.float64).sum(0)))
    return scores
