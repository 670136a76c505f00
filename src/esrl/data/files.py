"""Lines and JSON objects out of files, checked: what is wrong is named as ``file:line`` before anything is trained.

Only ``\\n`` ends a line; one ``\\r`` before it, or at the end of the file, belongs to the line end. Every other
character stays text, among them U+0085, U+2028 and a carriage return inside a line (a file with carriage returns and
not a single ``\\n``, the line ends of old Macs, is refused). A byte order mark of UTF-8 at the start is dropped.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is refused: it is a wrong file or a decompression bomb, not a sentence."""

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def nearest(name: str, known: list[str]) -> str:
    """`` (nearest: "..." )`` for an error message, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f' (nearest: "{close[0]}")' if close else ""


def file_kind(path: Path) -> str:
    """``"file"``, ``"directory"``, ``"missing"`` or what else there is, such as ``"a named pipe"``; opens nothing.

    Raises:
        ValueError: the path cannot be looked up (no permission, a loop of links, an impossible name).
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ValueError(f"{path}: cannot be looked up ({error}); check the path and its permissions.") from error
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def require_file(path: Path) -> None:
    """Refuse what is not a regular file, before an open that could wait for ever.

    Raises:
        ValueError: it is missing, a directory, a pipe, a device or a socket.
    """
    kind = file_kind(path)
    if kind == "missing":
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() and os.access(folder, os.R_OK) else []
        raise ValueError(f"{path}: no such file{nearest(path.name, names)}; check the path, and `root` if it is used.")
    if kind == "directory":
        raise ValueError(f"{path}: is a directory; name a file in it.")
    if kind != "file":
        raise ValueError(f"{path}: is {kind}, not a regular file; write its content to a file and name that.")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its line end) of a UTF-8 file, gzip-compressed or not.

    A file is taken as gzip by its first two bytes or its name (``.gz``).

    Raises:
        ValueError: with ``path:line``: not a readable regular file, empty, broken gzip, not UTF-8 (with the byte
            offset in the decompressed text), a NUL byte, no ``\\n`` but carriage returns, or an enormous line.
    """
    require_file(path)
    number = offset = 0
    try:
        with _open(path) as stream:
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                start = offset
                offset += len(raw)
                if start == 0:
                    _refuse_wide(raw, path)
                    start = len(raw) - len(raw.removeprefix(_UTF8_BOM))
                    raw = raw[start:]
                    if not raw:
                        break
                number += 1
                yield number, _decode(raw, f"{path}:{number}", start)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: broken gzip data ({error}); fetch or pack the file again.") from error
    except OSError as error:
        raise ValueError(f"{path}:{number + 1}: cannot be read ({error}); check the disk and permissions.") from error
    if number == 0:
        raise ValueError(f"{path}: the file is empty; it needs at least one line of text.")


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, object] | None]]:
    """Yield (line number, object) of a JSONL file; None for a line that is blank.

    Raises:
        ValueError: as `read_lines`, or a line that is not one JSON object.
    """
    for number, line in read_lines(path):
        if not line.strip():
            yield number, None
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except RecursionError as error:
            raise ValueError(f"{where}: the JSON is nested too deeply; flatten it.") from error
        except ValueError as error:  # JSONDecodeError, or an integer of more digits than Python converts
            raise ValueError(f"{where}: not valid JSON ({error}); each line must hold one object.") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: holds a JSON {json_type(value)}; each line must hold one object.")
        yield number, value


def json_type(value: object) -> str:
    """What a JSON value is called in JSON."""
    for kind, name in ((bool, "boolean"), (str, "string"), (int, "number"), (float, "number"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object" if isinstance(value, dict) else type(value).__name__


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as probe:
        compressed = path.suffix == ".gz" or probe.read(2) == _GZIP_MAGIC
    if compressed and path.stat().st_size:  # an empty file stays an empty file
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb")


def _refuse_wide(raw: bytes, path: Path) -> None:
    """UTF-16 and UTF-32 by their byte order marks, or by a NUL in every other byte."""
    names = [name for bom, name in _WIDE_BOMS.items() if raw.startswith(bom)]
    if not names and len(raw) >= 4:
        zeros = [raw[parity:64:2].count(0) / len(raw[parity:64:2]) for parity in (0, 1)]
        names = ["UTF-16"] if max(zeros) > 0.75 and min(zeros) == 0 else []
    if names:
        raise ValueError(f"{path}:1: the file is {names[0]}, not UTF-8; convert it: iconv -f {names[0]} -t UTF-8.")


def _decode(raw: bytes, where: str, start: int) -> str:
    """The text of one raw line whose first byte is byte ``start`` of the text."""
    if len(raw) > MAX_LINE_BYTES:
        raise ValueError(
            f"{where}: the line is longer than {MAX_LINE_BYTES:,} bytes; check the file, or split the line."
        )
    if (nul := raw.find(b"\0")) >= 0:
        raise ValueError(f"{where}: a NUL byte at byte offset {start + nul}; the file is binary or damaged, repair it.")
    body = raw.removesuffix(b"\n").removesuffix(b"\r")
    if where.endswith(":1") and b"\r" in body and not raw.endswith(b"\n"):
        raise ValueError(f"{where}: lines end in carriage returns (old Mac); convert them: tr '\\r' '\\n'.")
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8: byte 0x{body[error.start]:02x} at byte offset {start + error.start}; "
            "convert the file (iconv -f LATIN1 -t UTF-8, say) or repair the line."
        ) from error
