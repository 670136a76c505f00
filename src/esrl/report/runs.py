"""Reading a run folder, whatever state it is in.

A run may still be going, may have been killed, or may have been edited: a missing file is an empty value, a damaged
line is passed over and noted, and a number that is none is NaN. Only a folder that is no run is an error.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN_FILES = ("metrics.jsonl", "result.json", "config.toml", "environment.json", "samples.jsonl")
MAX_PROMPTS = 20  # prompts whose samples are shown
_MAX_REMEMBERED = 2000  # prompts followed through samples.jsonl; bounds memory on long runs
_LARGEST = 1e15  # beyond it no logged quantity is meant, and axes break

Row = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run folder holds.

    ``training`` and ``evaluations`` are the lines of ``metrics.jsonl`` by rising step. A training line stands for
    all steps since the line before, so times and tokens are summed over lines.
    """

    path: Path
    name: str
    training: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    alarms: list[tuple[float, str]] = field(default_factory=list)  # (step, what was said), in their order
    samples: list[list[Row]] = field(
        default_factory=list
    )  # for each prompt its first record and, if there is, its last
    config: str = ""
    environment: Row = field(default_factory=dict)
    result: Row = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is missing or damaged

    @property
    def signature(self) -> str:
        value = self.environment.get("signature") or self.result.get("signature")
        return value if isinstance(value, str) else ""

    def column(self, key: str) -> tuple[Array, Array]:
        """(steps, values) of the training lines where ``key`` is a finite number."""
        return _column(self.training, key)

    def evaluation_column(self, key: str) -> tuple[Array, Array]:
        return _column(self.evaluations, key)

    @property
    def alarm_steps(self) -> tuple[float, ...]:
        return tuple(sorted({step for step, _ in self.alarms}))

    def total(self, key: str, *, evaluations: bool = False) -> float:
        """The sum over training lines, on demand also over evaluations; NaN where it was never logged."""
        values = np.concatenate([self.column(key)[1], self.evaluation_column(key)[1] if evaluations else np.empty(0)])
        return float(values.sum()) if len(values) else math.nan

    def peak(self, key: str) -> float:
        values = np.concatenate([self.column(key)[1], self.evaluation_column(key)[1]])
        return float(values.max()) if len(values) else math.nan

    def ends(self, key: str) -> tuple[float, float]:
        """Means over the first and the last tenth of the lines; NaN where it was never logged."""
        values = self.column(key)[1]
        tenth = max(1, len(values) // 10)
        return (float(values[:tenth].mean()), float(values[-tenth:].mean())) if len(values) else (math.nan, math.nan)

    @property
    def dev_metrics(self) -> list[str]:
        """The names of the development metrics that have a value, in the order they appear."""
        keys = dict.fromkeys(key for row in self.evaluations for key in row if key.startswith("dev_"))
        return [key for key in keys if len(self.evaluation_column(key)[1])]

    @property
    def best_evaluation(self) -> Row:
        """The last evaluation marked as best; without marks the best by the first metric; empty without any."""
        marked = [row for row in self.evaluations if row.get("best") is True]
        if marked:
            return marked[-1]
        if not self.dev_metrics:
            return {}
        key = self.dev_metrics[0]
        sign = -1 if any(word in key for word in ("loss", "perplexity", "ppl")) else 1
        return max(
            (row for row in self.evaluations if np.isfinite(finite(row.get(key)))), key=lambda row: sign * row[key]
        )


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: the folder is missing or is no run, or one of its files cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; a report is made from run folders (the output_dir of a run).")
    if not any((path / name).is_file() for name in RUN_FILES):
        raise ValueError(f"{path} is no run folder: it has none of {', '.join(RUN_FILES)}. Give a run's output_dir.")
    try:
        return _read(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}. Check its permissions.") from error


def _read(path: Path) -> Run:
    notes: list[str] = []
    lines = list(_json_lines(path / "metrics.jsonl", notes))
    training = [row for row in lines if "kind" not in row]  # other lines, of alarms, are of a step that has its own
    evaluations = [row for row in lines if row.get("kind") == "evaluation"]
    return Run(
        path=path,
        name=path.resolve().name,
        training=_by_step(training),
        evaluations=_by_step(evaluations),
        alarms=_alarms(lines),
        samples=_select_samples(_json_lines(path / "samples.jsonl", notes)),
        config=_text(path / "config.toml", notes),
        environment=_json_object(path / "environment.json", notes),
        result=_json_object(path / "result.json", notes=[] if not (path / "result.json").is_file() else notes),
        notes=notes,
    )


def finite(value: object) -> float:
    """A logged value as a float; NaN for what is no number of a sensible size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        return math.nan
    return float(value)


def _column(rows: Sequence[Row], key: str) -> tuple[Array, Array]:
    pairs = np.array([(finite(row["step"]), finite(row.get(key))) for row in rows], dtype=np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(1)]
    return pairs[:, 0], pairs[:, 1]


def _by_step(rows: list[Row]) -> list[Row]:
    """By rising step; a step logged again after a resume counts once, as logged last."""
    by_step = {step: row for row in rows if (step := finite(row.get("step"))) >= 0}  # NaN is not
    return [by_step[step] for step in sorted(by_step)]


def _alarms(rows: list[Row]) -> list[tuple[float, str]]:
    """Each once: a resumed run may have said it again."""
    found = ((finite(row.get("step")), row.get("alarm")) for row in rows if row.get("kind") == "alarm")
    return list(dict.fromkeys((step, text) for step, text in found if step >= 0 and isinstance(text, str)))


def _json_lines(path: Path, notes: list[str]) -> Iterator[Row]:
    """The objects in a JSONL file; lines that are none are counted into one note."""
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return
    damaged = 0
    with path.open("rb") as file:
        for line in file:  # bytes: only \n ends a line
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                damaged += 1
                continue
            if isinstance(row, dict):
                yield row
            else:
                damaged += 1
    if damaged:
        notes.append(f"{path.name} has {damaged} damaged line{'s' * (damaged > 1)}, passed over")


def _json_object(path: Path, notes: list[str]) -> Row:
    text = _text(path, notes)
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name} is damaged")
    return {}


def _text(path: Path, notes: list[str]) -> str:
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return ""
    return path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")


def _select_samples(records: Iterator[Row]) -> list[list[Row]]:
    """First and last record of the first prompts that came up again in a later epoch, then the latest other prompts.

    The choice looks at no reward, so that what is shown is not picked for its quality.
    """
    seen: dict[str, list[Row]] = {}
    latest: deque[Row] = deque(maxlen=MAX_PROMPTS)
    for record in records:
        key = str(record.get("example_id", record.get("prompt", "")))
        if key in seen:
            seen[key] = [seen[key][0], record]
        elif len(seen) < _MAX_REMEMBERED:
            seen[key] = [record]
        latest.append(record)
    again = [pair for pair in seen.values() if len(pair) == 2][:MAX_PROMPTS]
    shown = {str(pair[0].get("example_id", pair[0].get("prompt", ""))) for pair in again}
    others: dict[str, list[Row]] = {}
    for record in latest:
        key = str(record.get("example_id", record.get("prompt", "")))
        if key not in shown:
            others[key] = [record]
    room = MAX_PROMPTS - len(again)
    return again + list(others.values())[-room:] if room else again
