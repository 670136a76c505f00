"""How a reward function is found, called and checked; and, run as a script, the process it runs in under a time limit.

As a script this file reads requests from standard input and writes replies to what was standard output, one JSON
object a line. It imports the standard library only, so a worker starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import queue
import sys
import threading
import traceback
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a reward function can have besides the data's columns."""


class ContractError(Exception):
    """What a reward function returned breaks the contract; ``index`` is the sample's, where one is to blame."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class Parameters(NamedTuple):
    """What a function can be given by name."""

    required: list[str]  # has no default
    accepted: list[str] | None  # None: anything


class Reply(NamedTuple):
    """What one call of a reward function gave."""

    values: list[float | None]  # None: the function abstains
    metrics: dict[str, float]
    extra: dict[str, list]


class Pending(NamedTuple):
    """A call under way; it is waited for once, or cancelled."""

    wait: Callable[[], Reply]
    cancel: Callable[[], object]
    runs: bool  # already; else it runs while it is waited for


class TrainerState(dict[str, Any]):
    """What a function gets as ``trainer_state``: a mapping whose entries are attributes, too, as in TRL."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"trainer_state has no {name!r}; it has {', '.join(self)}.")


def load_function(path: str) -> Callable[..., Any]:
    """The function named by ``package.module:name``, ``package.module.name`` or ``path/to/file.py:name``.

    A class is instantiated without arguments. The working directory is not searched, nor a file's own folder when
    that file imports others; a file is executed once, however many of its functions are used.

    Raises:
        ValueError: there is no such module, file or name, its import fails, or it cannot be called.
    """
    place, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    if not place or not name:
        raise ValueError(f"reward {path!r} is neither package.module:name nor path/to/file.py:name.")
    try:
        found: Any = _load_file(place) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward {path!r}: no module {error.name!r}; install it, or name a file: path/to/file.py:{name}."
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward {path!r} cannot be imported: {describe(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            raise ValueError(
                f"reward {path!r}: {place} has no {part!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        found = getattr(found, part)
    if inspect.isclass(found):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise ValueError(f"reward {path!r} cannot be made without arguments: {describe(error)}") from error
    if not callable(found):
        raise ValueError(f"reward {path!r} is a {type(found).__name__}, which cannot be called.")
    return found


def _load_file(place: str) -> ModuleType:
    file = os.path.realpath(place)
    if not os.path.isfile(file):
        raise ValueError(f"there is no file {file}")
    module_name = f"esrl_reward_{os.path.basename(file)[:-3]}_{zlib.crc32(os.fsencode(file)):08x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def describe(error: BaseException) -> str:
    """One line: the exception, its message, and the last line of code it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{where}"


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """What ``function`` can be given by name; a function that does not say is given everything.

    Raises:
        ValueError: a parameter without default cannot be given by name.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return Parameters([], None)
    named, required = [], []
    for one in parameters:
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            named.append(one.name)
            if one.default is one.empty:
                required.append(one.name)
        elif one.kind is one.POSITIONAL_ONLY and one.default is one.empty:
            raise ValueError(f"parameter {one.name!r} is positional-only; reward functions get everything by name.")
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return Parameters(required, None if takes_all else named)


def call_function(function: Callable[..., Any], accepted: list[str] | None, arguments: dict[str, Any]) -> Reply:
    """Call a reward function with what it accepts of ``arguments``, the two log functions added.

    Raises:
        ContractError: see ``to_numbers``.
        Exception: whatever the function raises.
    """
    return begin_call(function, accepted, arguments).wait()


def begin_call(function: Callable[..., Any], accepted: list[str] | None, arguments: dict[str, Any]) -> Pending:
    """``call_function`` in two halves: an ``async def`` runs from here on, anything else when it is waited for."""
    metrics: dict[str, float] = {}
    extra: dict[str, list] = {}
    size = len(arguments["completions"])

    def log_metric(name: str, value: float) -> None:
        metrics[str(name)] = float(value)

    def log_extra(column: str, values: list) -> None:
        if len(values) != size:
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {size} completions.")
        extra[str(column)] = list(values)

    arguments = {**arguments, "log_metric": log_metric, "log_extra": log_extra}
    if "trainer_state" in arguments:
        arguments["trainer_state"] = TrainerState(arguments["trainer_state"])
    if accepted is not None:
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    future = _submit(function(**arguments)) if _is_async(function) else None

    def wait() -> Reply:
        values = function(**arguments) if future is None else _result(future)
        if inspect.isawaitable(values):
            values = _result(_submit(values))
        return Reply(to_numbers(values, size), metrics, extra)

    return Pending(wait, lambda: None if future is None else future.cancel(), future is not None)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class _Exit(NamedTuple):
    """What would end the event loop, carried out of it."""

    error: BaseException


def _submit(awaitable: Any) -> Any:
    """A future of ``awaitable``, which runs on the event loop that all functions of this process share."""
    import asyncio  # here, since it takes longer to import than all the rest

    async def wait() -> Any:
        try:
            return await awaitable
        except (SystemExit, KeyboardInterrupt) as error:
            return _Exit(error)

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop(os.getpid()))


def _result(future: Any) -> Any:
    try:
        values = future.result()
    except BaseException:  # interrupted: what nobody waits for need not go on
        future.cancel()
        raise
    if isinstance(values, _Exit):
        raise values.error
    return values


@functools.lru_cache(maxsize=1)
def _event_loop(pid: int) -> Any:
    """The loop of this process (a fork has none of its parent's threads), in a thread of its own: the caller's may run
    a loop already, as in a notebook. It stays, since a client that a function keeps is bound to its loop."""
    import asyncio

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="esrl rewards", daemon=True).start()
    return loop


def to_numbers(values: Any, size: int) -> list[float | None]:
    """The returned values as floats, None where the function abstains.

    A list, a tuple, or a 1-D array or tensor of real numbers; a bool counts as 0 or 1.

    Raises:
        ContractError: another type or shape, another number of values than ``size``, or a value that is not finite.
    """
    if hasattr(values, "tolist") and hasattr(values, "ndim"):
        if values.ndim != 1:
            raise ContractError(f"returned a {type(values).__name__} of shape {tuple(values.shape)}; it must be 1-D.")
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise ContractError(f"returned a {type(values).__name__}, not a list of {size} numbers.")
    if len(values) != size:
        raise ContractError(f"returned {len(values)} values for {size} completions.")
    return [_to_number(value, index) for index, value in enumerate(values)]


def _to_number(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy's, a 0-D tensor
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise ContractError(f"returned a {type(value).__name__}, {value!r:.60}, not a number", index)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ContractError(f"returned {number}; a reward must be finite, or None to abstain", index)
    return number


def _answer(function: Callable[..., Any], accepted: list[str] | None, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return call_function(function, accepted, arguments)._asdict()
    except ContractError as error:
        return {"broken": str(error), "index": error.index}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - reported to the parent process, which raises it
        return {"raised": describe(error), "traceback": traceback.format_exc()}


def _read_requests(stream: Any, requests: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        requests.put(line)
    os._exit(0)  # the parent has closed the pipe, or is gone


def main() -> None:
    """Serve one reward function until the parent closes the pipe."""
    source = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # what the function prints must not mix with the replies
    silence = os.fdopen(null, "w")
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(source, requests), daemon=True).start()

    def send(reply: dict[str, Any]) -> None:
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(reply, default=repr), file=replies, flush=True)

    setup = json.loads(requests.get())
    sys.path[:] = setup["search_path"]
    # An orphan that holds the interpreter's lock cannot notice the closed pipe; this clock needs no lock.
    faulthandler.dump_traceback_later(setup["seconds"] + 0.5, exit=True, file=silence)
    try:
        function = load_function(setup["function"])
        parameters = parameters_of(function)
    except ValueError as error:
        send({"failed": str(error)})
        return
    send(parameters._asdict())
    while True:
        request = json.loads(requests.get())
        faulthandler.dump_traceback_later(request["seconds"] + 0.5, exit=True, file=silence)
        send(_answer(function, parameters.accepted, request["arguments"]))


if __name__ == "__main__":
    main()
