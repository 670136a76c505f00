"""Small language models of many kinds, their tokenizer and a few examples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import torch
from tokenizer_helpers import byte_level
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    Qwen3Config,
)

from esrl.data.examples import Example, number_examples

VOCABULARY = 304
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GEMMA = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gpt2": lambda: GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **GEMMA),
    "gemma2": lambda: Gemma2Config(**SIZES, **GEMMA, final_logit_softcapping=0.5),
    "phi": lambda: PhiConfig(**SIZES),
    "mamba": lambda: MambaConfig(**MAMBA),
}
QUESTIONS = (
    ("Add 1 and 2:", "3"),
    ("Say hello.", "Hello there!"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Add 20 and 3:", "23"),
    ("Write a response that says hello.", "Hello!"),
    ("Hi", "Hello there! Hello there! Hello there!"),
    ("Add 5 and 5:", "10"),
    ("What is a task?", "A task is an instruction."),
)


def examples() -> list[Example]:
    return list(number_examples({"source": source, "reference": answer} for source, answer in QUESTIONS))


def preferences() -> list[Example]:
    """The right answer against that to the next question."""
    return list(
        number_examples(
            {"source": source, "reference": answer, "rejected": QUESTIONS[(i + 1) % len(QUESTIONS)][1]}
            for i, (source, answer) in enumerate(QUESTIONS)
        )
    )


def tokenizer(**options: Any) -> Any:
    return byte_level(**options)


def causal_model(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
    """Random weights, large enough for attention to matter."""
    return _peaked(lambda: AutoModelForCausalLM.from_config(CONFIGS[kind]()), dtype, seed)


def classifier(kind: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
    config = CONFIGS[kind]()
    config.num_labels = 1
    return _peaked(lambda: AutoModelForSequenceClassification.from_config(config), dtype, seed)


def _peaked(make: Callable[[], Any], dtype: torch.dtype, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.to(dtype).eval()
