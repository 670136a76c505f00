"""Built-in checks under a time limit for each completion: a text that takes too long costs itself, not its batch."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from esrl.rewards.process import WorkerFailure, WorkerProcess
from esrl.rewards.worker import Reply

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 64
"""Texts sent to the process together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegexConfig:
    """What `regex` looks for, in Python's syntax."""

    pattern: str = ""
    """The regular expression; flags are written into it, such as (?i) or (?s)."""
    match: Literal["full", "partial"] = "partial"
    """`full`: the whole completion, white space at both ends aside; `partial`: the first place in it."""
    group: str = ""
    """Name or number of a group of the pattern; what it takes must be the reference, white space at both ends aside.
    Empty: a match is enough."""
    seconds: float = 1.0
    """Time limit of a completion; one that takes longer abstains."""

    def __post_init__(self) -> None:
        if self.match not in ("full", "partial"):
            raise ValueError(f"match is {self.match!r}; choose full or partial.")
        _check_seconds(self.seconds)
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern is {self.pattern!r}, which is no regular expression: {error}.") from error
        known = [*compiled.groupindex, *map(str, range(1, compiled.groups + 1))]
        if self.group and self.group not in known:
            raise ValueError(
                f"group is {self.group!r}; the pattern has {', '.join(known) or 'no groups'}. Name one of them, or put "
                "what is to be compared in parentheses."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonSchemaConfig:
    """What `json_schema` wants the completion to be."""

    path: Path | None = None
    """A JSON schema; what it refers to must be in it, nothing is fetched."""
    seconds: float = 1.0
    """Time limit of a completion; one that takes longer abstains."""

    def __post_init__(self) -> None:
        _check_seconds(self.seconds)


def _check_seconds(seconds: float) -> None:
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds is {seconds}; it must be above 0 and at most 3600.")


class TimedCheck:
    """A check in a process of its own.

    Texts go there together; where an answer does not come within ``seconds``, one by one, so that only those that
    take too long abstain. The process starts with the first call.
    """

    def __init__(self, function: str, settings: dict[str, Any], seconds: float) -> None:
        self.worker = WorkerProcess(function)
        self._settings = settings
        self._seconds = seconds

    def __call__(self, arguments: dict[str, list]) -> Reply:
        """Score the completions.

        Args:
            arguments: completions and, where the check compares, reference.

        Raises:
            ContractError, RaisedInWorker: the check's own failure.
            ValueError: the process does not start.
        """
        size = len(arguments["completions"])
        values: list[float | None] = []
        for start in range(0, size, TEXTS_AT_ONCE):
            part = range(start, min(start + TEXTS_AT_ONCE, size))
            try:
                values += self._scores(arguments, part)
            except WorkerFailure:
                values += [self._score(arguments, index) for index in part]
        return Reply(values, {}, {})

    def _score(self, arguments: dict[str, list], index: int) -> float | None:
        try:
            return self._scores(arguments, range(index, index + 1))[0]
        except WorkerFailure as failure:
            text = str(arguments["completions"][index])
            logger.warning("%s %s for %r; it abstains", self.worker.function, failure, text[:60])
            return None

    def _scores(self, arguments: dict[str, list], part: range) -> list[float | None]:
        own = {name: values[part.start : part.stop] for name, values in arguments.items()}
        return self.worker.call({**own, "settings": self._settings}, self._seconds).values


def regex_check(config: RegexConfig) -> TimedCheck:
    """The check that ``config`` describes.

    Raises:
        ValueError: there is no pattern.
    """
    if not config.pattern:
        raise ValueError("reward regex: regex.pattern is empty; give the regular expression to look for.")
    settings = {"pattern": config.pattern, "match": config.match, "group": config.group}
    return TimedCheck("esrl.rewards.regex_check:match_regex", settings, config.seconds)


def schema_check(config: JsonSchemaConfig) -> TimedCheck:
    """The check that ``config`` describes.

    Raises:
        ValueError: no file is named, there is none, or it is no JSON schema.
    """
    if config.path is None:
        raise ValueError("reward json_schema: json_schema.path is not set; name the file with the schema.")
    from jsonschema import SchemaError  # here, since nothing else in a run needs it

    from esrl.rewards.schema_check import schema_validator

    try:
        schema = config.path.read_text(encoding="utf-8")
        schema_validator(schema)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"reward json_schema: {config.path}: {reason}; name a JSON schema's file.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"reward json_schema: {config.path} is not JSON: {error}.") from error
    except SchemaError as error:
        raise ValueError(
            f"reward json_schema: {config.path} is no JSON schema: {error.message} (at {error.json_path})."
        ) from error
    return TimedCheck("esrl.rewards.schema_check:match_schema", {"schema": schema}, config.seconds)
