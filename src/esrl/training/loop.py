"""The only training loop: maximum likelihood and reinforcement learning run in it.

A step is computed without side effects, then committed in one critical section (optimizer, task state, log line), so
whatever interrupts a run finds it between two steps. Random numbers come from named streams, not from a generator
whose state would have to be kept: a resumed run repeats the interrupted one to the bit.
"""

from __future__ import annotations

import functools
import math
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from esrl.algorithm.streams import seed_of
from esrl.errors import Interrupted, NumericsError, StorageError
from esrl.training.alarms import State, new_state, observe_evaluation, observe_step
from esrl.training.checkpoint import Checkpoint, pack_json, pack_tensors, unpack_json, unpack_tensors
from esrl.training.display import Display, say
from esrl.training.interrupts import Interrupts
from esrl.training.loop_config import LoopConfig
from esrl.training.memory import peak_memory_mb, reset_peak_memory
from esrl.training.optimization import Optimizer, OptimizerConfig, learning_rate
from esrl.training.processes import Processes
from esrl.training.restore import check_fingerprint, frozen_digest, restore_parameters
from esrl.training.run_folder import RunFolder
from esrl.training.task import Task, Update


@dataclass(slots=True)
class LoopState:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    sampled_tokens: int = 0
    evaluated_step: int = -1
    best_score: float | None = None
    best_step: int = -1
    start_score: float | None = None
    evaluations_without_gain: int = 0
    skipped: int = 0
    """Steps in a row that were skipped."""
    alarms: State = field(default_factory=new_state)
    """What alarms have seen; checkpoints of earlier versions have none."""
    offsets: dict[str, int] = field(default_factory=dict)


