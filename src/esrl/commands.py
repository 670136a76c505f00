"""The commands as functions: a config in, a result out. Here the parts are put together, and nowhere else."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from esrl.algorithm.streams import stream_key
from esrl.config import MLEConfig, ModelConfig, RLConfig, RunConfig, pinned, signature
from esrl.data.examples import Example, limit_lengths
from esrl.data.files import nearest
from esrl.data.readers import DataConfig, load_examples
from esrl.evaluation.development import Development
from esrl.evaluation.scores import check_references, metrics_by_name
from esrl.judge import JudgeConfig, run_judge
from esrl.models.seq2seq import PRESETS, MarianPolicy, load_policy, new_policy
from esrl.models.tokenizer import train_tokenizer
from esrl.report import write_report
from esrl.rewards.calling import METRICS, build_reward
from esrl.settings import to_toml
from esrl.training.checkpoint import unpack_json
from esrl.training.display import say
from esrl.training.loop import Loop, LoopState
from esrl.training.method import Method
from esrl.training.mle import MLETask
from esrl.training.rl import RLTask
from esrl.training.run_folder import RESULT, RunFolder, environment, plain
from esrl.training.storage import remove_tree
from esrl.training.task import Task

REPORT = "report.html"
START = "start"
"""Where a run from scratch keeps its tokenizer and architecture."""

# they change no result, so a resumed run may have others: a smaller cache where memory ran out, say
_FREE = {
    *("gradient.micro_batch_tokens", "gradient.max_prompt_tokens", "gradient.max_logits"),
    *("likelihood.micro_batch_tokens", "step.logged_prompts"),
    *("sampling.max_cache_tokens", "sampling.max_prompt_tokens", "sampling.compaction_share", "sampling.max_logits"),
    *("reward.timeout_seconds", "reward.max_abstain_share", "reward.abstain_window"),
}
_MASKS = {"gradient.micro_batch_tokens", "gradient.max_prompt_tokens", "likelihood.micro_batch_tokens"}
"""What decides which dropout masks are drawn."""


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
    run = _run_folder(config, accelerator)
    with run.claim():
        training = _load(config.data, run.is_main)
        development = _development(config, run.is_main)
        _require(training, ("reference",), "maximum likelihood", config.data)
        policy = _policy(config, run, training)
        policy.model.to(accelerator.device)
        limits = config.likelihood
        kept = _within(training, policy, limits.max_source_tokens, limits.max_target_tokens, accelerator)
        task = MLETask(policy, kept, limits, development, config.seed)
        return _train(config, run, task, training, accelerator, "mle")


def rl(config: RLConfig) -> RunResult:
    """Reinforcement learning from a trained model."""
    accelerator = _accelerator(config)
    run = _run_folder(config, accelerator)
    with run.claim(), make_rl_task(config, accelerator) as task:
        return _train(config, run, task, task.examples, accelerator, signature(config))


def judge(config: JudgeConfig) -> dict[str, Any]:
    """Answers judged by a language model, one by one or in pairs; what is judged already is not asked for again.

    Returns:
        the result, as in ``output_dir/result.json``: totals, differences and wins with their intervals (docs/judge.md).
    """
    return run_judge(config)


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
    run: RunFolder,
    task: Task,
    examples: Sequence[Example],
    accelerator: Accelerator,
    label: str,
) -> RunResult:
    """Run the loop and write what a run leaves behind. The folder is begun last, when nothing else can be refused."""
    fingerprint = _fingerprint(config, examples)
    tracker = accelerator.log if config.report_to else None
    loop = Loop(
        task,
        config.training,
        config.optimizer,
        run,
        config.seed,
        _accepted(config, run, fingerprint),
        None if tracker is None else lambda values, step: tracker(_numbers(values), step=step),
    )
    with run:
        accelerator.wait_for_everyone()
        if config.report_to and run.is_main:
            accelerator.init_trackers("esrl", config=_flat(config))
        if run.is_main and not run.has_checkpoint and isinstance(config, MLEConfig) and config.model.path is None:
            run.write_model(task.export(), START)
        _resume(config, loop, task, fingerprint)
        if run.is_main and not loop.was_complete:
            run.write_config(to_toml(pinned(config)))
            run.write_json("environment.json", environment() | {"signature": label})
            say(label)
        state = loop.run()
        # a run may have been killed between its last checkpoint and its report
        if run.is_main and not (loop.was_complete and _is_finished(run, state)):
            _finish(run, state, label)
        accelerator.end_training()
    return _result(config.output_dir, state, loop.was_complete)


def _resume(config: RunConfig, loop: Loop, task: Task, fingerprint: dict[str, Any]) -> None:
    """Take the run up; accepted changes belong to it from here on."""
    loop.resume()
    loop.fingerprint = fingerprint
    state = loop.state
    if config.accept_changes and state.batch >= task.num_batches(state.epoch):  # the epoch has become shorter
        state.epoch, state.batch = state.epoch + 1, 0


def _accepted(config: RunConfig, run: RunFolder, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint with what the checkpoint has at the settings that may differ.

    Raises:
        ValueError: no such setting is compared.
    """
    checkpoint = run.latest() if config.accept_changes else None
    if checkpoint is None:
        return fingerprint
    state: Any = unpack_json(checkpoint.files["state.json"])
    saved, result = state["fingerprint"], dict(fingerprint)
    known = sorted({*saved, *fingerprint})
    for key in config.accept_changes:
        if key not in known:
            raise ValueError(
                f"accept_changes names {key!r}{nearest(key, known)}, which no resumed run is held to; leave it out."
            )
        before, now = saved.get(key), fingerprint.get(key)
        if run.is_main and before != now:
            say(f"accepted: {key} was {before!r} and is {now!r} from here on")
        result[key] = before
    return result


