"""What a causal model must be for its prompts to be shared exactly; everything else is refused by name."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from esrl.algorithm.log_probs import Projection
from esrl.models.policy import PromptState
from esrl.types import Prompts

TESTED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma3_text", "phi")
"""Families that the tests hold against Hugging Face's plain forward; others are compared with it on loading."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PROBE_LENGTHS = (1, 4, 6)
_ANSWER = 5


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

    With LongRoPE those that its short factors cover, since keys of both do not mix; for a family without tests of its
    own those inside its sliding window, where there is nothing to get wrong.
    """
    if getattr(config, "max_position_embeddings", None) is None:
        raise _refused(config, "its configuration gives no max_position_embeddings")
    length = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        length = min(length, int(rope.get("original_max_position_embeddings", length)))
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type not in TESTED:
        length = min(length, int(window))
    return length


def check_supported(plain: Any) -> None:
    """Refuse, before anything is run, a model that would be trained wrongly.

    Raises:
        ValueError: the model type and the reason.
    """
    config = plain.config
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if kinds:
        raise _refused(config, f"it has layers of the kind {', '.join(kinds)}, whose state samples cannot share")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        raise _refused(config, "its rotary positions change with the length of the batch")
    if getattr(config, "use_bidirectional_attention", None):
        raise _refused(config, "its attention looks ahead")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise _refused(config, f"{name} changes its logits behind the vocabulary projection")
    head = getattr(plain, "lm_head", None)
    if not isinstance(getattr(head, "weight", None), Tensor) or not hasattr(plain, plain.base_model_prefix):
        raise _refused(config, "it has no body and lm_head as other causal models have them")
    if hasattr(plain.lm_head, "lora_A"):
        raise ValueError(
            "LoRA on lm_head is not supported, since the vocabulary projection's gradient is added up directly; "
            'leave it out of target_modules, or train it whole, where it is not tied: modules_to_save = ["lm_head"].'
        )
    if not plain._can_set_attn_implementation():
        raise _refused(config, "its attention does not go through Hugging Face's attention interface")


@torch.no_grad()
def compare(policy: CausalModel) -> None:
    """Logits by the shared prompt against the plain forward, on a few tokens.

    Raises:
        ValueError: they differ.
    """
    plain, device = policy.plain, policy.device
    generator = torch.Generator().manual_seed(0)
    width = max(_PROBE_LENGTHS)
    tokens = torch.randint(0, policy.vocabulary, (len(_PROBE_LENGTHS), width + _ANSWER), generator=generator).to(device)
    lengths = torch.tensor(_PROBE_LENGTHS)
    mask = torch.arange(width)[None] < lengths[:, None]
    prompts = Prompts(example_ids=tuple(map(str, _PROBE_LENGTHS)), input_ids=tokens[:, :width], mask=mask)
    inputs = torch.stack([row[n - 1 : n - 1 + _ANSWER] for row, n in zip(tokens, _PROBE_LENGTHS, strict=True)])
    state = policy.encode(prompts)
    ours = policy.projection().logits(policy.hidden_states(state, torch.arange(len(lengths), device=device), inputs))
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
    if not difference <= (5e-2 if half else 1e-3) * max(spread, 1e-6):
        raise _refused(plain.config, f"logits with a shared prompt differ from its own by {difference:.2g}")


def _refused(config: Any, reason: str) -> ValueError:
    return ValueError(
        f"model_type {config.model_type!r} is not supported: {reason}. Tested here: {', '.join(TESTED)}; others are "
        "refused rather than trained wrongly."
    )
