"""The commands as functions: a config in, a result out. Here the parts are put together, and nowhere else."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from esrl.algorithm.streams import stream_key
from esrl.config import MLEConfig, ModelConfig, RLConfig, RunConfig, pinned, signature, to_toml
from esrl.data.examples import Example, limit_lengths
from esrl.data.readers import DataConfig, load_examples
from esrl.evaluation.development import Development
from esrl.evaluation.scores import check_references
from esrl.models.seq2seq import PRESETS, MarianPolicy, load_policy, new_policy
from esrl.models.tokenizer import train_tokenizer
from esrl.report import write_report
from esrl.rewards.calling import METRICS, build_reward
from esrl.training.loop import Loop, LoopState, Task, export_folder
from esrl.training.mle import MLETask
from esrl.training.rl import Method, RLTask
from esrl.training.run_folder import RunFolder, environment, plain

RESULT, REPORT = "result.json", "report.html"
START = "start"
"""Where a run from scratch keeps its tokenizer and architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run came to."""

    output_dir: Path
    steps: int
    seconds: float
    best_score: float | None
    best_step: int
    start_score: float | None
    already_complete: bool = False

    @property
    def model(self) -> Path:
        """The best model by the development metric; loads with ``from_pretrained``."""
        return self.output_dir / "model"


def mle(config: MLEConfig) -> RunResult:
    """Maximum likelihood, from scratch or from a model folder."""
    accelerator = _accelerator(config)
    training = _load(config.data, accelerator.is_main_process)
    development = _development(config, accelerator.is_main_process)
    _require(training, ("reference",), "maximum likelihood", config.data)
    limits = config.likelihood

    def task(run: RunFolder) -> Task:
        policy = _policy(config, run, training)
        policy.model.to(accelerator.device)
        kept = _within(training, policy, limits.max_source_tokens, limits.max_target_tokens, accelerator)
        return MLETask(policy, kept, limits, development, config.seed)

    return _train(config, task, training, accelerator, "mle")


def rl(config: RLConfig) -> RunResult:
    """Reinforcement learning from a trained model."""
    accelerator = _accelerator(config)
    with make_rl_task(config, accelerator) as task:
        return _train(config, lambda _: task, task.examples, accelerator, signature(config))


@contextmanager
def make_rl_task(config: RLConfig, accelerator: Accelerator | None = None) -> Iterator[RLTask]:
    """Put an RL step together: data, development set, reward, model, method."""
    accelerator = accelerator or _accelerator(config)
    training = _load(config.data, accelerator.is_main_process)
    development = _development(config, accelerator.is_main_process)
    with build_reward(config.reward) as reward:
        reward.check_columns(training[0].columns)
        built_in = [METRICS[name]() for name in config.reward.names if name in METRICS]
        check_references(built_in, (example.columns["reference"] for example in training if built_in))
        policy = load_policy(config.model)
        policy.model.to(accelerator.device)
        kept = _within(training, policy, config.step.max_source_tokens, None, accelerator)
        method = Method(
            allocation=config.allocation,
            capability=config.capability,
            objective=config.objective,
            baseline=config.baseline,
        )
        yield RLTask(
            policy, kept, method, config.step, config.sampling, config.gradient, reward, development, config.seed
        )


def _train(
    config: RunConfig,
    make_task: Callable[[RunFolder], Task],
    examples: Sequence[Example],
    accelerator: Accelerator,
    label: str,
) -> RunResult:
    """Open the run folder, run the loop, write what a run leaves behind."""
    _check_best_metric(config)
    run = RunFolder(
        config.output_dir,
        resume=config.resume,
        overwrite=config.overwrite,
        save_total_limit=config.training.save_total_limit,
        is_main=accelerator.is_main_process,
    )
    with run:
        accelerator.wait_for_everyone()
        if config.report_to and accelerator.is_main_process:
            accelerator.init_trackers("esrl", config=_flat(config))
        tracker = accelerator.log if config.report_to else None
        loop = Loop(
            make_task(run),
            config.training,
            config.optimizer,
            run,
            config.seed,
            _fingerprint(config, examples),
            None if tracker is None else lambda values, step: tracker(_numbers(values), step=step),
        )
        loop.resume()
        if accelerator.is_main_process and not loop.was_complete:
            run.write_config(to_toml(pinned(config)))
            run.write_json("environment.json", environment() | {"signature": label})
            print(label, file=sys.stderr)
        state = loop.run()
        # a run may have been killed between its last checkpoint and its report
        if accelerator.is_main_process and not (loop.was_complete and _is_finished(run)):
            _finish(run, state, label)
        accelerator.end_training()
    return _result(config.output_dir, state, loop.was_complete)


def _is_finished(run: RunFolder) -> bool:
    return all((run.path / name).is_file() for name in (RESULT, REPORT))


def _finish(run: RunFolder, state: LoopState, label: str) -> None:
    started = time.monotonic()
    result = {
        "signature": label,
        "steps": state.step,
        "training_seconds": state.seconds,
        "start_score": state.start_score,
        "best_score": state.best_score,
        "best_step": state.best_step,
    }
    run.write_json(RESULT, result)
    write_report([run.path], run.path / REPORT)
    print(f"report: {run.path / REPORT} ({time.monotonic() - started:.1f} s)", file=sys.stderr)


def _result(folder: Path, state: LoopState, already_complete: bool) -> RunResult:
    return RunResult(
        output_dir=folder,
        steps=state.step,
        seconds=state.seconds,
        best_score=state.best_score,
        best_step=state.best_step,
        start_score=state.start_score,
        already_complete=already_complete,
    )


def _accelerator(config: RunConfig) -> Accelerator:
    trackers = list(config.report_to)
    return Accelerator(log_with=trackers or None, project_dir=config.output_dir if trackers else None)


def _load(data: DataConfig, show: bool) -> Sequence[Example]:
    loaded = load_examples(data)
    if show:
        print(loaded.report, file=sys.stderr)
    return loaded.examples


def _development(config: RunConfig, show: bool) -> Development:
    development = config.development
    examples = () if development.data is None else _load(development.data, show)
    return Development(examples, development.metrics, development.decoding)


def _check_best_metric(config: RunConfig) -> None:
    names = [f"dev_{name}" for name in config.development.metrics]
    chosen = config.training.metric_for_best_model
    if config.development.data is not None and chosen not in names:
        raise ValueError(
            f"training.metric_for_best_model is {chosen!r}; development.metrics gives {', '.join(names) or 'none'}."
        )


def _require(examples: Sequence[Example], columns: Sequence[str], who: str, data: DataConfig) -> None:
    for name in columns:
        if name not in examples[0].columns:
            raise ValueError(f"{who} needs a {name} for every example, and the data has none; set data.{name}.")


def _within(
    examples: Sequence[Example],
    policy: MarianPolicy,
    max_source_tokens: int,
    max_target_tokens: int | None,
    accelerator: Accelerator,
) -> Sequence[Example]:
    """Leave out what is longer than the limits or the model allows, and say so."""

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
    if accelerator.is_main_process and report.skipped:
        print(report, file=sys.stderr)
    if not kept:
        raise ValueError("no training example is left within the length limits; raise max_source_tokens.")
    return kept


def _policy(config: MLEConfig, run: RunFolder, training: Sequence[Example]) -> MarianPolicy:
    """The model to train: a folder's, or a new one whose tokenizer and first weights stay in the run folder."""
    model: ModelConfig = config.model
    if model.path is not None:
        return load_policy(model.path)
    start = run.path / START
    if not run.has_checkpoint:  # a start that no checkpoint goes back to may be another configuration's
        texts = [text for example in training for text in (example.columns["source"], example.columns["reference"])]
        tokenizer = train_tokenizer(texts, model.vocab_size, model.max_length)
        policy = new_policy(PRESETS[model.preset], tokenizer, model.max_length, config.seed)
        if run.is_main:
            run.write_model(export_folder(policy.save), START)
        return policy
    return load_policy(start)


def _fingerprint(config: RunConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """What must be the same when a run is resumed: every setting but those of length, saving and looking, and the
    data."""
    free = {"output_dir", "resume", "overwrite", "report_to", "training", "development", "data"}
    settings = {key: value for key, value in to_toml(pinned(config)).items() if key not in free}
    digest = stream_key(*(example.id for example in examples))
    flat = _flatten(settings)
    return {**flat, "data": f"{len(examples)} examples, {digest:032x}"}


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        result |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result


def _flat(config: RunConfig) -> dict[str, Any]:
    flat = _flatten(plain(dataclasses.asdict(config)))
    return {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in flat.items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}