def _is_finished(run: RunFolder, state: LoopState) -> bool:
    """Whether the result is that of this state: a run that was extended has left an older one."""
    try:
        result = json.loads((run.path / RESULT).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get("steps") == state.step and (run.path / REPORT).is_file()


def _finish(run: RunFolder, state: LoopState, label: str) -> None:
    started = time.monotonic()
    remove_tree(run.path / REPORT)  # an older one must not stand beside the new result
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
    say(f"report: {run.path / REPORT} ({time.monotonic() - started:.1f} s)")


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
    """Accelerate's handle on processes, device and trackers; it would pass over a tracker that is not installed."""
    installed = {str(name) for name in get_available_trackers()}
    for name in config.report_to:
        if name in LoggerType and name != "all" and name not in installed:
            raise ValueError(f"report_to names {name!r}, whose package is not installed: pip install {name}.")
    trackers = list(config.report_to)
    return Accelerator(log_with=trackers or None, project_dir=config.output_dir if trackers else None)


def _run_folder(config: RunConfig, accelerator: Accelerator) -> RunFolder:
    """The run's folder, not begun; what the configuration alone shows to be wrong is refused."""
    _check_best_metric(config)
    model = config.model if isinstance(config, RLConfig) else None
    model = config.model.path if isinstance(config, MLEConfig) else model
    if config.overwrite and model is not None and Path(model).exists():
        inside = Path(model).resolve().is_relative_to(config.output_dir.resolve())
        if inside:
            raise ValueError(
                f"the model to start from, {model}, lies in {config.output_dir}, which --overwrite deletes. "
                "Choose another output_dir, or copy the model elsewhere first."
            )
    return RunFolder(
        config.output_dir,
        resume=config.resume,
        overwrite=config.overwrite,
        save_total_limit=config.training.save_total_limit,
        is_main=accelerator.is_main_process,
    )


def _load(data: DataConfig, show: bool) -> Sequence[Example]:
    loaded = load_examples(data)
    if show:
        say(loaded.report)
    return loaded.examples


def _development(config: RunConfig, show: bool) -> Development:
    development = config.development
    examples = () if development.data is None else _load(development.data, show)
    return Development(examples, development.metrics, development.decoding)


def _check_best_metric(config: RunConfig) -> None:
    metrics_by_name(config.development.metrics)
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
        say(report)
    return kept


def _policy(config: MLEConfig, run: RunFolder, training: Sequence[Example]) -> MarianPolicy:
    """The model to train: a folder's, or a new one whose tokenizer and first weights stay in the run folder."""
    model: ModelConfig = config.model
    if model.path is not None:
        return load_policy(model.path)
    if not run.has_checkpoint:  # a start that no checkpoint goes back to may be another configuration's
        texts = [text for example in training for text in (example.columns["source"], example.columns["reference"])]
        tokenizer = train_tokenizer(texts, model.vocab_size, model.max_length)
        return new_policy(PRESETS[model.preset], tokenizer, model.max_length, config.seed)
    return load_policy(run.path / START)


def _fingerprint(config: RunConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """What must be the same when a run is resumed: the data, and every setting that has a say in the result and is not
    of length, saving and looking."""
    free = {"output_dir", "report_to", "training", "development", "data"}
    settings = {key: value for key, value in to_toml(pinned(config)).items() if key not in free}
    digest = stream_key(*(example.id for example in examples))
    flat = _flatten(settings)
    has_dropout = flat.get("gradient.dropout") or flat.get("likelihood.dropout")
    ignored = _FREE - _MASKS if has_dropout else _FREE
    held = {key: value for key, value in flat.items() if key not in ignored}
    return {**held, "data": f"{len(examples)} examples, {digest:032x}"}


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
