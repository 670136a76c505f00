"""One run per folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from esrl.errors import LockedError, StorageError
from esrl.training.storage import make_folder, storage_errors

LOCK_NAME = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[RunLock] = set()


class RunLock:
    """Holds ``folder/.lock`` while the block runs; the kernel frees it when the process ends, however it ends.

    The file stays, with the last holder's pid, host and start time in it: whoever deleted it could delete a lock that
    somebody else has just taken. Children made by fork do not keep the lock alive.

    Raises:
        LockedError: on entry, when another process (or another lock of this one) holds it.
        StorageError: on entry, when the file system has no locks or refuses the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK_NAME
        self._fd = -1

    @property
    def is_held(self) -> bool:
        return self._fd >= 0

    def __enter__(self) -> RunLock:
        make_folder(self.folder)
        with storage_errors(self.path):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            self._lock(fd)
            _write_holder(fd, self.path)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        _held.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _held.discard(self)
        self._close()

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _read_holder(fd)
            pid, host = holder.get("pid", "unknown"), holder.get("host", "an unknown host")
            raise LockedError(
                f"{self.folder} is in use by process {pid} on {host}, started {holder.get('started', 'unknown')}. "
                f"Wait for it, end it (kill {pid} on {host}), or choose another output_dir."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise StorageError(f"{self.path}: {error.strerror}. Check the path and the disk.") from error
            raise StorageError(
                f"{self.path}: this file system has no file locks ({error.strerror}), and without them two runs could "
                "write into one folder. Choose an output_dir on a local disk."
            ) from error

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)  # frees the lock unless a copy of the file is open elsewhere


def _write_holder(fd: int, path: Path) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    data = (json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "started": started}) + "\n").encode()
    with storage_errors(path, len(data)):
        # in this order a kill never leaves it empty once it has been signed
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))


def _read_holder(fd: int) -> dict[str, object]:
    """Who holds the lock; waits up to a second for a holder that has locked the file but not yet signed it."""
    holder: dict[str, object] = {}
    for _ in range(20):
        try:
            holder = dict(json.loads(os.pread(fd, 4096, 0)))
        except (ValueError, TypeError):
            holder = {}
        if holder and not _is_gone(holder):
            break
        time.sleep(0.05)
    return holder


def _is_gone(holder: dict[str, object]) -> bool:
    """Whether the signature is that of an earlier holder that was killed on this host."""
    pid = holder.get("pid")
    if holder.get("host") != os.uname().nodename or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it exists and belongs to somebody else
        return False
    return False


def _close_in_child() -> None:
    """A forked worker that outlives a killed run would keep the run's lock: flock belongs to the open file."""
    for lock in _held:
        lock._close()
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
