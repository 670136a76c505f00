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

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from esrl.building import (
    base_policy,
    encoder_for,
    fine_tuning_task,
    likelihood_task,
    models_of,
    pair_encoder,
    reference_of,
    require_dropout,
    starting_policy,
    tell_lengths,
    with_adapters,
    within_limits,
    within_prompts,
)
from esrl.config import MLEConfig, RewardModelConfig, RLConfig, RunConfig, pinned
from esrl.data.examples import Example
from esrl.data.preferences import limit_pairs
from esrl.data.readers import DataConfig, load_examples
from esrl.evaluation.development import Development
from esrl.evaluation.scores import check_references, metrics_by_name
from esrl.fingerprint import accepted, fingerprint, flatten, signature
from esrl.judge import JudgeConfig, run_judge
from esrl.models.causal import CausalPolicy
from esrl.models.quantized import require_quantization
from esrl.report import write_report
from esrl.rewards.calling import METRICS, RewardConfig, build_reward
from esrl.rewards.text import ExactMatch, Metric
from esrl.settings import to_toml
from esrl.training.display import say
from esrl.training.loop import Loop, LoopState
from esrl.training.method import Method
from esrl.training.reward_model import RewardModelTask, load_classifier, set_padding
from esrl.training.rl import RLTask
from esrl.training.run_folder import RESULT, RunFolder, environment, plain
from esrl.training.storage import remove_tree
from esrl.training.task import Task

REPORT = "report.html"
START = "start"
"""Where a run from scratch keeps its tokenizer and architecture."""
PAIRS = "reward_model.json"
"""How good a reward model is on the development pairs."""
LOG_PROB = "dev_log_prob"
PAIR_SCORES = ("dev_accuracy", "dev_margin", "dev_accuracy_chosen_shorter", "dev_accuracy_matched")


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
    """Maximum likelihood, from scratch or from a model folder; of a causal model, supervised fine-tuning."""
    if not config.development.metrics and config.training.metric_for_best_model == "dev_bleu":
        training_config = dataclasses.replace(config.training, metric_for_best_model=LOG_PROB)
        config = dataclasses.replace(config, training=training_config)
    accelerator = _accelerator(config)
    run = _run_folder(config, accelerator)
    with run.claim():
        training = _load(config.data, run.is_main)
        development = _load(config.development.data, run.is_main)
        _require(training, ("reference",), "maximum likelihood", config.data)
        policy = starting_policy(config, run.path / START if run.has_checkpoint else None, training, run.is_main)
        policy.model.to(accelerator.device)
        policy.precision = config.precision
        task: Task
        if isinstance(policy, CausalPolicy):
            task = fine_tuning_task(config, policy, training, development, run.is_main)
        else:
            _check_best_metric(config, _decoded(config))
            task = likelihood_task(config, policy, training, development, run.is_main)
        return _train(config, run, task, training, accelerator, "mle")


def rl(config: RLConfig) -> RunResult:
    """Reinforcement learning from a trained model."""
    accelerator = _accelerator(config)
    run = _run_folder(config, accelerator)
    with run.claim(), make_rl_task(config, accelerator) as task:
        return _train(config, run, task, task.examples, accelerator, signature(config))


