"""PPO's value head: a linear function of the hidden states that the log-probabilities come from.

It has no model of its own. Its parameters are trained, clipped and saved with the policy's (``trained_modules``), but
are no part of the exported model folder.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esrl.algorithm.log_probs import Projection
from esrl.models.policy import Policy

AnyPolicy = TypeVar("AnyPolicy", bound=Policy)


def value_head(policy: Policy) -> nn.Linear:
    """A head that values everything at 0: the first advantages are plain rewards to go, whatever the seed."""
    weight = policy.projection().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    head = nn.Linear(weight.shape[1], 1, device=policy.device, dtype=dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def trained_modules(policy: Policy, critic: nn.Module | None) -> nn.Module:
    """What the loop optimizes and saves: the policy's model, with the critic beside it where there is one."""
    return policy.model if critic is None else nn.ModuleDict({"policy": policy.model, "critic": critic})


def keeping_states(policy: AnyPolicy) -> tuple[AnyPolicy, list[Tensor]]:
    """The same policy, and a list to which the states of every position are added as they are projected, (R, D) each.

    The conventional step keeps its graph through sampling; a critic reads the states there, with that graph.
    """
    states: list[Tensor] = []
    watched = copy.copy(policy)
    projection = policy.projection
    watched.projection = lambda: _WatchedProjection(projection(), states)  # type: ignore[method-assign, assignment, return-value]
    return watched, states


class _WatchedProjection:
    def __init__(self, projection: Projection, states: list[Tensor]) -> None:
        self.projection = projection
        self.states = states

    def logits(self, hidden: Tensor) -> Tensor:
        self.states.append(hidden)
        return self.projection.logits(hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.projection, name)
