"""The optimizer and the learning-rate schedules: a schedule is a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from esrl.errors import NumericsError
from esrl.kernels.memory import collapse

# far beyond any use, and still far from what overflows float32 inside AdamW
_LARGEST = 1e6

Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_scheduler: Schedule = "constant"
    """`constant`, `linear` or `cosine` (both to 0 at the last step) or `inverse_sqrt`; all after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0."""
    adam_beta1: float = 0.9
    """First-moment decay."""
    adam_beta2: float = 0.98
    """Second-moment decay; Vaswani et al. use 0.98."""
    adam_epsilon: float = 1e-9
    """Added to the denominator; Vaswani et al. use 1e-9."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns it off."""

    def __post_init__(self) -> None:
        if self.lr_scheduler not in get_args(Schedule):
            raise ValueError(f"lr_scheduler is {self.lr_scheduler!r}; choose one of {', '.join(get_args(Schedule))}.")
        for name in ("learning_rate", "adam_epsilon"):
            value = getattr(self, name)
            if not 0 < value <= _LARGEST:
                raise ValueError(f"{name} is {value}; it must lie in (0, {_LARGEST:g}].")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, {_LARGEST:g}].")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1).")


def learning_rate(step: int, total_steps: int | None, config: OptimizerConfig) -> float:
    """The rate of step 0, 1, 2, ...; ``total_steps`` is needed by ``linear`` and ``cosine`` alone."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "inverse_sqrt":
        start = max(1, config.warmup_steps)
        return config.learning_rate * math.sqrt(start / max(start, step + 1))
    if config.lr_scheduler == "constant":
        return config.learning_rate
    assert total_steps is not None, "checked when the run was configured"
    rest = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.learning_rate * (1 - rest if config.lr_scheduler == "linear" else (1 + math.cos(math.pi * rest)) / 2)


class Optimizer:
    """AdamW over the trainable parameters, refusing to step on anything that is not finite."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        collapse(self.parameters)
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,  # one pass without temporaries of the model's size
        )

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return dict(zip(self.names, self.parameters, strict=True))

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def scale_and_clip(self, denominator: float) -> float:
        """Divide the summed gradients by the step's one denominator, clip them, return their norm before clipping.

        Raises:
            NumericsError: the norm is not finite; parameters and optimizer are untouched.
        """
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(max(denominator, 1e-12))
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm):
            culprits = [
                name
                for name, parameter in zip(self.names, self.parameters, strict=True)
                if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
            ]
            # every entry may be finite and the norm overflow all the same
            culprit = culprits[0] if culprits else "all parameters together"
            raise NumericsError(
                f"the gradient of {culprit} is not finite (norm {norm}); nothing was updated. "
                "Lower the learning rate, or look at the rewards and at max_grad_norm."
            )
        if self.config.max_grad_norm and norm > self.config.max_grad_norm:
            torch._foreach_mul_(gradients, self.config.max_grad_norm / norm)
        return norm

    def step(self, rate: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by parameter name, for a checkpoint."""
        return {
            f"{key}.{name}": torch.as_tensor(value)
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for key, value in self.adam.state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        by_name = self.trained()
        for full_name, value in tensors.items():
            key, name = full_name.split(".", 1)
            parameter = by_name[name]
            state: dict[str, Any] = self.adam.state[parameter]
            state[key] = value.to(parameter.device, copy=True)
