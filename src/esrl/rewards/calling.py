"""The contract with reward functions: built-in metrics and anyone's own, called the way TRL calls them.

    reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]

Everything is given by name, the data's columns too (``reference``, ``source``, ...); a function without ``**kwargs``
gets only what it names. ``completion_ids`` are lists of token ids. ``trainer_state`` holds ``global_step`` (steps made
so far) and ``epoch``, as attributes and by name. ``log_metric(name, value)`` puts a figure into the step's line of
metrics.jsonl, ``log_extra(column, values)`` a value for each sample into samples.jsonl.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esrl.errors import RewardError
from esrl.rewards.process import RaisedInWorker, WorkerFailure, WorkerProcess
from esrl.rewards.text import BLEU, ChrF, ExactMatch, RougeL
from esrl.rewards.worker import (
    GIVEN,
    ContractError,
    Parameters,
    Reply,
    call_function,
    describe,
    load_function,
    parameters_of,
)

logger = logging.getLogger(__name__)

METRICS: dict[str, Callable[[], Any]] = {
    "bleu": BLEU,
    "chrf": ChrF,
    "rouge_l": RougeL,
    "rouge_l_unicode": partial(RougeL, tokenizer="unicode"),
    "exact_match": ExactMatch,
}


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Which reward functions, and what happens when one has nothing to say or hangs."""

    names: tuple[str, ...] = ("bleu",)
    """``bleu``, ``chrf``, ``rouge_l``, ``exact_match``, ``package.module:name`` or ``path/to/file.py:name``; with
    several, their weighted sum. The paper trains with BLEU, with ROUGE-L, and with reward models."""

    weights: tuple[float, ...] = ()
    """One for each name; empty: 1 each."""

    timeout_seconds: float | None = None
    """Time limit of one call of one function, which then runs in a process of its own (built-in metrics never do). A
    call that hangs or crashes is tried once more; then its samples abstain. None: no limit, no extra process."""

    max_abstain_share: float = 0.5
    """The run stops when a larger share of samples abstained, on average over ``abstain_window`` steps. Steps not
    made yet count as 0, so a few early abstentions do not stop a run; 1 never does."""

    abstain_window: int = 20
    """Steps over which ``max_abstain_share`` is judged."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError(f"names is empty; name at least one reward: {', '.join(METRICS)}, or package.module:name.")
        for name in self.names:
            if name not in METRICS and ":" not in name and "." not in name:
                near = get_close_matches(name, METRICS, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METRICS)}"
                raise ValueError(f"unknown reward {name!r}; {hint} (an own function: package.module:name).")
            if name.endswith(".py"):
                raise ValueError(f"reward {name!r} is a file; name the function in it: {name}:function.")
        if self.weights and len(self.weights) != len(self.names):
            raise ValueError(f"{len(self.weights)} weights for {len(self.names)} rewards; give one each, or none.")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights is {self.weights}; every weight must be finite.")
        if self.timeout_seconds is not None and not 0 < self.timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; it must be above 0, or none.")
        if not 0 <= self.max_abstain_share <= 1:
            raise ValueError(f"max_abstain_share is {self.max_abstain_share}; it must lie in [0, 1].")
        if self.abstain_window < 1:
            raise ValueError(f"abstain_window is {self.abstain_window}; it must be 1 or more.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """The rewards of one call."""

    values: Tensor  # (R,) float64, the weighted sum; 0 where a function abstained
    abstained: Tensor  # (R,) bool, True where at least one function abstained
    metrics: dict[str, float]  # from log_metric
    extra: dict[str, list]  # from log_extra, R values each


class StepCounts(NamedTuple):
    """What happened in the calls of one step."""

    samples: int = 0
    abstained: int = 0
    failed_tries: int = 0


@dataclass(frozen=True, slots=True)
class _Component:
    """One reward function, in this process or (``worker``) in its own."""

    name: str
    weight: float
    parameters: Parameters
    call: Callable[[dict[str, Any]], Reply]
    worker: WorkerProcess | None = None


class RewardFunction:
    """The weighted sum of reward functions, held to the contract. Built by ``build_reward``.

    A sample counts as abstained if any function abstains from it, whatever the weights. ``score`` counts into
    ``counts``, of this process and the step under way, until ``end_step`` takes the step's over. ``close`` ends the
    worker processes; they also end with this process.
    """

    def __init__(self, components: list[_Component], config: RewardConfig) -> None:
        self._components = components
        self._config = config
        self.counts = StepCounts()
        self._abstain_shares: deque[float] = deque(maxlen=config.abstain_window)
        self._num_samples = self._num_abstained = self._num_failed_tries = 0

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the functions in the sum."""
        return tuple(component.weight for component in self._components)

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Columns that some function must be given."""
        names = (name for component in self._components for name in component.parameters.required)
        return tuple(dict.fromkeys(name for name in names if name not in GIVEN))

    def check_columns(self, available: Iterable[str]) -> None:
        """Refuse data that a function cannot be called with.

        Raises:
            ValueError: a required column is missing, or a column has the name of another argument.
        """
        available = list(available)
        _check_no_clash(available)
        for component in self._components:
            for name in component.parameters.required:
                if name not in GIVEN and name not in available:
                    raise ValueError(
                        f"reward {component.name!r} needs the column {name!r}; the data has "
                        f"{', '.join(sorted(available)) or 'none'}. Rename a column, or give the parameter a default."
                    )

    def score(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list[str]],
        trainer_state: dict[str, Any],
    ) -> RewardResult:
        """Score R completions; every list and every column has R entries.

        Raises:
            ValueError: the lists differ in length.
            RewardError: a function broke the contract.
        """
        size = len(completions)
        _check_no_clash(columns)
        arguments: dict[str, list] = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        arguments |= columns
        for name, values in arguments.items():
            if len(values) != size:
                raise ValueError(f"{name} has {len(values)} entries for {size} completions.")
        total = torch.zeros(size, dtype=torch.float64)
        abstained = torch.zeros(size, dtype=torch.bool)
        metrics: dict[str, float] = {}
        extra: dict[str, list] = {}
        for component in self._components if size else ():
            # Copies: what one function does to its lists is not the next one's concern.
            own = {name: list(values) for name, values in arguments.items()}
            reply = self._evaluate(component, {**own, "trainer_state": dict(trainer_state)}, completions)
            abstained |= torch.tensor([value is None for value in reply.values])
            total += component.weight * torch.tensor([value or 0.0 for value in reply.values], dtype=torch.float64)
            metrics.update(reply.metrics)
            extra.update(reply.extra)
        if not bool(total.isfinite().all()):
            index = int((~total.isfinite()).nonzero()[0])
            raise RewardError(f"the weighted sum of rewards overflows {_culprit(index, completions)}.")
        self._count(abstained)
        return RewardResult(values=total.masked_fill(abstained, 0.0), abstained=abstained, metrics=metrics, extra=extra)

    def _evaluate(self, component: _Component, arguments: dict[str, Any], completions: list[str]) -> Reply:
        """One function's reply; every failure that is not its worker's becomes a ``RewardError``."""
        first = f"{len(completions)} completions, the first {_short(completions[0])}"
        for remedy in ("trying once more", f"its {len(completions)} samples abstain"):
            try:
                return component.call(arguments)
            except WorkerFailure as failure:
                self._add(failed_tries=1)
                logger.warning("reward %r %s; %s (%s)", component.name, failure, remedy, first)
            except ContractError as error:
                culprit = f"for {first}" if error.index is None else _culprit(error.index, completions)
                raise RewardError(f"reward {component.name!r} {str(error).rstrip('.')}, {culprit}.") from error
            except RaisedInWorker as error:
                raise RewardError(f"reward {component.name!r} raised {error}, for {first}.") from error
            except (Exception, SystemExit) as error:
                raise RewardError(f"reward {component.name!r} raised {describe(error)}, for {first}.") from error
        return Reply([None] * len(completions), {}, {})

    def _count(self, abstained: Tensor) -> None:
        size, number = len(abstained), int(abstained.sum())
        if number and not self._num_abstained + self.counts.abstained:
            logger.warning("a reward abstained from %d of %d samples; later abstentions are only counted", number, size)
        self._add(samples=size, abstained=number)

    def _add(self, *, samples: int = 0, abstained: int = 0, failed_tries: int = 0) -> None:
        old = self.counts
        self.counts = StepCounts(old.samples + samples, old.abstained + abstained, old.failed_tries + failed_tries)

    def end_step(self, counts: StepCounts) -> None:
        """Take over what a step counted: ``counts``, or the sum of those of all processes.

        Raises:
            RewardError: too many samples abstained.
        """
        self.counts = StepCounts()
        self._num_samples += counts.samples
        self._num_abstained += counts.abstained
        self._num_failed_tries += counts.failed_tries
        if not counts.samples:
            return
        self._abstain_shares.append(counts.abstained / counts.samples)
        window, limit = self._config.abstain_window, self._config.max_abstain_share
        share = sum(self._abstain_shares) / window
        if share > limit:
            raise RewardError(
                f"rewards {', '.join(self._config.names)} abstained from {share:.0%} of the samples of {window} steps "
                f"(the last {len(self._abstain_shares)} counted), more than max_abstain_share = {limit:g}; mend the "
                "function, raise timeout_seconds if it was too slow, or raise max_abstain_share."
            )

    def state_dict(self) -> dict[str, Any]:
        """The counters of the steps that have ended; JSON-able."""
        return {
            "abstain_shares": list(self._abstain_shares),
            "num_samples": self._num_samples,
            "num_abstained": self._num_abstained,
            "num_failed_tries": self._num_failed_tries,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting where ``state_dict`` was taken."""
        self.counts = StepCounts()
        self._abstain_shares = deque(state["abstain_shares"], maxlen=self._config.abstain_window)
        self._num_samples = state["num_samples"]
        self._num_abstained = state["num_abstained"]
        self._num_failed_tries = state["num_failed_tries"]

    def close(self) -> None:
        """End the worker processes; a later ``score`` starts them again."""
        for component in self._components:
            if component.worker is not None:
                component.worker.stop()

    def __enter__(self) -> RewardFunction:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def build_reward(config: RewardConfig) -> RewardFunction:
    """Find the reward functions, start their worker processes if there is a time limit.

    With a time limit this process never imports the functions' code: the worker does, and says what they accept.

    Raises:
        ValueError: a function cannot be found, imported or called by name.
    """
    components: list[_Component] = []
    try:
        for name, weight in zip(config.names, config.weights or (1.0,) * len(config.names), strict=True):
            if config.timeout_seconds is None or name in METRICS:
                components.append(_in_process(name, weight))
            else:
                components.append(_in_worker(name, weight, config.timeout_seconds))
    except ValueError:
        RewardFunction(components, config).close()
        raise
    return RewardFunction(components, config)


def required_columns(config: RewardConfig) -> tuple[str, ...]:
    """The data's columns that the configured functions must be given, such as ``reference``."""
    with build_reward(config) as reward:
        return reward.required_columns


def _in_process(name: str, weight: float) -> _Component:
    function = METRICS[name]() if name in METRICS else load_function(name)
    parameters = parameters_of(function)
    return _Component(name, weight, parameters, lambda given: call_function(function, parameters.accepted, given))


def _in_worker(name: str, weight: float, seconds: float) -> _Component:
    worker = WorkerProcess(name)
    return _Component(name, weight, worker.start(), lambda given: worker.call(given, seconds), worker)


def _check_no_clash(columns: Iterable[str]) -> None:
    for name in columns:
        if name in GIVEN:
            raise ValueError(
                f"the data has a column {name!r}, which reward functions know as something else; rename it."
            )


def _culprit(index: int, completions: list[str]) -> str:
    return f"for completion {index} of {len(completions)}: {_short(completions[index])}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
