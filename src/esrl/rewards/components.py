"""One reward function, wherever it runs: found, begun, waited for, and named in whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from esrl.errors import RewardError
from esrl.rewards.common import plain_text
from esrl.rewards.config import METRICS, RewardConfig
from esrl.rewards.model import RewardModel, load
from esrl.rewards.process import RaisedInWorker, WorkerFailure, WorkerProcess
from esrl.rewards.text import ExactMatch
from esrl.rewards.timed import TimedCheck, regex_check, schema_check
from esrl.rewards.worker import (
    ContractError,
    Parameters,
    Pending,
    begin_call,
    describe,
    load_function,
    parameters_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A reward function, in this process or (``worker``) in its own.

    ``begin`` starts a call: what runs elsewhere, and an ``async def``, from then on; anything else when waited for.
    """

    name: str
    weight: float
    parameters: Parameters
    begin: Callable[[dict[str, Any]], Pending]
    worker: WorkerProcess | None = None
    model: RewardModel | None = None

    @property
    def label(self) -> str:
        """The name without the place it comes from."""
        return self.name if self.name.isidentifier() else self.name.replace(":", ".").rpartition(".")[2]


def make_component(name: str, weight: float, config: RewardConfig) -> Component:
    """Find the reward function ``name``.

    Raises:
        ValueError: it cannot be found, imported, called by name, or its settings name what is not there.
    """
    if name == "regex":
        required = ["completions", "reference"] if config.regex.group else ["completions"]
        return _timed(name, weight, regex_check(config.regex), required)
    if name == "json_schema":
        return _timed(name, weight, schema_check(config.json_schema), ["completions"])
    if name == "model":
        model = load(config.model)
        return _in_process(name, weight, model, model)
    if name in METRICS:
        metric = ExactMatch(config.exact_match) if name == "exact_match" else METRICS[name]()
        return _in_process(name, weight, lambda completions, reference: metric(_plain(completions), reference))
    if config.timeout_seconds is None:
        return _in_process(name, weight, load_function(name))
    worker, seconds = WorkerProcess(name), config.timeout_seconds
    return Component(
        name=name,
        weight=weight,
        parameters=worker.start(),
        begin=lambda given: worker.begin(given, seconds),
        worker=worker,
    )


def _in_process(name: str, weight: float, function: Callable[..., Any], model: RewardModel | None = None) -> Component:
    parameters = parameters_of(function)
    return Component(
        name=name,
        weight=weight,
        parameters=parameters,
        begin=lambda given: begin_call(function, parameters.accepted, given),
        model=model,
    )


def _timed(name: str, weight: float, check: TimedCheck, required: list[str]) -> Component:
    def begin(given: dict[str, Any]) -> Pending:
        arguments = {key: given[key] for key in required}
        arguments["completions"] = _plain(arguments["completions"])
        return Pending(lambda: check(arguments), lambda: None, False)

    return Component(
        name=name, weight=weight, parameters=Parameters(required, required), begin=begin, worker=check.worker
    )


def _plain(completions: list[Any]) -> list[str]:
    return [plain_text(completion, "completion") for completion in completions]


@contextmanager
def blaming(component: Component, completions: list[Any]) -> Iterator[None]:
    """Turn every failure that is not its worker's into a ``RewardError`` with the function's name and the culprit."""
    try:
        yield
    except WorkerFailure:
        raise
    except ContractError as error:
        culprit = f"for {first_of(completions)}" if error.index is None else culprit_of(error.index, completions)
        raise RewardError(f"reward {component.name!r} {str(error).rstrip('.')}, {culprit}.") from error
    except RaisedInWorker as error:
        raise RewardError(f"reward {component.name!r} raised {error}, for {first_of(completions)}.") from error
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {component.name!r} raised {describe(error)}, for {first_of(completions)}."
        ) from error


def first_of(completions: list[Any]) -> str:
    """How many completions, and the first of them."""
    return f"{len(completions)} completions, the first {_short(completions[0])}"


def culprit_of(index: int, completions: list[Any]) -> str:
    """The completion that is to blame."""
    return f"for completion {index} of {len(completions)}: {_short(completions[index])}"


def _short(completion: Any) -> str:
    text = completion if isinstance(completion, str) else str(completion)
    return repr(text if len(text) <= 60 else text[:60] + "…")
