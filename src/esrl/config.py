"""The composition root: one dataclass a command, read from TOML, then from flags, then put together."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from esrl import __version__
from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.capability import CapabilityConfig
from esrl.algorithm.objectives import ObjectiveConfig
from esrl.data.readers import DataConfig
from esrl.data.tables import is_table_name
from esrl.evaluation.decode import DecodingConfig
from esrl.rewards.calling import RewardConfig
from esrl.sampling.engine import SamplingConfig
from esrl.training.gradient import GradientConfig
from esrl.training.loop import LoopConfig
from esrl.training.mle import LikelihoodConfig
from esrl.training.optimization import OptimizerConfig
from esrl.training.rl import StepConfig

Config = TypeVar("Config")
MethodName = Literal["esrl", "reinforce", "mrt"]

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    # the class defaults, written out: `--method esrl` must undo what a file says of another method
    "esrl": {
        "allocation": {"allocator": "esrl", "temperature_rule": "paper"},
        "objective": {"kind": "fused"},
        "baseline": {"kind": "fifo"},
    },
    # the paper's REINFORCE row: tau .95 and a moving-average baseline
    "reinforce": {
        "allocation": {"allocator": "uniform", "temperature_rule": "fixed", "fixed_temperature": 0.95},
        "objective": {"kind": "reinforce"},
        "baseline": {"kind": "moving_average"},
    },
    "mrt": {
        "allocation": {"allocator": "uniform", "temperature_rule": "fixed", "fixed_temperature": 1.0},
        "objective": {"kind": "mrt"},
        "baseline": {"kind": "none"},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What `esrl mle` trains."""

    path: str | None = None
    """A Marian-type folder or hub name to fine-tune; unset: a new model of `preset`."""
    preset: Literal["tiny", "small", "iwslt", "base", "demo"] = "tiny"
    """Sizes of a new model: tiny (256 wide, 3+3 layers, inner 512), small (inner 1024: 8 M parameters with 10,000
    pieces), iwslt (512 wide, 6+6, inner 1024) or base (Vaswani et al.)."""
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
    """bleu, chrf, rouge_l, exact_match: each gives `dev_<name>`."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """How they are decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What every training command has."""

    output_dir: Path
    """The run's folder."""
    seed: int = 1
    """Of everything random in the run."""
    report_to: tuple[str, ...] = ()
    """Trackers of Accelerate: tensorboard, wandb, trackio, mlflow, ..."""
    resume: bool = False
    """Go on with the run in output_dir."""
    overwrite: bool = False
    """Delete the run in output_dir first."""
    data: DataConfig
    """Training examples."""
    development: DevelopmentConfig = field(default_factory=DevelopmentConfig)
    """Development examples."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    training: LoopConfig = field(default_factory=lambda: LoopConfig(num_epochs=10))
    """Length of the run, evaluation, saving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MLEConfig(RunConfig):
    """`esrl mle`: maximum likelihood, from scratch or from a model folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What to train."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """The loss and its batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig(RunConfig):
    """`esrl rl`: reinforcement learning from a trained model."""

    model: str
    """The Marian-type folder or hub name to start from."""
    method: MethodName = "esrl"
    """esrl, reinforce or mrt: names for settings of allocation, objective and baseline, which may be overridden."""
    step: StepConfig = field(default_factory=StepConfig)
    """Batch, duplicates."""
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    """How the sampling budget is spent (eq. 8, eq. 9)."""
    capability: CapabilityConfig = field(default_factory=CapabilityConfig)
    """How capability is estimated (eq. 6, eq. 7)."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss (eq. 3, 4, 5)."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """What rewards are compared with."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Limits of stage one."""
    gradient: GradientConfig = field(default_factory=GradientConfig)
    """Memory of stage two."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What is optimized."""


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
        "alpha": config.objective.alpha,
        "seed": config.seed,
        "v": __version__,
    }
    return "esrl|" + "|".join(f"{key}:{value}" for key, value in parts.items())


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
        return merge(values, presets[flag])
    return merge(presets.get(named, {}) if isinstance(named, str) else {}, values)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        ValueError: no such file, or no valid TOML, with the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"{path}: {reason}. Give a TOML file; configs/ has commented examples.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}.") from error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts, the second one winning."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def build(
    cls: type[Config],
    values: Mapping[str, Any],
    origin: str,
    folder: Path | None = None,
    where: str = "",
    missing: Any = None,
) -> Config:
    """Make a config dataclass from nested values, checking every key and type.

    Args:
        origin: what to name in errors, the file.
        folder: relative paths are resolved against it.
        missing: what stands for a required key that is absent; None makes that an error.

    Raises:
        ValueError: an unknown key (with the nearest one), a missing key, a wrong type or a value out of bounds.
    """
    hints = get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f" Did you mean {where}{near[0]}?" if near else f" There are: {', '.join(known)}."
            raise ValueError(f"{origin}: unknown key {name}.{hint}")
        # where there is a root, the other paths start from it
        start = None if "root" in known and key != "root" else folder
        arguments[key] = _convert(value, hints[key], origin, start, name)
    for key, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and key not in arguments and missing is not None:
            arguments[key] = _blank(hints[key]) if dataclasses.is_dataclass(hints[key]) else missing
        elif required and key not in arguments:
            raise ValueError(f"{origin}: {where}{key} is missing. {_doc_hint(key)}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{origin}: {where.rstrip('.') + ': ' if where else ''}{error}") from error


