"""The contract with reward functions: built-in metrics and anyone's own, called the way TRL calls them.

    reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]

Everything is given by name, the data's columns too (``reference``, ``source``, ...); a function without ``**kwargs``
gets only what it names. ``completion_ids`` are lists of token ids. ``trainer_state`` holds ``global_step`` (steps made
so far) and ``epoch``, as attributes and by name. ``log_metric(name, value)`` puts a figure into the step's line of
metrics.jsonl, ``log_extra(column, values)`` a value for each sample into samples.jsonl.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esrl.errors import RewardError
from esrl.rewards.combining import Gather, combine
from esrl.rewards.components import Component, blaming, culprit_of, first_of, make_component
from esrl.rewards.config import BUILT_IN, METRICS, RewardConfig
from esrl.rewards.model import RewardModel
from esrl.rewards.process import WorkerFailure
from esrl.rewards.worker import GIVEN, Pending, Reply

__all__ = [
    "BUILT_IN",
    "METRICS",
    "RewardConfig",
    "RewardFunction",
    "RewardResult",
    "StepCounts",
    "build_reward",
    "required_columns",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """The rewards of one call."""

    values: Tensor  # (R,) float64, the weighted sum, normalised over this call; 0 where a function abstained
    raw: Tensor  # (R,) float64, the weighted sum without normalisation: what can be compared from batch to batch
    scores: Tensor  # (R, F) float64, what each function gave; 0 where it abstained
    lengths: Tensor  # (R,) int64, tokens of each completion
    abstained: Tensor  # (R,) bool, True where at least one function abstained
    metrics: dict[str, float]  # from log_metric; of several functions the mean of each, reward_of_NAME
    extra: dict[str, list]  # from log_extra, R values each


class StepCounts(NamedTuple):
    """What happened in the calls of one step."""

    samples: int = 0
    abstained: int = 0
    failed_tries: int = 0


class RewardFunction:
    """The weighted sum of reward functions, held to the contract. Built by ``build_reward``.

    Functions with processes of their own and those that are ``async def`` run at the same time as the others. A sample
    counts as abstained if any function abstains from it, whatever the weights. ``score`` counts into ``counts``, of
    this process and the step under way, until ``end_step`` takes the step's over; so it is with ``fresh_scores``, what
    a reward model's cache has learnt. ``close`` ends the worker processes; they also end with this process.
    """

    def __init__(self, components: list[Component], config: RewardConfig) -> None:
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
    def names(self) -> tuple[str, ...]:
        """Of the functions, as configured."""
        return tuple(component.name for component in self._components)

    @property
    def is_normalised(self) -> bool:
        """Whether the rewards of a batch are z-scores, or a sum of such, so that their mean is 0."""
        return self._config.normalise != "none"

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
        # Copies: what one function does to its lists is not the next one's concern.
        own = [{name: list(values) for name, values in arguments.items()} for _ in self._components]
        replies = self._evaluate([{**given, "trainer_state": dict(trainer_state)} for given in own], completions)
        scores = torch.zeros(size, len(self._components), dtype=torch.float64)
        abstained = torch.zeros(size, dtype=torch.bool)
        metrics: dict[str, float] = {}
        extra: dict[str, list] = {}
        for j, reply in enumerate(replies):
            nothing = torch.tensor([value is None for value in reply.values])
            scores[:, j] = torch.tensor([value or 0.0 for value in reply.values], dtype=torch.float64)
            abstained |= nothing
            metrics.update(reply.metrics)
            extra.update(reply.extra)
            if len(replies) > 1 and not bool(nothing.all()):
                metrics[self._metric_name(j)] = float(scores[~nothing, j].mean())
        raw = combine(scores, self._weights(), "none", ~abstained)
        if not bool(raw.isfinite().all()):
            index = int((~raw.isfinite()).nonzero()[0])
            raise RewardError(f"the weighted sum of rewards overflows {culprit_of(index, completions)}.")
        self._count(abstained)
        return RewardResult(
            values=self.combined(scores, abstained),
            raw=raw.masked_fill(abstained, 0.0),
            scores=scores,
            lengths=torch.tensor([len(ids) for ids in completion_ids], dtype=torch.int64),
            abstained=abstained,
            metrics=metrics,
            extra=extra,
        )

    def combined(
        self, scores: Tensor, abstained: Tensor, counts: Tensor | None = None, gather: Gather | None = None
    ) -> Tensor:
        """The weighted sum of ``RewardResult.scores``, normalised as configured over these rows.

        Args:
            counts: (R,) how many samples each row stands for; None: 1.
            gather: with it the mean and spread are those of all processes, which all must call this then, a process
                without a row too (with (0, F) scores).

        Returns:
            (R,) float64, 0 where a function abstained.
        """
        weight = (~abstained).to(torch.int64) * (1 if counts is None else counts)
        total = combine(scores, self._weights(), self._config.normalise, weight, gather)
        return total.masked_fill(abstained, 0.0)

    def _weights(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64)

    def _metric_name(self, index: int) -> str:
        labels = [component.label for component in self._components]
        again = labels[:index].count(labels[index])
        return f"reward_of_{labels[index]}" + (f"_{again + 1}" if again else "")

    def _evaluate(self, arguments: list[dict[str, Any]], completions: list[str]) -> list[Reply]:
        """Every function's reply: all are begun, those that run here have their turn, the others are waited for."""
        if not completions:
            return []
        pending: dict[int, Pending] = {}
        try:
            for index, component in enumerate(self._components):
                with blaming(component, completions):
                    pending[index] = component.begin(arguments[index])
            replies: dict[int, Reply] = {}
            for index in sorted(pending, key=lambda index: pending[index].runs):
                begun = pending.pop(index)
                replies[index] = self._reply(self._components[index], begun, arguments[index], completions)
            return [replies[index] for index in range(len(self._components))]
        except BaseException:  # nobody waits for the others then
            for one in pending.values():
                one.cancel()
            raise

    def _reply(
        self, component: Component, begun: Pending | None, given: dict[str, Any], completions: list[str]
    ) -> Reply:
        """One function's reply; a worker that fails is given a second try."""
        for remedy in ("trying once more", f"its {len(completions)} samples abstain"):
            try:
                with blaming(component, completions):
                    return (begun or component.begin(given)).wait()
            except WorkerFailure as failure:
                begun = None
                self._add(failed_tries=1)
                logger.warning("reward %r %s; %s (%s)", component.name, failure, remedy, first_of(completions))
        return Reply([None] * len(completions), {}, {})

    def _count(self, abstained: Tensor) -> None:
        size, number = len(abstained), int(abstained.sum())
        if number and not self._num_abstained + self.counts.abstained:
            logger.warning("a reward abstained from %d of %d samples; later abstentions are only counted", number, size)
        self._add(samples=size, abstained=number)

    def _add(self, *, samples: int = 0, abstained: int = 0, failed_tries: int = 0) -> None:
        old = self.counts
        self.counts = StepCounts(old.samples + samples, old.abstained + abstained, old.failed_tries + failed_tries)

    @property
    def fresh_scores(self) -> dict[str, float]:
        """What the step under way has added to the reward model's cache on this process; JSON-able."""
        model = self._model
        return {} if model is None else dict(model.cache.fresh)

    @property
    def _model(self) -> RewardModel | None:
        return next((component.model for component in self._components if component.model is not None), None)

    def end_step(self, counts: StepCounts, fresh_scores: Iterable[Mapping[str, float]] | None = None) -> None:
        """Take over what a step counted and cached.

        Args:
            counts: this process's, or the sum of those of all processes.
            fresh_scores: those of all processes in their order, so that their caches stay the same; None: this one's.

        Raises:
            RewardError: too many samples abstained.
        """
        self.counts = StepCounts()
        if self._model is not None:
            self._model.cache.commit(fresh_scores)
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

    def identity(self) -> dict[str, str]:
        """What must be the same for scores to go on being the same, by name: the reward model's files."""
        return {} if self._model is None else {"reward.model.files": self._model.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        """The counters and cached scores of the steps that have ended; JSON-able."""
        model = {} if self._model is None else {"model": self._model.state_dict()}
        return model | {
            "abstain_shares": list(self._abstain_shares),
            "num_samples": self._num_samples,
            "num_abstained": self._num_abstained,
            "num_failed_tries": self._num_failed_tries,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        if self._model is not None and "model" in state:
            self._model.load_state_dict(state["model"])
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
    components: list[Component] = []
    try:
        for name, weight in zip(config.names, config.weights or (1.0,) * len(config.names), strict=True):
            components.append(make_component(name, weight, config))
    except ValueError:
        RewardFunction(components, config).close()
        raise
    return RewardFunction(components, config)


def required_columns(config: RewardConfig) -> tuple[str, ...]:
    """The data's columns that the configured functions must be given, such as ``reference``."""
    with build_reward(config) as reward:
        return reward.required_columns


def _check_no_clash(columns: Iterable[str]) -> None:
    for name in columns:
        if name in GIVEN:
            raise ValueError(
                f"the data has a column {name!r}, which reward functions know as something else; rename it."
            )