class Loop:
    """Runs a task to its end.

    Args:
        fingerprint: what must not change between the parts of a resumed run.
    """

    def __init__(  # noqa: PLR0913
        self,
        task: Task,
        config: LoopConfig,
        optimizer: OptimizerConfig,
        run: RunFolder,
        seed: int,
        fingerprint: Mapping[str, Any],
        tracker: Callable[[dict[str, Any], int], None] | None = None,
    ) -> None:
        if optimizer.lr_scheduler in ("linear", "cosine") and config.max_steps is None and config.num_epochs is None:
            raise ValueError(
                f"lr_scheduler {optimizer.lr_scheduler!r} falls to 0 at the last step, so it needs max_steps or "
                "num_epochs beside other limits."
            )
        self.task = task
        self.config = config
        self.alarms = replace(config.alarms, metric=config.alarms.metric or config.metric_for_best_model)
        self.optimizer = Optimizer(task.model, optimizer)
        self.run_folder = run
        self.seed = seed
        self.fingerprint = dict(fingerprint)
        self.tracker = tracker
        self.processes = Processes()
        if config.skip_nonfinite and self.processes.active:
            raise ValueError(
                "skip_nonfinite needs a single process: of several, one alone may find the number. Set it to 0."
            )
        self.state = LoopState()
        self.total_steps = self._total_steps()
        self.was_complete = False
        self._is_resumed = False
        self._is_sound = True
        self._saved_step = -1
        self._saved_at = time.monotonic()

    def run(self) -> LoopState:
        """Train until the limit, resuming if the folder says so; returns the final state."""
        self.resume()
        if self.was_complete:
            return self.state
        if bad := self._bad_parameter():
            raise NumericsError(f"{bad} of the model is infinite or NaN before training; start from another model.")
        reset_peak_memory()
        with (
            Display(self.total_steps, self.config.max_seconds, self.processes.is_main) as display,
            Interrupts(deferred=self.processes.active) as interrupts,
        ):
            try:
                self._train(interrupts, display)
            except StorageError:
                raise
            except (Exception, Interrupted) as error:
                self._rescue(error, interrupts)
                raise
        return self.state

    def is_complete(self) -> bool:
        """Whether nothing is left to train and the last evaluation stands."""
        return self._is_over() and not self._evaluation_due()

    def _train(self, interrupts: Interrupts, display: Display) -> None:
        while True:
            if self._evaluation_due():
                self._evaluate(interrupts, display)
            over = self._is_over()
            if over or self._save_due():
                with interrupts.critical():
                    self._save()
            if over:
                return
            self._step(interrupts, display)
            if interrupts.deferred and self.processes.any(interrupts.pending is not None):
                raise Interrupted(int(interrupts.pending or signal.SIGTERM))

    def _step(self, interrupts: Interrupts, display: Display) -> None:
        started = time.monotonic()
        try:
            update, figures = self._compute()
        except NumericsError as error:
            if self.state.skipped >= self.config.skip_nonfinite:
                raise
            metrics = self._skip(str(error), started, interrupts)
        else:
            metrics = self._commit(update, figures, started, interrupts)
        display.step(self.state.step, self.state.seconds, metrics)

    def _compute(self) -> tuple[Update, dict[str, float]]:
        """A step's gradient, divided and clipped, and what is logged of it; nothing is updated yet."""
        state = self.state
        self.optimizer.zero_grad()
        torch.manual_seed(seed_of("step", self.seed, state.step, self.processes.rank))
        update = self.task.compute(state.epoch, state.batch)
        self.processes.sum_gradients(self.optimizer.parameters)
        denominator = self.processes.sum(update.denominator)
        loss = self.processes.sum(update.loss) / max(denominator, 1e-12)
        if not math.isfinite(loss):
            raise NumericsError(
                f"the loss of step {state.step + 1} is {loss}; nothing was updated. "
                "Look at the rewards and log-probabilities of this step, or lower the learning rate."
            )
        norm = self.optimizer.scale_and_clip(denominator)
        rate = learning_rate(state.step, self.total_steps, self.optimizer.config)
        return update, {"loss": loss, "grad_norm": norm, "learning_rate": rate}

    def _commit(
        self, update: Update, figures: dict[str, float], started: float, interrupts: Interrupts
    ) -> dict[str, Any]:
        """Make the step happen, as a whole; returns its line of metrics.jsonl."""
        with interrupts.critical():
            self._is_sound = False  # what fails from here on leaves half a step behind
            self.optimizer.step(figures["learning_rate"])
            if bad := self._bad_parameter():
                # a finite gradient can still overflow; the last checkpoint is what stands
                raise NumericsError(
                    f"step {self.state.step + 1} made {bad} infinite or NaN; nothing of it was saved. "
                    "Lower the learning rate or the weight decay, or raise adam_epsilon."
                )
            lines = update.commit()
            seconds = time.monotonic() - started
            self.state.skipped = 0
            self._advance(seconds)
            self.state.sampled_tokens += update.metrics.get("tokens_sampled", 0)
            self._is_sound = True
            metrics = self._position() | update.metrics | figures
            metrics |= {"seconds_total": seconds, "peak_memory_mb": peak_memory_mb()}
            self._log(metrics, lines)
            self._alarm(observe_step(self.state.alarms, self.state.step, update.metrics, self.alarms))
        return metrics

    def _skip(self, reason: str, started: float, interrupts: Interrupts) -> dict[str, Any]:
        """Go on to the next step and leave all else as it is; returns the line of metrics.jsonl."""
        with interrupts.critical():
            seconds = time.monotonic() - started
            self.state.skipped += 1
            self._advance(seconds)
            metrics = self._position() | {"skipped": True, "reason": reason, "seconds_total": seconds}
            self._log(metrics, [])
        warnings.warn(f"step {self.state.step} was skipped: {reason}", stacklevel=2)
        return metrics

    @functools.cached_property
    def _frozen(self) -> str | None:
        """Of the weights that are not trained; not asked for where a run is refused or complete before."""
        return frozen_digest(self.task.model, self.optimizer.names)

    def _bad_parameter(self) -> str | None:
        parameters = self.task.model.named_parameters()
        return next((name for name, value in parameters if not bool(torch.isfinite(value).all())), None)

    def _advance(self, seconds: float) -> None:
        state = self.state
        state.step += 1
        state.batch += 1
        state.seconds += seconds
        if state.batch >= self.task.num_batches(state.epoch):
            state.epoch, state.batch = state.epoch + 1, 0

    def _position(self) -> dict[str, Any]:
        share = self.state.batch / self.task.num_batches(self.state.epoch)
        return {"step": self.state.step, "epoch": round(self.state.epoch + share, 6)}

    def _log(self, metrics: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        if not self.processes.is_main:
            return
        self.run_folder.logs["metrics.jsonl"].append(metrics)
        for line in lines:
            self.run_folder.logs["samples.jsonl"].append({"step": self.state.step, **line})
        if self.tracker is not None:
            self.tracker(metrics, self.state.step)

    def _alarm(self, observed: tuple[State, list[str]]) -> None:
        """Keep what alarms have seen; say and log those that were raised."""
        self.state.alarms, raised = observed
        for text in raised:
            self._log(self._position() | {"kind": "alarm", "alarm": text}, [])
            if self.processes.is_main:
                say(f"alarm at step {self.state.step}: {text}")

    def _evaluation_due(self) -> bool:
        state = self.state
        if state.evaluated_step == state.step or (state.step == 0 and not self.config.eval_on_start):
            return False
        if state.step == 0 or self._is_over():
            return True
        if self.config.eval_steps is None:
            return state.batch == 0
        return state.step % self.config.eval_steps == 0

    def _evaluate(self, interrupts: Interrupts, display: Display) -> None:
        state, started = self.state, time.monotonic()
        scores = self.task.evaluate()
        key = self.config.metric_for_best_model
        if scores and key not in scores:
            raise ValueError(f"metric_for_best_model is {key!r}; the evaluation has {', '.join(scores)}.")
        # without a development set the last model is the one to keep
        better = not scores or state.best_score is None or scores[key] > state.best_score
        files = self.task.export() if better and self.processes.is_main else None
        with interrupts.critical():
            if files is not None:
                self.run_folder.write_model(files)
            state.evaluated_step = state.step
            state.evaluations_without_gain = 0 if better else state.evaluations_without_gain + 1
            if scores and better:
                state.best_score, state.best_step = scores[key], state.step
            if scores and state.step == 0:
                state.start_score = scores[key]
            if scores:
                line = self._position() | {"kind": "evaluation", "best": better, **scores}
                line["seconds_total"] = time.monotonic() - started
                self._log(line, [])
                display.evaluation(line)
                self._alarm(observe_evaluation(state.alarms, state.step, scores, self.alarms))

    def _is_over(self) -> bool:
        state, config = self.state, self.config
        most_steps, most_tokens = self.total_steps or math.inf, config.max_sampled_tokens or math.inf
        if state.step >= most_steps or state.sampled_tokens >= most_tokens:
            return True
        if config.patience is not None and state.evaluations_without_gain >= config.patience:
            return True
        seconds = state.seconds
        # processes must agree on the end, so the main one's clock counts
        if config.max_seconds is not None and self.processes.active:
            seconds = self.processes.gather([seconds])[0]
        return config.max_seconds is not None and seconds >= config.max_seconds

    def _total_steps(self) -> int | None:
        limits = [] if self.config.max_steps is None else [self.config.max_steps]
        if self.config.num_epochs is not None:
            limits.append(sum(self.task.num_batches(epoch) for epoch in range(self.config.num_epochs)))
        return min(limits, default=None)

    def _save_due(self) -> bool:
        if self.state.step == self._saved_step:
            return False
        old = time.monotonic() - self._saved_at > self.config.save_seconds and not self.processes.active
        return self.state.step % self.config.save_steps == 0 or old

    def _save(self) -> None:
        if not self.processes.is_main:
            return
        self.state.offsets = self.run_folder.offsets()
        state: dict[str, Any] = {"loop": asdict(self.state), "task": self.task.state_dict()}
        state |= {"fingerprint": self.fingerprint, "frozen": self._frozen}
        self.run_folder.store.save(
            self.state.step,
            {
                "model.safetensors": pack_tensors(self.optimizer.trained()),
                "optimizer.safetensors": pack_tensors(self.optimizer.tensors()),
                "state.json": pack_json(state),
            },
        )
        self._saved_step, self._saved_at = self.state.step, time.monotonic()

    def _rescue(self, error: BaseException, interrupts: Interrupts) -> None:
        """Save the state of the last whole step before leaving, which no further signal cuts short."""
        with interrupts.critical():
            if self._is_sound and self.state.step != self._saved_step:
                self._save()
            if not self.processes.is_main:
                return
            reason = f"signal {error.signum}" if isinstance(error, Interrupted) else type(error).__name__
            if self._saved_step == self.state.step:
                end = "saved. --resume continues."
            elif self._saved_step >= 0:
                end = f"--resume continues from step {self._saved_step}, the last one saved."
            else:
                end = "nothing was saved."
            say(f"stopped at step {self.state.step} ({reason}); {end}")

    def resume(self) -> None:
        """Take up what the folder holds, if it is to be resumed; ``run`` does it unless it was done.

        Raises:
            ValueError: the checkpoint is another run's, or of another architecture.
            StorageError: no checkpoint is intact.
        """
        if self._is_resumed:
            return
        checkpoint = self.run_folder.latest()
        if checkpoint is not None:
            for reason in checkpoint.skipped:
                warnings.warn(f"damaged checkpoint passed over: {reason}", stacklevel=2)
            self._restore(checkpoint)
        elif self.processes.is_main:
            self.run_folder.truncate_logs({})
        self._is_resumed = True
        self.was_complete = self.is_complete()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state: Any = unpack_json(checkpoint.files["state.json"])
        check_fingerprint(state["fingerprint"], self.fingerprint)
        self.state = LoopState(**state["loop"])
        self.task.load_state_dict(state["task"])
        restore_parameters(self.task.model, self.optimizer.trained(), self._frozen, checkpoint, state)
        self.optimizer.load_tensors(unpack_tensors(checkpoint.files["optimizer.safetensors"]))
        if self.processes.is_main:
            self.run_folder.truncate_logs(self.state.offsets)
        self._saved_step = self.state.step
