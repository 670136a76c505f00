"""Models for the tests of the compiled encoder and decoder."""

from __future__ import annotations

import torch
from torch import nn

from esrl.models.adapters import LoraSettings, add_adapter
from esrl.models.seq2seq import MarianPolicy, Preset, new_policy


def make(
    tokenizer, width: int = 64, heads: int = 4, inner: int = 72, activation: str = "relu", positions: int = 40
) -> MarianPolicy:
    """Every bias and norm with numbers of its own: one that is left out would be seen."""
    policy = new_policy(Preset(width=width, layers=2, heads=heads, inner_width=inner), tokenizer, positions, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    if activation == "silu":
        for layer in [*policy.model.model.encoder.layers, *policy.model.model.decoder.layers]:
            layer.activation_fn = nn.SiLU()
    return policy


def with_adapter(policy: MarianPolicy) -> MarianPolicy:
    """The policy with LoRA that changes what it does."""
    adapted = add_adapter(policy, LoraSettings(rank=4))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_" in name:  # A, too: its start is from nobody's seed
                parameter.normal_(std=0.1, generator=generator)
    return adapted
