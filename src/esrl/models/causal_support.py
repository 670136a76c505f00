"""What a causal model must be for its prompts to be shared exactly, and what it must be to be taken at all."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from esrl.algorithm.log_probs import Projection
from esrl.models.policy import PromptState
from esrl.types import Prompts

TESTED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text", "phi")
"""Families that the tests hold against Hugging Face's plain forward; others are compared with it on loading."""

NO_LIMIT = 1 << 20
"""Positions of a model that counts none, as recurrent ones."""

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PROBE_LENGTHS = (1, 4, 6)
_ANSWER = 5


class CannotShareError(ValueError):
    """A causal model whose prompts cannot be run once for all of their samples.

    Args:
        fault: why, as "its ...".
    """

    def __init__(self, config: Any, fault: str) -> None:
        self.fault = fault
        self.reason = f"model_type {config.model_type!r} cannot share a prompt among its samples: {fault}"
        super().__init__(f"{self.reason}. load_policy takes it: esrl.models.causal_plain.PlainCausalPolicy.")


class CausalModel(Protocol):
    """The part of ``CausalPolicy`` that is looked at."""

    pad_token: int
    vocabulary: int

    @property
    def plain(self) -> Any: ...

    @property
    def body(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, prompts: Prompts) -> PromptState: ...

    def hidden_states(self, state: PromptState, prompt_index: Tensor, inputs: Tensor) -> Tensor: ...

    def projection(self) -> Projection: ...


def longest_sequence(config: Any) -> int:
    """Positions of the model that samples can use.

    With LongRoPE those that its short factors cover, since keys of both do not mix. With dynamic RoPE those before its
    frequencies begin to change: beyond, a token's probability would depend on what follows it.
    """
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or NO_LIMIT
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        length = min(length, rope.get("original_max_position_embeddings", length))
    return int(length)


def longest_shared(config: Any) -> int:
    """The same with a shared prompt: for a family without tests of its own those inside its sliding window, where there
    is nothing to get wrong."""
    length, window = longest_sequence(config), getattr(config, "sliding_window", None)
    return length if window is None or config.model_type in TESTED else min(length, int(window))


def logit_cap(config: Any) -> float | None:
    """What the model's logits are soft-capped at behind the vocabulary projection."""
    cap = next((cap for name in _CAPS if (cap := getattr(config, name, None)) is not None), None)
    return None if cap is None else float(cap)


def check_supported(plain: Any) -> None:
    """Refuse, before anything is run, a model that would be trained wrongly.

    Raises:
        ValueError: the model type and the reason.
    """
    config = plain.config
    if getattr(config, "use_bidirectional_attention", None):
        raise refused(config, "its attention looks ahead")
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise refused(config, f"{name} changes its logits behind the vocabulary projection")
    head = getattr(plain, "lm_head", None)
    if not isinstance(getattr(head, "weight", None), Tensor) or not hasattr(plain, plain.base_model_prefix):
        raise refused(config, "it has no body and lm_head as other causal models have them")
    if hasattr(plain.lm_head, "lora_A"):
        raise ValueError(
            "LoRA on lm_head is not supported, since the vocabulary projection's gradient is added up directly; "
            'leave it out of target_modules, or train it whole, where it is not tied: modules_to_save = ["lm_head"].'
        )


def check_sharing(plain: Any) -> None:
    """Find, before anything is run, a model whose prompts cannot be shared.

    Raises:
        CannotShareError: the model type and the reason.
    """
    kinds = sorted(set(getattr(plain.config, "layer_types", None) or ()) - _LAYER_TYPES)
    if kinds:
        raise CannotShareError(
            plain.config, f"it has layers of the kind {', '.join(kinds)}, whose state samples cannot share"
        )
    if not plain._can_set_attn_implementation():
        raise CannotShareError(plain.config, "its attention does not go through Hugging Face's attention interface")


@torch.no_grad()
def fault_of(policy: CausalModel) -> str | None:
    """What is wrong with a policy's logits, against Hugging Face's plain forward of each row alone, on a few tokens;
    None where they agree."""
    plain, device = policy.plain, policy.device
    generator = torch.Generator().manual_seed(0)
    width = max(_PROBE_LENGTHS)
    tokens = torch.randint(0, policy.vocabulary, (len(_PROBE_LENGTHS), width + _ANSWER), generator=generator).to(device)
    lengths = torch.tensor(_PROBE_LENGTHS)
    mask = torch.arange(width)[None] < lengths[:, None]
    prompts = Prompts(example_ids=tuple(map(str, _PROBE_LENGTHS)), input_ids=tokens[:, :width], mask=mask)
    inputs = torch.stack([row[n - 1 : n - 1 + _ANSWER] for row, n in zip(tokens, _PROBE_LENGTHS, strict=True)])
    try:
        state = policy.encode(prompts)
        hidden = policy.hidden_states(state, torch.arange(len(lengths), device=device), inputs)
    except CannotShareError as error:
        return error.fault
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"its layers do not run this way ({(str(error).splitlines() or [type(error).__name__])[0]})"
    ours = policy.projection().logits(hidden)
    theirs = torch.stack(
        [
            plain(input_ids=row[None, : n - 1 + _ANSWER], use_cache=False).logits[0, n - 1 :]
            for row, n in zip(tokens, _PROBE_LENGTHS, strict=True)
        ]
    )
    known = torch.isfinite(ours)  # suppressed tokens have none here
    spread = float((theirs - theirs.mean(-1, keepdim=True)).abs().max())
    difference = float((ours - theirs)[known].abs().max())
    half = plain.lm_head.weight.dtype in (torch.bfloat16, torch.float16)
    if difference <= (5e-2 if half else 1e-3) * max(spread, 1e-6):
        return None
    return f"logits differ from its own by {difference:.2g}"


def refused(config: Any, reason: str) -> ValueError:
    """The error for a model that is not taken."""
    return ValueError(
        f"model_type {config.model_type!r} is not supported: {reason}. Tested here: {', '.join(TESTED)}; others are "
        "refused rather than trained wrongly."
    )
