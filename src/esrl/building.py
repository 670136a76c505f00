"""What a run is put together from before its task is: the policy, what makes its prompts, the examples that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esrl.algorithm.streams import seed_of
from esrl.config import MLEConfig, RewardModelConfig, RLConfig, RunConfig, absolute_model
from esrl.data.encoding import Encoder, PromptConfig, limit_prompts, within_positions
from esrl.data.examples import Example, LengthReport, limit_lengths
from esrl.data.preferences import ScoreEncoder, score_encoder
from esrl.evaluation.development import Development
from esrl.kernels import why_not
from esrl.models import adapters
from esrl.models.adapters import LoraSettings, add_adapter
from esrl.models.causal import CAUSAL_PRESETS, CausalPolicy, new_causal
from esrl.models.load import load_policy
from esrl.models.quantized import load_quantized
from esrl.models.seq2seq import PRESETS, MarianPolicy, new_policy
from esrl.models.tokenizer import train_tokenizer
from esrl.training.display import say
from esrl.training.ends import take_ends
from esrl.training.mle import MLETask
from esrl.training.reference import Reference, switched_reference
from esrl.training.sft import SFTTask


def models_of(config: RunConfig) -> list[str]:
    """The folders and hub names of models that a run starts from or asks."""
    if isinstance(config, MLEConfig):
        return [] if config.model.path is None else [config.model.path]
    if isinstance(config, RLConfig):
        reward = config.reward.model.path
        return [config.model] if reward is None else [config.model, str(reward)]
    return [config.model] if isinstance(config, RewardModelConfig) else []


def starting_policy(
    config: MLEConfig, start: Path | None, training: Sequence[Example], show: bool
) -> MarianPolicy | CausalPolicy:
    """The model that likelihood trains: a folder's, or a new one.

    Args:
        start: where a resumed run keeps the new model it began with; None: it begins now.
        training: what a new model's tokenizer is trained on.

    Raises:
        ValueError: new adapters over a new model, or over ones that are there.
    """
    model = config.model
    if model.path is not None:
        return with_adapters(base_policy(model.path, config.lora, show), config.lora, config.seed)
    if config.lora is not None:
        raise ValueError("lora needs a trained model under the adapters; set model.path, or leave lora out.")
    if start is not None:
        return load_policy(start)
    texts = [text for example in training for text in (example.columns["source"], example.columns["reference"])]
    tokenizer = train_tokenizer(texts, model.vocab_size, model.max_length)
    if model.preset in CAUSAL_PRESETS:
        return new_causal(CAUSAL_PRESETS[model.preset], tokenizer, model.max_length, config.seed)
    return new_policy(PRESETS[model.preset], tokenizer, model.max_length, config.seed)


def likelihood_task(
    config: MLEConfig, policy: MarianPolicy, training: Sequence[Example], development: Sequence[Example], show: bool
) -> MLETask:
    """Maximum likelihood of an encoder-decoder."""
    limits = config.likelihood
    kept = within_limits(training, policy, limits.max_source_tokens, limits.max_target_tokens, show)
    decoded = Development(development, config.development.metrics, config.development.decoding)
    return MLETask(policy, kept, limits, decoded, config.seed)


def fine_tuning_task(
    config: MLEConfig, policy: CausalPolicy, training: Sequence[Example], development: Sequence[Example], show: bool
) -> SFTTask:
    """Supervised fine-tuning of a causal model."""
    encoder = encoder_for(policy, config.prompts)
    assert encoder is not None, "a causal policy has one"
    kept = within_prompts(training, encoder, show, with_answers=True)
    decoded = Development(development, config.development.metrics, config.development.decoding, encoder)
    if config.sft.use_dropout:
        own_dropout(policy)
    task = SFTTask(
        policy.model,
        encoder,
        kept,
        config.sft,
        config.seed,
        development=within_prompts(development, encoder, show, with_answers=True),
        scores=lambda: decoded.evaluate(policy),
        save=policy.save,
        precision=config.precision,
    )
    if show and task.warning is not None:
        say(task.warning)
    return task


def base_policy(path: str, settings: LoraSettings | None, show: bool) -> MarianPolicy | CausalPolicy:
    """The model of a folder or hub name, in 4 bits where the adapters' settings say so."""
    path = absolute_model(path)  # adapters name their base, which must be found from anywhere
    quantized = settings is not None and settings.load_in_4bit
    policy: MarianPolicy | CausalPolicy = load_quantized(path) if quantized else load_policy(path)
    tell_notice(policy, show)
    return policy


def tell_notice(policy: MarianPolicy | CausalPolicy, show: bool) -> None:
    """Say what a user should know of how this model is run, where there is something."""
    if show and policy.notice is not None:
        say(policy.notice)
    if show and policy.device.type == "cpu" and why_not() is not None:
        say(f"Sampling runs without compiled kernels, up to 2.5 times as long (docs/performance.md): {why_not()}.")