def reward_model(config: RewardModelConfig) -> RunResult:
    """A reward model from pairs of a better and a worse answer; how good it is stands in reward_model.json."""
    accelerator = _accelerator(config)
    run = _run_folder(config, accelerator)
    with run.claim():
        training = _load(config.data, run.is_main)
        development = _load(config.development.data, run.is_main)
        _require_pairs(training, "data")
        _require_pairs(development, "development.data")
        model, tokenizer = load_classifier(config.model, config.seed, lora=config.lora)
        if config.reward_model.use_dropout:
            require_dropout(model, "reward_model.use_dropout")
        encoder = pair_encoder(model, tokenizer, config.prompts)
        pairs = []
        for examples in (training, development):
            kept, report = limit_pairs(examples, encoder)
            tell_lengths(report, run.is_main)
            pairs.append(kept)
        task = RewardModelTask(
            model.to(accelerator.device),
            tokenizer,
            encoder,
            pairs[0],
            config.reward_model,
            config.seed,
            development=pairs[1],
            precision=config.precision,
        )
        return _train(config, run, task, training, accelerator, "reward-model")


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
    show = accelerator.is_main_process
    training = _load(config.data, show)
    examples = _load(config.development.data, show)
    with build_reward(config.reward) as reward:
        reward.check_columns(training[0].columns)
        built_in = _metrics(config.reward)
        check_references(built_in, (example.columns["reference"] for example in training if built_in))
        policy = with_adapters(base_policy(config.model, config.lora, show), config.lora, config.seed)
        policy.model.to(accelerator.device)
        policy.precision = config.precision
        encoder = encoder_for(policy, config.prompts, config.sampling.max_new_tokens)
        if encoder is None:
            kept = within_limits(training, policy, config.step.max_source_tokens, None, show)
        else:
            kept = within_prompts(training, encoder, show, with_answers=False)
        method = Method(
            allocation=config.allocation,
            capability=config.capability,
            objective=config.objective,
            baseline=config.baseline,
        )
        decoding = config.development.decoding
        if not decoding.stop_strings:
            decoding = dataclasses.replace(decoding, stop_strings=config.step.stop_strings)
        yield RLTask(
            policy,
            kept,
            method,
            config.step,
            config.sampling,
            config.gradient,
            reward,
            Development(examples, config.development.metrics, decoding, encoder),
            config.seed,
            reference_of(policy, config),
            encoder,
        )


def _metrics(config: RewardConfig) -> list[Metric]:
    """The text metrics among the rewards, with their settings."""
    names = [name for name in config.names if name in METRICS]
    return [ExactMatch(config.exact_match) if name == "exact_match" else METRICS[name]() for name in names]


def _train(
    config: RunConfig,
    run: RunFolder,
    task: Task,
    examples: Sequence[Example],
    accelerator: Accelerator,
    label: str,
) -> RunResult:
    """Run the loop and write what a run leaves behind. The folder is begun last, when nothing else can be refused."""
    held = fingerprint(config, examples) | (task.identity if isinstance(task, RLTask) else {})
    tracker = accelerator.log if config.report_to else None
    loop = Loop(
        task,
        config.training,
        config.optimizer,
        run,
        config.seed,
        accepted(config, run, held),
        None if tracker is None else lambda values, step: tracker(_numbers(values), step=step),
    )
    with run:
        accelerator.wait_for_everyone()
        if config.report_to and run.is_main:
            accelerator.init_trackers("esrl", config=_flat(config))
        if run.is_main and not run.has_checkpoint and isinstance(config, MLEConfig) and config.model.path is None:
            run.write_model(task.export(), START)
        _resume(config, loop, task, held)
        if run.is_main and not loop.was_complete:
            run.write_config(to_toml(pinned(config)))
            run.write_json("environment.json", environment() | {"signature": label})
            say(label)
        state = loop.run()
        # a run may have been killed between its last checkpoint and its report
        if not (loop.was_complete and _is_finished(run, state)):
            if isinstance(task, RewardModelTask):
                accelerator.wait_for_everyone()  # the best model is read by all processes
                _judge_pairs(run, task)
            if run.is_main:
                _finish(run, state, label)
        accelerator.end_training()
    return _result(config.output_dir, state, loop.was_complete)


def _resume(config: RunConfig, loop: Loop, task: Task, held: dict[str, Any]) -> None:
    """Take the run up; accepted changes belong to it from here on."""
    loop.resume()
    loop.fingerprint = held
    state = loop.state
    if config.accept_changes and state.batch >= task.num_batches(state.epoch):  # the epoch has become shorter
        state.epoch, state.batch = state.epoch + 1, 0


