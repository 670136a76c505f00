"""A batch of samples and all that stays fixed while several updates learn from it; its way into a checkpoint."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from esrl.algorithm.groups import Groups
from esrl.algorithm.objectives import RewardedSamples
from esrl.training.checkpoint import pack_tensors, unpack_tensors
from esrl.types import Prompts, Rollouts

_ROLLOUTS = tuple(entry.name for entry in fields(Rollouts) if entry.name not in ("texts", "records"))
_SAMPLES = tuple(
    entry.name for entry in fields(RewardedSamples) if entry.name not in ("groups", "max_tokens", "kl_coefficient")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """Samples, what they earned, and what the policy that has drawn them made of them."""

    epoch: int
    batch: int
    prompts: Prompts
    rollouts: Rollouts
    samples: RewardedSamples
    temperature: Tensor | None  # (R,) of the scores; None for 1

    def is_of(self, epoch: int, batch: int) -> bool:
        """Whether it is this batch of samples."""
        return (self.epoch, self.batch) == (epoch, batch)


def pack_experience(experience: Experience) -> dict[str, Any]:
    """A JSON-able copy, exact to the bit; without texts and prompts, which the data have."""
    samples = experience.samples
    tensors = {f"rollouts.{name}": getattr(experience.rollouts, name) for name in _ROLLOUTS}
    tensors |= {f"samples.{name}": getattr(samples, name) for name in _SAMPLES if getattr(samples, name) is not None}
    if experience.temperature is not None:
        tensors["temperature"] = experience.temperature
    return {
        "epoch": experience.epoch,
        "batch": experience.batch,
        "max_tokens": samples.max_tokens,
        "kl_coefficient": samples.kl_coefficient,
        "tensors": base64.b64encode(pack_tensors({name: t.contiguous() for name, t in tensors.items()})).decode(),
    }


def unpack_experience(state: Mapping[str, Any], prompts: Prompts, device: torch.device) -> Experience:
    """What ``pack_experience`` packed.

    Args:
        prompts: of its batch, as this process has them.
        device: of the rollouts.
    """
    tensors = unpack_tensors(base64.b64decode(state["tensors"]))
    rollouts: dict[str, Any] = {name: tensors[f"rollouts.{name}"] for name in _ROLLOUTS}
    on_cpu = ("prompt_index", "sample_index")  # as the sampler leaves them
    samples: dict[str, Any] = {name: tensors.get(f"samples.{name}") for name in _SAMPLES}
    return Experience(
        epoch=state["epoch"],
        batch=state["batch"],
        prompts=prompts,
        rollouts=Rollouts(**{name: value if name in on_cpu else value.to(device) for name, value in rollouts.items()}),
        samples=RewardedSamples(
            **samples,
            groups=Groups(rollouts["prompt_index"], len(prompts)),
            max_tokens=state["max_tokens"],
            kl_coefficient=state["kl_coefficient"],
        ),
        temperature=tensors.get("temperature"),
    )
