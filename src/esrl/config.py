"""The composition root: one dataclass a command, and what methods, paths and flags mean for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.capability import CapabilityConfig
from esrl.algorithm.objectives import ObjectiveConfig
from esrl.data.encoding import PromptConfig
from esrl.data.readers import DataConfig
from esrl.data.tables import is_table_name
from esrl.evaluation.decode import DecodingConfig
from esrl.models.adapters import LoraSettings
from esrl.models.precision import Precision
from esrl.rewards.calling import RewardConfig
from esrl.sampling.engine import SamplingConfig
from esrl.settings import build, merge
from esrl.training.gradient import GradientConfig
from esrl.training.loop_config import LoopConfig
from esrl.training.method import StepConfig
from esrl.training.mle import LikelihoodConfig
from esrl.training.optimization import OptimizerConfig
from esrl.training.reward_model import PairwiseConfig
from esrl.training.sft import SFTConfig

Config = TypeVar("Config")
MethodName = Literal["esrl", "reinforce", "mrt", "grpo", "rloo", "ppo"]

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    # the class defaults, written out: `--method esrl` must undo what a file says of another method
    "esrl": {
        "allocation": {"allocator": "esrl", "temperature_rule": "paper"},
        "objective": {"kind": "fused", "kl_coefficient": 0.0},
        "baseline": {"kind": "fifo"},
    },
    # the paper's REINFORCE row: tau .95 and a moving-average baseline
    "reinforce": {
        "allocation": {"allocator": "uniform", "temperature_rule": "fixed", "fixed_temperature": 0.95},
        "objective": {"kind": "reinforce", "kl_coefficient": 0.0},
        "baseline": {"kind": "moving_average"},
    },
    "mrt": {
        "allocation": {"allocator": "uniform", "temperature_rule": "fixed", "fixed_temperature": 1.0},
        "objective": {"kind": "mrt", "kl_coefficient": 0.0},
        "baseline": {"kind": "none"},
    },
    # TRL's defaults: no divergence from a reference in GRPO, 0.05 of it off the rewards of sequences in RLOO
    "grpo": {
        "allocation": {"allocator": "uniform", "temperature_rule": "fixed", "fixed_temperature": 1.0},
        "objective": {"kind": "grpo", "kl_coefficient": 0.0},
        "baseline": {"kind": "prompt_mean"},
    },
    "rloo": {
        "allocation": {"allocator": "uniform", "temperature_rule": "fixed", "fixed_temperature": 1.0},
        "objective": {"kind": "rloo", "kl_coefficient": 0.05},
        "baseline": {"kind": "leave_one_out"},
    },
    # the paper's RLHF setting: KL .1 off the rewards of tokens, with the critic's defaults
    "ppo": {
        "allocation": {"allocator": "uniform", "temperature_rule": "fixed", "fixed_temperature": 1.0},
        "objective": {"kind": "ppo", "kl_coefficient": 0.1},
        "baseline": {"kind": "none"},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What `esrl mle` trains."""

    path: str | None = None
    """A folder or hub name to fine-tune, Marian-type or causal; unset: a new model of `preset`."""
    preset: Literal["tiny", "small", "iwslt", "base", "demo", "llama-tiny", "llama-small"] = "tiny"
    """Sizes of a new model: tiny (256 wide, 3+3 layers, inner 512), small (inner 1024: 8 M parameters with 10,000
    pieces), iwslt (512 wide, 6+6, inner 1024) or base (Vaswani et al.); causal ones are llama-tiny (256 wide, 4 layers,
    inner 768) and llama-small (384 wide, 6 layers, inner 1152: 14 M parameters with 6,000 pieces)."""
    vocab_size: int = 6000
    """Pieces of the joint BPE trained on the data of a new model."""
    max_length: int = 256
    """Positions of a new model."""

    def __post_init__(self) -> None:
        if self.vocab_size < 4 or self.max_length < 2:
            raise ValueError("vocab_size must be 4 or more and max_length 2 or more.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DevelopmentConfig:
    """The development set; without a source nothing is evaluated and the last model is kept."""

    data: DataConfig | None = None
    """Where the development examples are."""
    metrics: tuple[str, ...] = ("bleu",)
    """bleu, chrf, rouge_l, exact_match, gsm8k: each gives `dev_<name>`. A causal model's fine-tuning also gives
    `dev_log_prob`; with no metric here it decodes nothing and goes by that."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """How they are decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What every training command has."""

    output_dir: Path
    """The run's folder."""
    seed: int = 1
    """Of everything random in the run."""
    precision: Precision = "float32"
    """Of matrix products: float32, or bfloat16 by autocast, for GPUs and processors that have it; weights, gradients
    and the optimizer's state stay float32."""
    report_to: tuple[str, ...] = ()
    """Trackers of Accelerate: tensorboard, wandb, trackio, mlflow, ..."""
    resume: bool = False
    """Go on with the run in output_dir."""
    accept_changes: tuple[str, ...] = ()
    """With resume: settings that may differ from the run's own, such as objective.alpha, or data; from here on the new
    ones hold."""
    overwrite: bool = False
    """Delete the run in output_dir, once everything the new one needs is found to be there."""
    data: DataConfig
    """Training examples."""
    development: DevelopmentConfig = field(default_factory=DevelopmentConfig)
    """Development examples."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    training: LoopConfig = field(default_factory=lambda: LoopConfig(num_epochs=10))
    """Length of the run (10 epochs, unless num_epochs says otherwise), evaluation, saving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MLEConfig(RunConfig):
    """`esrl mle`: maximum likelihood, from scratch or from a model folder; of causal models, supervised fine-tuning."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What to train."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """The loss of an encoder-decoder, and its batches."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """How prompts and answers become token ids of a causal model."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """The batches of a causal model."""
    lora: LoraSettings | None = None
    """Train low-rank adapters of a model folder alone; unset: all weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig(RunConfig):
    """`esrl rl`: reinforcement learning from a trained model."""

    model: str
    """The folder or hub name to start from, Marian-type or causal."""
    method: MethodName = "esrl"
    """esrl, reinforce, mrt, grpo, rloo or ppo: names for settings of allocation, objective and baseline. A TOML file,
    flags and `esrl.rl_config` fill them in; they may be overridden, but for the objective of all but esrl."""
    step: StepConfig = field(default_factory=StepConfig)
    """Batch, duplicates, updates from a batch of samples."""
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    """How the sampling budget is spent (eq. 8, eq. 9)."""
    capability: CapabilityConfig = field(default_factory=CapabilityConfig)
    """How capability is estimated (eq. 6, eq. 7)."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss (eq. 3, 4, 5; GRPO, RLOO, PPO) and the divergence from the reference policy."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """What rewards are compared with."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """What stage one draws from, and its limits."""
    gradient: GradientConfig = field(default_factory=GradientConfig)
    """Memory of stage two."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What is optimized."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """How prompts become token ids of a causal model; an answer's limit is sampling.max_new_tokens."""
    lora: LoraSettings | None = None
    """Train low-rank adapters alone: the reference policy is then the model without them. Unset: all weights."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}.")
        kind = METHODS[self.method]["objective"]["kind"]
        # esrl is the name of whatever is composed by hand; the others would be wrong names without their objective
        if self.method != "esrl" and self.objective.kind != kind:
            raise ValueError(
                f"method {self.method!r} needs objective.kind {kind!r}, but it is {self.objective.kind!r}. Leave "
                f"objective.kind out; in Python, esrl.rl_config({self.method!r}, ...) sets what the method needs."
            )
        if self.sampling.truncation is not None and self.objective.score_temperature == "sampling":
            raise ValueError(
                'objective.score_temperature is "sampling", which scores over the whole vocabulary, but sampling.top_k,'
                " top_p or min_p draw from a part of it. Leave them out, or score at temperature one: "
                "importance_weights then correct for both, as far as tokens can be drawn."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelConfig(RunConfig):
    """`esrl reward-model`: a score for an answer to a prompt, learnt from pairs (data.format = "preferences")."""

    model: str
    """The folder or hub name to start from: a causal model or an encoder, which gets a new head, or a reward model."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """How prompts and answers become token ids."""
    reward_model: PairwiseConfig = field(default_factory=PairwiseConfig)
    """The loss and its batches."""
    lora: LoraSettings | None = None
    """Train low-rank adapters and the head alone; the saved folder is a whole model. Unset: all weights."""
    development: DevelopmentConfig = field(default_factory=lambda: DevelopmentConfig(metrics=()))
    """Development pairs (`data`); nothing is decoded."""
    training: LoopConfig = field(default_factory=lambda: LoopConfig(num_epochs=1, metric_for_best_model="dev_accuracy"))
    """Length of the run (1 epoch, unless num_epochs says otherwise), evaluation, saving."""

    def __post_init__(self) -> None:
        if self.lora is not None and self.lora.load_in_4bit:
            raise ValueError("lora.load_in_4bit is for esrl rl and mle; a reward model is saved whole: leave it out.")


def rl_config(method: str, **values: Any) -> RLConfig:
    """An RL configuration: the settings of a method and, above them, ``values``, nested as in a TOML file.

        rl_config("mrt", model="runs/mle/model", output_dir="runs/mrt", data={"path": "train.tsv"},
                  allocation={"max_samples": 10})

    Raises:
        ValueError: an unknown method or key (with the nearest one), a wrong type or a value out of bounds.
    """
    return build(RLConfig, with_method({**values, "method": method}, METHODS, None), "rl_config")


def model_path(value: str, folder: Path | None) -> str:
    """A model folder relative to the config file; a hub name stays."""
    if folder is not None and not Path(value).is_absolute():
        beside = Path(os.path.normpath(folder / value))
        if beside.exists() or value.startswith((".", "/")) or value.count("/") != 1:
            return str(beside)
    return value


def reward_path(value: str, folder: Path | None) -> str:
    """``path/to/file.py:name`` relative to the config file; any other name of a reward stays."""
    file, colon, name = value.rpartition(":")
    return str((folder or Path()).absolute() / file) + colon + name if file.endswith(".py") else value


def absolute_model(value: str) -> str:
    """A model folder as a path that holds from anywhere; a hub name stays."""
    return str(Path(value).absolute()) if Path(value).exists() else value


def locate(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve the paths that are strings against the config file's folder; what is no string is left to ``build``."""
    model, reward = values.get("model"), values.get("reward")
    result = dict(values)
    if isinstance(model, str):
        result["model"] = model_path(model, folder)
    elif isinstance(model, dict) and isinstance(model.get("path"), str):
        result["model"] = {**model, "path": model_path(model["path"], folder)}
    if isinstance(reward, dict) and isinstance(reward.get("names"), list):
        names = [reward_path(name, folder) if isinstance(name, str) else name for name in reward["names"]]
        result["reward"] = {**reward, "names": names}
    return result


def with_method(values: dict[str, Any], presets: Mapping[str, dict[str, Any]], flag: str | None) -> dict[str, Any]:
    """A file's own method comes below what the file says; another one, given as a flag, above it."""
    named = values.get("method", "esrl")
    if flag is not None and flag in presets and flag != named:
        return merge(values, {**presets[flag], "method": flag})
    return merge(presets.get(named, {}) if isinstance(named, str) else {}, values)


def data_of_flags(values: dict[str, Any], flag: Callable[[str], str | None]) -> dict[str, Any]:
    """The file's values without the parallel text for which a flag names a table, or the other way round.

    Args:
        flag: the value of a flag by its name, such as ``--data.path``; None where it was not given.
    """
    result = dict(values)
    if isinstance(data := values.get("data"), Mapping):
        result["data"] = _kind_of_flags(data, "--data", flag)
    development = values.get("development")
    if isinstance(development, Mapping) and isinstance(data := development.get("data"), Mapping):
        result["development"] = {**development, "data": _kind_of_flags(data, "--development.data", flag)}
    return result


def _kind_of_flags(data: Mapping[str, Any], prefix: str, flag: Callable[[str], str | None]) -> dict[str, Any]:
    for name, other in (("path", ("source", "reference")), ("source", ("path",))):
        value = flag(f"{prefix}.{name}")
        if value is not None and other[0] in data:
            return {key: kept for key, kept in data.items() if key not in other} | {name: value}
    return dict(data)


def settle(config: Config, folder: Path | None, flags: Collection[str] = ()) -> Config:
    """Give data without a ``root`` one: the development data that of the training data, those the config's folder.

    Args:
        flags: those on the command line; paths they gave start from the current folder, or from a root they gave.
    """
    data = getattr(config, "data", None)
    if not isinstance(data, DataConfig):
        return config
    data = _from_here(data, "--data", flags)
    if data.root is None and folder is not None:
        data = dataclasses.replace(data, root=folder)
    changes: dict[str, Any] = {"data": data}
    development = getattr(config, "development", None)
    if development is not None and development.data is not None:
        rooted = _from_here(development.data, "--development.data", flags)
        if rooted.root is None:
            rooted = dataclasses.replace(rooted, root=data.root)
        changes["development"] = dataclasses.replace(development, data=rooted)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _from_here(data: DataConfig, prefix: str, flags: Collection[str]) -> DataConfig:
    changes: dict[str, Any] = {}
    for name in ("source", "reference", "path"):
        value = getattr(data, name)
        value = value if value is None else type(value)(os.path.expanduser(value))
        is_file = name != "path" or (value is not None and (is_table_name(value) or Path(value).exists()))
        if f"{prefix}.{name}" in flags and f"{prefix}.root" not in flags and value is not None and is_file:
            changes[name] = type(value)(Path(value).absolute())
    return dataclasses.replace(data, **changes) if changes else data


def pinned(config: RunConfig) -> RunConfig:
    """The same configuration with absolute paths, so that it means the same from anywhere."""

    def root(data: DataConfig) -> DataConfig:
        return dataclasses.replace(data, root=(data.root or Path()).absolute())

    changes: dict[str, Any] = {"output_dir": config.output_dir.absolute(), "data": root(config.data)}
    if config.development.data is not None:
        changes["development"] = dataclasses.replace(config.development, data=root(config.development.data))
    if isinstance(config, MLEConfig) and config.model.path is not None:
        changes["model"] = dataclasses.replace(config.model, path=absolute_model(config.model.path))
    if isinstance(config, RLConfig | RewardModelConfig):
        changes["model"] = absolute_model(config.model)
    if isinstance(config, RLConfig):
        changes["reward"] = _pinned_reward(config.reward)
    return dataclasses.replace(config, **changes)


def _pinned_reward(reward: RewardConfig) -> RewardConfig:
    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    return dataclasses.replace(
        reward,
        names=tuple(reward_path(name, None) for name in reward.names),
        model=dataclasses.replace(reward.model, path=absolute(reward.model.path)),
        json_schema=dataclasses.replace(reward.json_schema, path=absolute(reward.json_schema.path)),
    )