def with_adapters(
    policy: MarianPolicy | CausalPolicy, settings: LoraSettings | None, seed: int
) -> MarianPolicy | CausalPolicy:
    """The policy with new adapters around it, whose first weights the seed decides; without settings as it is."""
    if settings is None:
        return policy
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("adapters", seed))
        return add_adapter(policy, settings)


def reference_of(policy: MarianPolicy | CausalPolicy, config: RLConfig) -> Reference | None:
    """The model under new adapters, without a second copy; None where there are none, or nothing stays close to it.

    Adapters that came with the model do not count: without them it would not be the model that was given.
    """
    if config.lora is None or config.objective.kl_coefficient == 0:
        return None
    return switched_reference(policy, config.gradient, lambda: adapters.reference(policy))


def encoder_for(
    policy: MarianPolicy | CausalPolicy, prompts: PromptConfig, max_new_tokens: int | None = None
) -> Encoder | None:
    """What makes token ids of a causal policy's prompts, all of which leave room for an answer; the policy now ends its
    answers by the encoder's end tokens. None for an encoder-decoder.

    Args:
        max_new_tokens: longest answer where answers are sampled; None: ``prompts.max_target_tokens``.

    Raises:
        ValueError: the model's positions leave no room for a prompt.
    """
    if not isinstance(policy, CausalPolicy):
        return None
    if max_new_tokens is not None:
        if max_new_tokens >= policy.max_length:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, but the model has {policy.max_length} positions for prompt and "
                "answer together; lower it."
            )
        prompts = replace(prompts, max_target_tokens=max_new_tokens)
    encoder = Encoder(policy.tokenizer, within_positions(prompts, policy.max_length))
    take_ends(policy, encoder)
    return encoder


def pair_encoder(model: Any, tokenizer: Any, prompts: PromptConfig) -> ScoreEncoder:
    """What makes a reward model's inputs, all of which fit into its positions.

    Raises:
        ValueError: the positions leave no room for a prompt.
    """
    encoder, config = score_encoder(tokenizer, prompts), model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return encoder
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1  # their positions start behind PAD
    return score_encoder(tokenizer, within_positions(prompts, positions - encoder.special_tokens))


def own_dropout(policy: CausalPolicy) -> None:
    """Give a model its configuration's dropout rates again, which a policy has set to 0.

    Raises:
        ValueError: they are 0 throughout.
    """
    with torch.device("meta"):
        fresh = dict(type(policy.plain)(policy.plain.config).named_modules())
    for name, module in policy.plain.named_modules():
        for field, rate in _dropout_rates(fresh[name]).items() if name in fresh else ():
            setattr(module, field, rate)
    require_dropout(policy.plain, "sft.use_dropout")


def require_dropout(model: Any, key: str) -> None:
    """Refuse to train with dropout where the model has none.

    Raises:
        ValueError: the key and the model's type.
    """
    if not any(rate > 0 for module in model.modules() for rate in _dropout_rates(module).values()):
        kind = model.config.model_type
        raise ValueError(f"{key} is true, but this {kind} model's configuration has no dropout; set {key} = false.")


def _dropout_rates(module: nn.Module) -> dict[str, float]:
    """Dropout rates of a module, by attribute."""
    if isinstance(module, nn.Dropout):
        return {"p": module.p}
    known = {name: value for name, value in vars(module).items() if name.endswith("dropout")}
    return {name: value for name, value in known.items() if isinstance(value, float | int)}


def within_limits(
    examples: Sequence[Example],
    policy: MarianPolicy | CausalPolicy,
    max_source_tokens: int,
    max_target_tokens: int | None,
    show: bool,
) -> Sequence[Example]:
    """Leave out what is longer than the limits or an encoder-decoder allows, and say so."""

    def tokenize(texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = policy.tokenizer(texts)["input_ids"]
        return rows

    kept, report = limit_lengths(
        examples,
        tokenize,
        max_source_tokens=min(max_source_tokens, policy.max_length),
        max_target_tokens=None if max_target_tokens is None else min(max_target_tokens, policy.max_length),
        rule="skip",
    )
    tell_lengths(report, show)
    return kept


def within_prompts(
    examples: Sequence[Example], encoder: Encoder, show: bool, *, with_answers: bool
) -> Sequence[Example]:
    """Apply a causal model's rule for over-long prompts (and answers, where they are trained on), and say so."""
    kept, report = limit_prompts(examples, encoder, with_answers=with_answers)
    tell_lengths(report, show)
    return kept


def tell_lengths(report: LengthReport, show: bool) -> None:
    """Say what was left out or will be cut; nothing where nothing was too long."""
    if show and (report.skipped or report.long_sources):
        say(report)
