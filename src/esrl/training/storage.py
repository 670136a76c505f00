"""Durable files: what a crash, a kill or a full disk leaves behind is always whole.

Every change to the disk is one call of ``os`` (open, write, fsync, replace, rename, mkdir, unlink, rmdir, ftruncate),
so that the tests can kill the process before each of them. Every ``OSError`` becomes a ``StorageError`` that names the
path, the bytes that were to be written, and the remedy.

Names with a meaning, always beside the thing they belong to:

    .tmp-NAME      being written, never read, may be deleted at any time
    .old-NAME      the previous content of a folder while the new one moves in
    .delete-NAME   being deleted
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from esrl.errors import NumericsError, StorageError

TEMPORARY, OLD, DELETED = ".tmp-", ".old-", ".delete-"

# Characters that json leaves raw and that split lines, drive terminals or cannot be encoded; all can be escaped.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW


@contextmanager
def storage_errors(path: Path, num_bytes: int | None = None, needed: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``StorageError``.

    Args:
        path: what the block works on.
        num_bytes: how many bytes it was to write there; None when it writes none.
        needed: how many bytes the whole save needs, when that is more.
    """
    try:
        yield
    except OSError as error:
        size = "" if num_bytes is None else f" ({num_bytes} bytes to write)"
        remedy = _remedy(error.errno, path, needed or num_bytes or 0)
        raise StorageError(f"{path}{size}: {error.strerror or error}. {remedy}") from error


def _remedy(code: int | None, path: Path, num_bytes: int) -> str:
    megabytes = max(1, math.ceil(num_bytes / 1e6))
    if code == errno.ENOSPC:
        advice = f"Free {megabytes} MB on this disk"
    elif code == errno.EDQUOT:
        advice = f"Free {megabytes} MB of the disk quota, or have it raised"
    elif code == errno.EFBIG:
        advice = "Raise the limit on the size of a file (ulimit -f, or the file system's own)"
    elif code in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = f"Make {path.parent} writable for this user"
    else:
        advice = "Check the path and the disk"
    return f"{advice} and start the same command with --resume."


