"""Small random causal models of several families, prompts of all lengths, and the plain forward as a reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from esrl.models.causal import CausalPolicy
from esrl.types import Prompts

VOCABULARY = 160
POSITIONS = 48
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def configs() -> dict[str, Any]:
    """Grouped heads, tied and untied embeddings, biases, learnt positions, partial rotation, narrow windows."""
    return {
        "llama": LlamaConfig(num_key_value_heads=2, **_SIZES),
        "qwen2": Qwen2Config(num_key_value_heads=1, **_SIZES),  # biases on queries, keys and values alone
        "qwen3": Qwen3Config(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **_SIZES),
        "gpt2": GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=POSITIONS,
            eos_token_id=1,
            bos_token_id=2,
            pad_token_id=0,
        ),
        "gemma3": Gemma3TextConfig(
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            **_SIZES,
        ),
        "phi": PhiConfig(**_SIZES),  # a bias on the vocabulary projection
        "mistral": MistralConfig(num_key_value_heads=2, sliding_window=6, **_SIZES),
    }


FAMILIES = tuple(configs())


def make_model(family: str | Any, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
    """Weights large enough for peaked distributions, biases and norms that are not 0 or 1."""
    config = configs()[family] if isinstance(family, str) else family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                    parameter *= 5
                elif parameter.dim() == 2:
                    parameter *= 10
                else:
                    parameter += 0.2 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


def make_causal(family: str | Any, tokenizer: Any, dtype: torch.dtype = torch.float64, seed: int = 1) -> CausalPolicy:
    return CausalPolicy(make_model(family, dtype, seed), tokenizer)


def make_ending(family: str, tokenizer: Any, dtype: torch.dtype = torch.float64) -> CausalPolicy:
    """A model with nineteen end tokens, so that lengths are ragged."""
    model = make_model(family, dtype)
    model.generation_config.eos_token_id = [1, *range(100, 118)]
    return CausalPolicy(model, tokenizer)


def make_prompts(lengths: list[int], seed: int = 3, prefix: str = "p") -> Prompts:
    """Random tokens, padded behind."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return Prompts(
        example_ids=tuple(f"{prefix}{i}" for i in range(len(lengths))),
        input_ids=tokens.masked_fill(~mask, 0),
        mask=mask,
        columns={"source": [str(i) for i in range(len(lengths))]},
    )


LENGTHS = [7, 1, 4, 12, 2, 1]
PROMPT_INDEX = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 4, 5])  # ragged; prompt 2 has no row


def random_answers(rows: int, width: int, seed: int = 4) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


def decoder_inputs(policy: CausalPolicy, prompts: Prompts, index: Tensor, answers: Tensor) -> Tensor:
    """(R, T): the prompt's last token, then the answer but for its last."""
    return torch.cat([policy.start_tokens(prompts)[index, None], answers[:, :-1]], 1)


def plain_logits(model: Any, prompts: Prompts, index: Tensor, answers: Tensor) -> Tensor:
    """(R, T, V) by Hugging Face's own forward: each row alone, prompt and answer in one, nothing shared or padded."""
    rows = []
    for row, answer in zip(index.tolist(), answers, strict=True):
        prompt = prompts.input_ids[row][prompts.mask[row]]
        logits = model(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.stack(rows)


def not_suppressed(policy: CausalPolicy, logits: Tensor) -> Tensor:
    left = [token for token in range(policy.vocabulary) if token not in policy.suppressed]
    return logits[..., left]


def norms_in_float64(model: Any) -> None:
    """Hugging Face's RMSNorm goes through float32, whose rounding is larger than the differences looked for."""
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__:
            continue
        shift = 1 if "Gemma" in type(module).__name__ else 0
        eps = getattr(module, "variance_epsilon", None) or module.eps

        def forward(hidden: Tensor, module: Any = module, shift: int = shift, eps: float = eps) -> Tensor:
            scale = shift + module.weight
            return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * scale

        module.forward = forward