def _is_finished(run: RunFolder, state: LoopState) -> bool:
    """Whether the result is that of this state: a run that was extended has left an older one."""
    try:
        result = json.loads((run.path / RESULT).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get("steps") == state.step and (run.path / REPORT).is_file()


def _judge_pairs(run: RunFolder, task: RewardModelTask) -> None:
    """Write, and say, how good the best reward model is on the development pairs; all processes take part."""
    if not task.development:
        return
    best, _ = load_classifier(run.path / "model", task.seed)
    set_padding(best, task.tokenizer, task.encoder.pad_token)
    device = task.model.device
    task.model.to("cpu")  # one of the two at a time
    task.model = best.to(device)
    report = task.report()
    assert report is not None
    if run.is_main:
        run.write_json(PAIRS, dataclasses.asdict(report))
        low, high = report.accuracy_low, report.accuracy_high
        say(
            f"{report.pairs:,} development pairs: accuracy {report.accuracy:.1%} ({low:.1%} to {high:.1%}), preferring "
            f"the longer answer {report.length_accuracy:.1%}; calibration error {report.ece:.3f}"
        )


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
    # unless it is told to run on CPUs, it takes each of torchrun's processes there for the only one
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, log_with=trackers or None, project_dir=config.output_dir if trackers else None)


def _run_folder(config: RunConfig, accelerator: Accelerator) -> RunFolder:
    """The run's folder, not begun; what the configuration alone shows to be wrong is refused."""
    _check_best_metric(config, _scores(config))
    if config.training.max_sampled_tokens is not None and not isinstance(config, RLConfig):
        raise ValueError(
            "training.max_sampled_tokens is set, but only `esrl rl` samples; set max_steps, num_epochs or max_seconds."
        )
    if config.precision == "bfloat16" and accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError('precision is "bfloat16", which this GPU does not have; set precision = "float32".')
    if isinstance(config, MLEConfig | RLConfig) and config.lora is not None and config.lora.load_in_4bit:
        require_quantization()
    for model in models_of(config) if config.overwrite else ():
        if Path(model).exists() and Path(model).resolve().is_relative_to(config.output_dir.resolve()):
            raise ValueError(
                f"the model that the run needs, {model}, lies in {config.output_dir}, which --overwrite deletes. "
                "Choose another output_dir, or copy the model elsewhere first."
            )
    return RunFolder(
        config.output_dir,
        resume=config.resume,
        overwrite=config.overwrite,
        save_total_limit=config.training.save_total_limit,
        is_main=accelerator.is_main_process,
    )


def _load(data: DataConfig | None, show: bool) -> Sequence[Example]:
    if data is None:
        return ()
    loaded = load_examples(data)
    if show:
        say(loaded.report)
    return loaded.examples


def _scores(config: RunConfig) -> list[str]:
    """What a run's evaluations may be compared by."""
    if isinstance(config, RewardModelConfig):
        return list(PAIR_SCORES)
    return [*_decoded(config), LOG_PROB] if isinstance(config, MLEConfig) else _decoded(config)


def _decoded(config: RunConfig) -> list[str]:
    return [f"dev_{name}" for name in config.development.metrics]


def _check_best_metric(config: RunConfig, names: Sequence[str]) -> None:
    metrics_by_name(config.development.metrics)
    chosen = config.training.metric_for_best_model
    if config.development.data is not None and chosen not in names:
        raise ValueError(
            f"training.metric_for_best_model is {chosen!r}; development.metrics gives {', '.join(names) or 'none'}."
        )


def _require(examples: Sequence[Example], columns: Sequence[str], who: str, data: DataConfig) -> None:
    for name in columns:
        if name not in examples[0].columns:
            raise ValueError(f"{who} needs a {name} for every example, and the data has none; set data.{name}.")


def _require_pairs(examples: Sequence[Example], name: str) -> None:
    if examples and not {"reference", "rejected"} <= examples[0].columns.keys():
        raise ValueError(
            f'{name} are no pairs of answers, which a reward model learns from; set {name}.format = "preferences", '
            "with the columns prompt, chosen and rejected."
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    flat = flatten(plain(dataclasses.asdict(config)))
    return {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in flat.items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float)}
