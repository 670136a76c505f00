"""A run's folder: what is in it, who may write to it, and where a killed run goes on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
import torch

from esrl.errors import StorageError
from esrl.kernels import why_not
from esrl.kernels.processor import facts
from esrl.training.checkpoint import Checkpoint, CheckpointStore, pack_json
from esrl.training.lock import LOCK_NAME, RunLock
from esrl.training.storage import (
    JsonLines,
    make_folder,
    recover_folder,
    remove_tree,
    replace_bytes,
    storage_errors,
    swap_folder,
)

LOGS = ("metrics.jsonl", "samples.jsonl")
RESULT = "result.json"
"""What a finished run came to."""


class RunFolder:
    """``config.toml``, ``environment.json``, the logs, ``checkpoints/`` and ``model/`` of one run.

    Use as a context manager: entering takes the lock and begins, so an old run is deleted then (``overwrite``). Use
    ``claim`` around it and around whatever takes time before. Only the main process writes.

    Raises (on entry, and by ``claim``):
        ValueError: the folder holds a run and neither ``resume`` nor ``overwrite`` is set, or it holds something else.
        LockedError: another process is writing to it.
        StorageError: it is to be resumed, and its checkpoints are gone.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        save_total_limit: int | None = 2,
        is_main: bool = True,
    ) -> None:
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other; give one.")
        self.path = path
        self.resume = resume
        self.overwrite = overwrite
        self.is_main = is_main
        self.store = CheckpointStore(path / "checkpoints", save_total_limit)
        self.logs: dict[str, JsonLines] = {}
        self._lock = RunLock(path)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """While the block runs, the folder is locked; what must not begin there is refused, and nothing is changed.

        A folder that is missing or empty stays so: it is locked when the run begins.
        """
        try:
            if self.is_main and self._content():
                self._take()
            yield
        finally:
            self.__exit__()

    def __enter__(self) -> RunFolder:
        if not self.is_main:
            return self
        try:
            self._take()
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_main:
            return
        for log in self.logs.values():
            log.close()
        self._lock.__exit__()

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume, intact or not."""
        return self.resume and not self.store.is_empty

    def _content(self) -> list[str]:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir {self.path} is a file; give a folder.")
        with storage_errors(self.path):
            return sorted(os.listdir(self.path)) if self.path.exists() else []

    def _take(self) -> None:
        """Lock the folder, or refuse it. One that is no run is left as it is; not even the lock is put there, for it
        is what marks a run."""
        content = self._content()
        if content and not _is_run(self.path):
            raise ValueError(
                f"{self.path} is not empty ({content[0]!r}) and no run of ours; nothing there was touched. "
                "Choose another output_dir."
            )
        if not self._lock.is_held:
            self._lock.__enter__()
        content = [name for name in self._content() if name != LOCK_NAME]
        if content and not (self.resume or self.overwrite):
            raise ValueError(
                f"{self.path} is not empty ({content[0]!r}). Continue that run with --resume, replace it with "
                "--overwrite, or choose another output_dir."
            )
        if self.resume and self.store.is_empty and self._has_trained():
            raise StorageError(
                f"{self.store.folder}: the run's checkpoints are gone, and resumed without them it would start over. "
                "Restore them from a copy, or start anew with --overwrite."
            )

    def _has_trained(self) -> bool:
        """Whether the run has left a result or a training step: before the first step it has saved a checkpoint."""
        if (self.path / RESULT).is_file():
            return True
        log = self.path / "metrics.jsonl"
        if not log.is_file():
            return False
        with storage_errors(log), log.open("rb") as lines:
            return any(line.endswith(b"\n") and b'"kind":' not in line for line in lines)

    def _begin(self) -> None:
        if self.overwrite:
            for name in self._content():
                if name != LOCK_NAME:
                    remove_tree(self.path / name)
        make_folder(self.store.folder)
        self.store.clean()
        recover_folder(self.path / "model")
        self.logs = {name: JsonLines(self.path / name) for name in LOGS}

    def latest(self) -> Checkpoint | None:
        """The checkpoint to go on from, when resuming."""
        return self.store.latest() if self.resume else None

    def offsets(self) -> dict[str, int]:
        """How long the logs are, once the disk has them."""
        for log in self.logs.values():
            log.sync()
        return {name: log.offset() for name, log in self.logs.items()}

    def truncate_logs(self, offsets: Mapping[str, int]) -> None:
        """Cut the logs to where a checkpoint left them."""
        for name, log in self.logs.items():
            log.truncate(offsets.get(name, 0))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """The resolved configuration (``config.to_toml``)."""
        replace_bytes(self.path / "config.toml", tomli_w.dumps(plain(config)).encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        replace_bytes(self.path / name, pack_json(value))

    def write_model(self, files: Mapping[str, bytes], name: str = "model") -> None:
        """Replace the exported model folder in one go."""
        swap_folder(self.path / name, files)


def _is_run(path: Path) -> bool:
    """Whether a run of ours was begun in this folder: it signed the lock, or was killed before it could and left it
    empty, with nothing beside it; or has left its checkpoints and log there."""
    try:
        content = (path / LOCK_NAME).read_bytes()
        if not content and os.listdir(path) == [LOCK_NAME]:
            return True
        # behind the newest signature may be the end of a longer one, which a kill has left there
        holder = json.loads(content.partition(b"\n")[0])
    except (OSError, ValueError):
        holder = None
    signed = isinstance(holder, dict) and {"pid", "host", "started"} <= holder.keys()
    return signed or ((path / "checkpoints").is_dir() and (path / "metrics.jsonl").is_file())


def plain(value: Any) -> Any:
    """Tuples, paths and unset values in a form TOML and JSON have."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def environment() -> dict[str, Any]:
    """Versions, hardware and commit, for ``environment.json``."""
    packages = ("esrl", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "sacrebleu", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": "compiled kernels" if why_not() is None else f"no compiled kernels: {why_not()}",
        "packages": {name: metadata.version(name) for name in packages},
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _processor() -> str:
    return facts().get("model name", "") if facts() else platform.processor()


def _commit() -> str | None:
    """The commit of the source tree this package runs from, if it is one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def read_folder(path: Path) -> dict[str, bytes]:
    """All plain files of a folder, to be written elsewhere in one go."""
    try:
        return {entry.name: Path(entry.path).read_bytes() for entry in os.scandir(path) if entry.is_file()}
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}.") from error
