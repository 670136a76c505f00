"""LoRA through PEFT, for both model families: few weights are trained, and without them the model is its own reference.

PEFT is an extra (``pip install esrl[lora]``); nothing else here imports it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from esrl.models.causal import CausalPolicy
from esrl.models.seq2seq import MarianPolicy

AnyPolicy = TypeVar("AnyPolicy", bound=MarianPolicy | CausalPolicy)
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2022)."""

    rank: int = 8
    """Rank of each adapter."""
    alpha: float = 32.0
    """Its scale: the product of the two matrices counts alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that get one; empty: all linear layers but the vocabulary projection."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained whole and saved with the adapters."""
    load_in_4bit: bool = False
    """QLoRA: keep the causal model under the adapters in 4 bits; needs bitsandbytes and a CUDA device."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora rank is {self.rank}; it must be 1 or more.")
        if not self.alpha > 0:
            raise ValueError(f"lora alpha is {self.alpha}; it must be above 0.")
        if "lm_head" in self.target_modules:
            raise ValueError(
                "lora target_modules names lm_head, whose gradient is added up directly; leave it out, or name it in "
                "modules_to_save, which trains it whole (where it shares no weight with the embedding)."
            )


def add_adapter(policy: AnyPolicy, settings: LoraSettings) -> AnyPolicy:
    """A policy whose adapters alone are trained; dropout is the policy's, as elsewhere.

    The policy that was given is used up: its layers now carry the adapters.

    Raises:
        ValueError: PEFT is missing, or a target module is not there.
    """
    if has_adapter(policy):
        raise ValueError("the model has adapters already; merge them first (esrl merge).")
    task_type = "SEQ_2_SEQ_LM" if isinstance(policy, MarianPolicy) else "CAUSAL_LM"
    # dropout is a module of its own even at rate 0, so that ``set_dropout`` finds it
    return _around(policy, adapted(policy.model, settings, task_type, settings.modules_to_save, dropout=0.1))


def adapted(
    model: Any, settings: LoraSettings, task_type: str, modules_to_save: Sequence[str], dropout: float = 0.0
) -> Any:
    """PEFT's model around a Hugging Face one, which is used up.

    Raises:
        ValueError: PEFT is missing, or a module that the settings name is not there.
    """
    peft, known = _peft(), [name for name, _ in model.named_modules()]
    for name in (*settings.target_modules, *settings.modules_to_save):
        # of modules_to_save PEFT would take no notice
        if not any(module == name or module.endswith(f".{name}") for module in known):
            raise ValueError(f"lora names {name!r}, and this {model.config.model_type} model has no such module.")
    _refuse_shared_weights(model, modules_to_save)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=dropout,
        target_modules=list(settings.target_modules) or "all-linear",
        modules_to_save=list(modules_to_save) or None,
        task_type=task_type,
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def _refuse_shared_weights(model: Any, names: Sequence[str]) -> None:
    """PEFT would train a copy of a weight that other modules go on using as it was."""
    whole = {path for path, _ in model.named_modules() if any(f".{path}".endswith(f".{name}") for name in names)}
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    for paths in owners.values():
        inside = [path for path in paths if any(f"{path}.".startswith(f"{root}.") for root in whole)]
        if inside and len(paths) > 1:
            others = ", ".join(path for path in paths if path != inside[0])
            raise ValueError(
                f"lora modules_to_save names {inside[0]}, whose weight {others} uses, too (tied embeddings): "
                "trained apart they would be no model that can be saved. Leave it out."
            )


def has_adapter(policy: MarianPolicy | CausalPolicy) -> bool:
    """Whether PEFT's adapters are around the model."""
    return hasattr(policy.model, "peft_config")


@contextmanager
def reference(policy: MarianPolicy | CausalPolicy) -> Iterator[None]:
    """Inside, the policy is the model it started from: its adapters are off.

    Raises:
        ValueError: the policy has no adapters, so its start is gone.
    """
    if not has_adapter(policy):
        raise ValueError("without adapters a model is no reference of itself; load a second copy, or train with LoRA.")
    with policy.model.disable_adapter():
        yield


def load_adapter(folder: str | Path, base: AnyPolicy, trainable: bool = True) -> AnyPolicy:
    """The base with a folder's adapters around it.

    Raises:
        ValueError: not an adapter folder, or adapters of another model.
    """
    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder}: no {ADAPTER_CONFIG} here; give a folder of adapters as training saves it.")
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder}: no adapter_model.safetensors here; other formats can run code and are not read.")
    try:
        model = _peft().PeftModel.from_pretrained(
            base.model, str(path), is_trainable=trainable, autocast_adapter_dtype=False
        )
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: these adapters do not fit the model ({_first_line(error)}).") from error
    return _around(base, model)


def base_of(folder: str | Path) -> str:
    """The model that a folder's adapters belong to, as it was named when they were made."""
    stored = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = stored.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder}: {ADAPTER_CONFIG} names no base_model_name_or_path that the adapters belong to.")
    return str(name)


def merge_adapter(base: MarianPolicy | CausalPolicy, adapter_folder: str | Path, output: str | Path) -> None:
    """Add a folder's adapters to the base's weights and write a plain model folder."""
    adapted = load_adapter(adapter_folder, base, trainable=False)
    # safe_merge: PEFT looks whether the sum is finite
    merged: Any = adapted.model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(output)
    adapted.tokenizer.save_pretrained(output)


def _around(policy: AnyPolicy, model: Any) -> AnyPolicy:
    """The policy with PEFT's model in the place of its own."""
    result = type(policy)(model, policy.tokenizer)
    result.precision, result.notice = policy.precision, policy.notice
    return result


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("adapters need PEFT, which is not installed: pip install 'esrl[lora]'.") from error
    return peft


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