def is_plain_name(name: str) -> bool:
    """Whether ``name`` can only mean a file directly inside the folder it is joined to."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a write may be short: at a size limit, on a nearly full disk, above 2 GiB
        rest = rest[os.write(fd, rest) :]


def write_bytes(path: Path, data: bytes, needed: int | None = None) -> None:
    """Create ``path``, or cut it to nothing, write ``data`` and wait until the disk has it.

    Not atomic: for files in a folder that nobody reads yet. ``needed`` is the size of the whole save, for the message.
    """
    with storage_errors(path, len(data), needed):
        fd = os.open(path, _CREATE, 0o666)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries: without this a power cut may undo a rename."""
    with storage_errors(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
                raise
        finally:
            os.close(fd)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents where missing, durably."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    with storage_errors(folder):
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not folder.is_dir():  # a folder may have been created by another process of this run
                raise
    sync_folder(folder.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` atomically: at every instant the old or the new content is there whole."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        write_bytes(temporary, data)
        with storage_errors(path, len(data)):
            os.replace(temporary, path)
    except StorageError:
        with suppress(OSError):  # frees a full disk; the error above is the one to tell
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a file or a folder; links are deleted, not followed. Nothing happens where nothing is.

    It is renamed to ``.delete-NAME`` first, so that no half-deleted folder ever carries the name.
    """
    if path.name.startswith(DELETED):
        doomed = path
    else:
        doomed = path.with_name(DELETED + path.name)
        _delete(doomed)
        if not os.path.lexists(path):
            return
        with storage_errors(path):
            os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    with storage_errors(path):
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            os.unlink(path)
            return
        for name in sorted(os.listdir(path)):
            _delete(path / name)
        os.rmdir(path)


def swap_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace the whole content of ``folder`` by ``files``, which are written in their order.

    Killed at any instant, and after ``recover_folder(folder)``, either the old or the new content is there whole.
    For the moment between two renames only ``.old-NAME`` exists: somebody who reads just then finds no folder.

    Raises:
        StorageError: the disk refused; ``folder`` still holds the old or already the new content.
        ValueError: a file's name is not plain.
    """
    for name in files:
        if not is_plain_name(name):
            raise ValueError(f"file name {name!r} leaves the folder {folder}; use a name without / and not '..'.")
    new, old = folder.with_name(TEMPORARY + folder.name), folder.with_name(OLD + folder.name)
    needed = sum(map(len, files.values()))
    recover_folder(folder)
    try:
        with storage_errors(new, needed):
            os.mkdir(new)
        for name, data in files.items():
            write_bytes(new / name, data, needed)
        sync_folder(new)
        with storage_errors(folder):
            if os.path.lexists(folder):
                os.rename(folder, old)
            os.rename(new, folder)
        sync_folder(folder.parent)
    except StorageError:
        with suppress(StorageError):  # frees a full disk; the error above is the one to tell
            _undo_swap(folder)
        raise
    remove_tree(old)


def recover_folder(folder: Path) -> None:
    """Finish or undo a ``swap_folder`` that was killed. To be called at the start of a run."""
    _undo_swap(folder)
    remove_tree(folder.with_name(OLD + folder.name))
    _delete(folder.with_name(DELETED + folder.name))


def _undo_swap(folder: Path) -> None:
    """Bring the old content back if nothing has taken its place, and drop what was to replace it."""
    old = folder.with_name(OLD + folder.name)
    if os.path.lexists(old) and not os.path.lexists(folder):
        with storage_errors(folder):
            os.rename(old, folder)
        sync_folder(folder.parent)
    _delete(folder.with_name(TEMPORARY + folder.name))


def dump_json(value: object, where: str, sort_keys: bool = False) -> str:
    """JSON on one line; ``json.loads`` gives back the same value, floats to the last bit, tuples as lists.

    Raises:
        NumericsError: a number is not finite; ``where`` is the prefix of its name in the message.
        ValueError: a value JSON has no form for, or a key that is not a string and would come back as one.
    """
    _check_json(value, where)
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, sort_keys=sort_keys)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def _check_json(value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise NumericsError(f"{where} is {value}; only finite numbers are written. Find the step that made it.")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON keys are strings. Use str(key).")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where} is a {type(value).__name__}; JSON has none. Use .item(), .tolist() or str().")


class JsonLines:
    """A file of one JSON object per line that is only ever appended to, and cut back when a run is resumed.

    The offset belongs into the checkpoint, after a ``sync``: lines behind it are written again by the resumed run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        is_new = not os.path.lexists(path)
        with storage_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if is_new:
            sync_folder(path.parent)

    def append(self, record: Mapping[str, object]) -> None:
        """Write one line, in one write; a refused line leaves no part of itself behind."""
        line = (dump_json(dict(record), self.path.name) + "\n").encode()
        with storage_errors(self.path, len(line)):
            start = self.offset()
            try:
                _write_all(self._fd, line)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._fd, start)
                raise

    def offset(self) -> int:
        """The file's length in bytes."""
        with storage_errors(self.path):
            return os.fstat(self._fd).st_size

    def sync(self) -> None:
        """Wait until the disk has every line."""
        with storage_errors(self.path):
            os.fsync(self._fd)

    def truncate(self, offset: int) -> None:
        """Cut the file to an earlier ``offset()``.

        Raises:
            StorageError: the file is shorter, or no line ends there: it is not the file the offset was taken from.
        """
        size = self.offset()
        with storage_errors(self.path):
            ends_line = offset == 0 or (0 < offset <= size and os.pread(self._fd, 1, offset - 1) == b"\n")
            if not ends_line:
                raise StorageError(
                    f"{self.path} has {size} bytes and no line that ends at byte {offset}, where the checkpoint "
                    "continues it. Restore the file of this run, or start anew with --overwrite."
                )
            os.ftruncate(self._fd, offset)
            os.fsync(self._fd)

    def close(self) -> None:
        """Give the file back; may be called twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with storage_errors(self.path):
                os.close(fd)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
