"""What a run was, in a line; what must be the same when it is resumed, and what may be accepted to differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esrl import __version__
from esrl.algorithm.streams import stream_key
from esrl.config import RLConfig, RunConfig, pinned
from esrl.data.examples import Example
from esrl.data.files import nearest
from esrl.settings import to_toml
from esrl.training.checkpoint import unpack_json
from esrl.training.display import say
from esrl.training.run_folder import RunFolder

# they change no result, so a resumed run may have others: a smaller cache where memory ran out, say
_FREE = {
    *("gradient.micro_batch_tokens", "gradient.max_prompt_tokens", "gradient.max_logits", "step.logged_prompts"),
    *("likelihood.micro_batch_tokens", "sft.micro_batch_tokens", "sft.row_tokens", "reward_model.micro_batch_tokens"),
    *("sampling.max_cache_tokens", "sampling.max_prompt_tokens", "sampling.compaction_share", "sampling.max_logits"),
    *("reward.timeout_seconds", "reward.max_abstain_share", "reward.abstain_window"),
}
_MASKS = {
    "gradient.dropout": {"gradient.micro_batch_tokens", "gradient.max_prompt_tokens"},
    "likelihood.dropout": {"likelihood.micro_batch_tokens"},
    "sft.use_dropout": {"sft.micro_batch_tokens", "sft.row_tokens"},
    "reward_model.use_dropout": {"reward_model.micro_batch_tokens"},
}
"""What decides which dropout masks are drawn, where there are any."""


def fingerprint(config: RunConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """What must be the same when a run is resumed: the data, and every setting that has a say in the result and is not
    of length, saving and looking."""
    free = {"output_dir", "report_to", "training", "development", "data"}
    settings = {key: value for key, value in to_toml(pinned(config)).items() if key not in free}
    digest = stream_key(*(example.id for example in examples))
    flat = flatten(settings)
    masks = {name for dropout, names in _MASKS.items() if flat.get(dropout) for name in names}
    held = {key: value for key, value in flat.items() if key not in _FREE - masks}
    return {**held, "data": f"{len(examples)} examples, {digest:032x}"}


def accepted(config: RunConfig, run: RunFolder, now: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint with what the checkpoint has at the settings that may differ.

    Raises:
        ValueError: no such setting is compared.
    """
    checkpoint = run.latest() if config.accept_changes else None
    if checkpoint is None:
        return now
    state: Any = unpack_json(checkpoint.files["state.json"])
    saved, result = state["fingerprint"], dict(now)
    known = sorted({*saved, *now})
    for key in config.accept_changes:
        if key not in known:
            raise ValueError(
                f"accept_changes names {key!r}{nearest(key, known)}, which no resumed run is held to; leave it out."
            )
        before, after = saved.get(key), now.get(key)
        if run.is_main and before != after:
            say(f"accepted: {key} was {before!r} and is {after!r} from here on")
        result[key] = before
    return result


def signature(config: RLConfig) -> str:
    """What a run was, in sacreBLEU's manner."""
    allocation, baseline = config.allocation, config.baseline
    capability: str = config.capability.estimator
    if capability == "metric":
        capability = "+".join(config.reward.names)
    tau = f"{allocation.min_temperature}-{allocation.max_temperature}"
    if allocation.temperature_rule == "fixed":
        tau = str(allocation.fixed_temperature)
    parts = {
        "method": config.method,
        "alloc": allocation.allocator,
        "cap": capability,
        "k": allocation.max_samples,
        "beta": allocation.elimination_ratio,
        "tau": tau,
        "obj": config.objective.kind,
        "base": f"{baseline.kind}-{baseline.queue_size}" if baseline.kind == "fifo" else baseline.kind,
        **_learning(config),
        "seed": config.seed,
        "v": __version__,
    }
    return "esrl|" + "|".join(f"{key}:{value}" for key, value in parts.items())


def _learning(config: RLConfig) -> dict[str, Any]:
    """What the objective of this kind reads."""
    objective, step = config.objective, config.step
    parts: dict[str, Any] = {}
    if not objective.is_clipped:
        parts["alpha"] = objective.alpha
    if objective.is_clipped:
        parts["clip"] = f"{objective.clip_low}-{objective.clip_high}"
    if objective.kind != "ppo" and objective.is_clipped:
        parts["std"] = objective.std_norm
    if objective.kind in ("grpo", "ppo"):
        parts["norm"] = objective.length_norm
    if objective.kl_coefficient:
        parts["kl"] = f"{objective.kl_coefficient}-{objective.estimator}-{objective.place}"
    if step.num_updates > 1:
        parts["updates"] = f"{step.updates_per_batch}x{step.minibatches}"
    if config.lora is not None:
        parts["lora"] = f"{config.lora.rank}-4bit" if config.lora.load_in_4bit else config.lora.rank
    if config.precision != "float32":
        parts["prec"] = config.precision
    return parts


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        result |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result