def _blank(cls: Any) -> Any:
    """The defaults without the checks, which flags may still satisfy."""
    instance = object.__new__(cls)
    for entry in dataclasses.fields(cls):
        object.__setattr__(instance, entry.name, entry.default)
    return instance


def _doc_hint(key: str) -> str:
    hints = {
        "model": 'Set it to a model folder: model = "runs/mle/model".',
        "output_dir": 'Set the run\'s folder: output_dir = "runs/NAME".',
        "data": "Add a [data] table that says where the examples are.",
    }
    return hints.get(key, "Set it.")


def _convert(value: Any, hint: Any, origin: str, folder: Path | None, name: str) -> Any:  # noqa: C901
    """One value to its declared type, or an error that says both."""
    kind = get_origin(hint)
    if kind in (typing.Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        if value is False and bool not in options and len(options) < len(get_args(hint)):
            return None  # TOML has no null: `false` unsets what may be unset
        return _convert(value, options[0] if len(options) == 1 else _pick(value, options), origin, folder, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{origin}: {name} is {value!r}; it must be a table, [{name}].")
        return build(hint, value, origin, folder, f"{name}.")
    if kind is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{origin}: {name} is {value!r}; choose one of {choices}.")
        return value
    if kind is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{origin}: {name} is {value!r}; it must be a list.")
        return tuple(_convert(item, get_args(hint)[0], origin, folder, name) for item in value)
    if hint is Path and isinstance(value, str | Path):
        path = Path(value).expanduser()
        return path if folder is None or path.is_absolute() else Path(os.path.normpath(folder / path))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{origin}: {name} is {value!r}; it must be {_article(hint)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{origin}: {name} is {value}; it must be finite.")
    return value


def _pick(value: Any, options: Sequence[Any]) -> Any:
    return next((option for option in options if isinstance(option, type) and isinstance(value, option)), options[0])


def _article(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a path"}
    return names.get(hint, str(hint))


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
        is_file = name != "path" or (value is not None and (is_table_name(value) or Path(value).exists()))
        if f"{prefix}.{name}" in flags and f"{prefix}.root" not in flags and value is not None and is_file:
            changes[name] = type(value)(Path(value).absolute())
    return dataclasses.replace(data, **changes) if changes else data


def pinned(config: RunConfig) -> RunConfig:
    """The same configuration with absolute paths, so that it means the same from anywhere."""

    def root(data: DataConfig) -> DataConfig:
        return dataclasses.replace(data, root=(data.root or Path()).absolute())

    def model(value: str) -> str:
        return str(Path(value).absolute()) if Path(value).exists() else value

    changes: dict[str, Any] = {"output_dir": config.output_dir.absolute(), "data": root(config.data)}
    if config.development.data is not None:
        changes["development"] = dataclasses.replace(config.development, data=root(config.development.data))
    if isinstance(config, MLEConfig) and config.model.path is not None:
        changes["model"] = dataclasses.replace(config.model, path=model(config.model.path))
    if isinstance(config, RLConfig):
        names = tuple(reward_path(name, None) for name in config.reward.names)
        changes |= {"model": model(config.model), "reward": dataclasses.replace(config.reward, names=names)}
    return dataclasses.replace(config, **changes)


def to_toml(config: Any) -> dict[str, Any]:
    """Nested values that ``build`` makes the same configuration of, but for ``resume`` and ``overwrite``: whoever uses
    a run's configuration again must ask for these again."""
    result: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.name in ("resume", "overwrite") or (value is None and entry.default is None):
            continue
        if dataclasses.is_dataclass(value):
            result[entry.name] = to_toml(value)
        elif isinstance(value, tuple):
            result[entry.name] = list(value)
        elif value is None:
            result[entry.name] = False
        else:
            result[entry.name] = str(value) if isinstance(value, Path) else value
    return result
