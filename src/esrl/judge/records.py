"""Finished judgments: one JSON object a line, only ever appended to, on the disk before the next is asked for."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esrl.errors import StorageError
from esrl.training.display import say
from esrl.training.storage import JsonLines

NAME = "judgments.jsonl"


def request_key(body: Mapping[str, Any]) -> str:
    """What a request is known by: a digest of all that the reply depends on. A changed answer, template, judge or
    setting makes another request; where the endpoint lies, and its key, do not."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


class Records:
    """The judgments in a folder by their request's key; a later one stands for an earlier one.

    A last line that a kill or a power cut has torn is cut off, and its judgment asked for again.
    """

    def __init__(self, folder: Path) -> None:
        self._lines = JsonLines(folder / NAME)
        try:
            self.by_key = self._read()
        except BaseException:
            self._lines.close()
            raise

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a judgment; when this returns, it is on the disk."""
        self._lines.append({"key": key, **record})
        self._lines.sync()
        self.by_key[key] = dict(record)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self._lines.path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}. Check its permissions and the disk.") from error
        records: dict[str, dict[str, Any]] = {}
        start = 0
        for number, line in enumerate(io.BytesIO(data), 1):
            end = start + len(line)
            record = _record(line)
            if record is None and end == len(data):
                say(f"{path}:{number}: the last line is torn; it is cut off and its judgment asked for again")
                self._lines.truncate(start)
                break
            if record is None:
                raise StorageError(
                    f"{path}:{number} is damaged; delete that line, and its judgment is asked for again."
                )
            records[str(record.pop("key"))] = record
            start = end
        return records


def _record(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(value, dict) and isinstance(value.get("key"), str) and isinstance(value.get("text"), str)
    return value if whole else None
