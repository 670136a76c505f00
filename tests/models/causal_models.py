"""Small random causal models of several families, prompts of all lengths, and the plain forward as a reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from esrl.models.causal import CausalPolicy
from esrl.models.causal_plain import PlainCausalPolicy
from esrl.models.policy import PromptState
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
        "gemma2": Gemma2Config(
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            attn_logit_softcapping=2.0,
            final_logit_softcapping=2.0,
            **_SIZES,
        ),
        "phi": PhiConfig(**_SIZES),  # a bias on the vocabulary projection
        "mistral": MistralConfig(num_key_value_heads=2, sliding_window=6, **_SIZES),
    }


def plain_configs() -> dict[str, Any]:
    """Models whose prompts cannot be shared: recurrent ones, one of which knows no padding; sinks, and experts."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id", "eos_token_id", "bos_token_id")
    sizes = {name: _SIZES[name] for name in names}
    return {
        "mamba": MambaConfig(state_size=4, time_step_rank=4, residual_in_fp32=False, **sizes),
        "recurrent_gemma": RecurrentGemmaConfig(
            num_attention_heads=4,
            lru_width=32,
            attention_window_size=5,
            logits_soft_cap=4.0,
            **(sizes | {"num_hidden_layers": 3}),
        ),
        "gpt_oss": GptOssConfig(
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=3,
            num_experts_per_tok=2,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            **_SIZES,
        ),
    }


FAMILIES, PLAIN = tuple(configs()), tuple(plain_configs())
_FORGETTING = ("A_log", "dt_proj")  # how fast a state forgets


def tolerance(family: str, dtype: torch.dtype = torch.float64) -> float:
    """Hugging Face's code takes the softmax of Gemma 2's attention, and Mamba's states and logits, in float32."""
    return 1e-4 if dtype == torch.float32 or family in ("gemma2", "mamba", "recurrent_gemma") else 1e-9


def make_model(family: str | Any, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
    """Weights large enough for peaked distributions, biases and norms that are not 0 or 1."""
    config = (configs() | plain_configs())[family] if isinstance(family, str) else family
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        if config.model_type == "gpt_oss":
            model.set_experts_implementation("eager")  # products of groups know no float64
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in _FORGETTING):
                    continue
                if parameter.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                    parameter *= 5
                elif parameter.dim() == 2:
                    parameter *= 10
                else:
                    parameter += 0.2 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


def kind_of(family: str | Any) -> type[CausalPolicy]:
    """The policy that `load_policy` takes."""
    return PlainCausalPolicy if isinstance(family, str) and family in PLAIN else CausalPolicy


def make_causal(family: str | Any, tokenizer: Any, dtype: torch.dtype = torch.float64, seed: int = 1) -> CausalPolicy:
    return kind_of(family)(make_model(family, dtype, seed), tokenizer)


def make_plain(family: str | Any, tokenizer: Any, dtype: torch.dtype = torch.float64) -> PlainCausalPolicy:
    """A model that could share its prompts, too."""
    return PlainCausalPolicy(make_model(family, dtype), tokenizer)


def make_ending(family: str, tokenizer: Any, dtype: torch.dtype = torch.float64) -> CausalPolicy:
    """A model with nineteen end tokens, so that lengths are ragged."""
    model = make_model(family, dtype)
    model.generation_config.eos_token_id = [1, *range(100, 118)]
    return kind_of(family)(model, tokenizer)


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
        logits = logits.to(next(model.parameters()).dtype)  # Mamba makes float32 of them
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.stack(rows)


def not_suppressed(policy: CausalPolicy, logits: Tensor) -> Tensor:
    left = [token for token in range(policy.vocabulary) if token not in policy.suppressed]
    return logits[..., left]


def stage_two(policy: CausalPolicy, prompts: Prompts, index: Tensor, answers: Tensor) -> Tensor:
    inputs = decoder_inputs(policy, prompts, index, answers)
    return policy.projection().logits(policy.hidden_states(policy.encode(prompts), index, inputs))


Seen = dict[tuple[int, int], Tensor]
"""Logits by row and position."""


def stage_one(frozen: Any, policy: CausalPolicy, prompts: Prompts, answers: Tensor, keep_at: dict) -> Seen:
    """Step through the answers; before position t the rows ``keep_at[t]`` of the original batch are kept."""
    inputs = decoder_inputs(policy, prompts, PROMPT_INDEX, answers)
    with torch.no_grad():
        decoder = frozen.start(policy.encode(prompts), PROMPT_INDEX)
    alive, seen = torch.arange(len(PROMPT_INDEX)), {}
    for position in range(inputs.shape[1]):
        if position in keep_at:
            local = torch.tensor([alive.tolist().index(row) for row in keep_at[position]])
            decoder.keep(local.tolist())
            alive = alive[local]
        logits = frozen.projection.logits(decoder.step(inputs[alive, position]))
        seen |= {(row, position): logits[i] for i, row in enumerate(alive.tolist())}
    return seen


def side_by_side(frozen: Any, policy: CausalPolicy, prompts: Prompts, answers: Tensor) -> Seen:
    """Rows that begin at steps 0, 2 and 9, so that each wave is at a position of its own; rows leave, then a wave."""
    inputs = decoder_inputs(policy, prompts, PROMPT_INDEX, answers)
    begins = {0: [0, 1, 2, 3], 2: [4, 5, 6], 9: [7, 8, 9, 10]}
    stays = {5: [[0, 3, 2], [4, 6]], 11: [[], [6], [10, 8, 9]]}
    with torch.no_grad():
        state = policy.encode(prompts)
    decoder, waves, position = None, [], {}
    seen: Seen = {}
    for step in range(14):
        if step in begins:
            decoder = join(frozen, decoder, state, PROMPT_INDEX[begins[step]])
            waves.append(begins[step])
            position |= dict.fromkeys(begins[step], 0)
        if step in stays:
            kept = [[wave.index(row) for row in rows] for wave, rows in zip(waves, stays[step], strict=True)]
            decoder.keep(*kept)
            waves = [rows for rows in stays[step] if rows]
        rows = [row for wave in waves for row in wave]
        logits = frozen.projection.logits(decoder.step(torch.stack([inputs[row, position[row]] for row in rows])))
        for row, own in zip(rows, logits, strict=True):
            seen[row, position[row]] = own
            position[row] += 1
    assert position == {0: 11, 1: 5, 2: 11, 3: 11, 4: 9, 5: 3, 6: 12, 7: 2, 8: 5, 9: 5, 10: 5}
    return seen


def join(frozen: Any, decoder: Any, state: PromptState, prompt_index: Tensor) -> Any:
    """Let rows begin."""
    if decoder is None:
        return frozen.start(state, prompt_index)
    decoder.join(state, prompt_index)
    return decoder


def assert_plain(policy: CausalPolicy, seen: Seen, expected: Tensor, limit: float) -> None:
    """The logits are those of the (R, T, V) plain forward."""
    for (row, position), logits in seen.items():
        torch.testing.assert_close(
            not_suppressed(policy, logits),
            not_suppressed(policy, expected[row, position]),
            rtol=0,
            atol=limit,
            msg=f"row {row}, position {position}",
        )


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
