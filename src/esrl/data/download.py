"""Public data sets, fetched from their source and checked against known sums."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from esrl.data.files import file_kind, nearest
from esrl.errors import EsrlError, StorageError

MAX_FILE_BYTES = 64 * 2**20
"""More than this from a server is not one of these files."""

_BLOCK = 2**16


class DownloadError(EsrlError):
    """The source could not be reached, or sent something else than the file with the known sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSet:
    """A data set at its source."""

    base_url: str
    files: dict[str, str]
    """File name, below ``base_url`` and in the folder here, to the SHA-256 of its text after `tidy`."""
    licence: str


PUBLIC_SETS = {
    "multi30k": PublicSet(
        base_url=(
            "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw"
        ),
        files={
            "train.de.gz": "128675a4ceba176e2180e4f71ba3095b0b896475204506bc8b21ab4189a9f033",
            "train.en.gz": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
            "val.de.gz": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
            "val.en.gz": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
            "test_2016_flickr.de.gz": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
            "test_2016_flickr.en.gz": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
        },
        licence=(
            "Multi30k (Elliott, Frank, Sima'an and Specia, 2016; 29,000 German-English caption pairs) has no licence "
            'file. Its README: "solely provided for researchers and educators who wish to use the dataset for '
            'non-commercial research and/or educational purposes".'
        ),
    ),
}


def tidy(text: str) -> str:
    """The one change made to what the source has: blanks at both ends of a line go, a tab becomes a space."""
    return "\n".join(line.strip().replace("\t", " ") for line in text.split("\n"))


def fetch(
    name: str,
    destination: Path,
    *,
    base_url: str | None = None,
    timeout: float = 30.0,
    pauses: Sequence[float] = (1.0, 4.0, 15.0),
    say: Callable[[str], None] = print,
) -> Path:
    """Fetch a public data set into ``destination / name``; files that are there already and right are left alone.

    A file appears under its name only when it is complete and its sum is right.

    Args:
        base_url: a mirror to take the files from, http or https; None: the source.
        timeout: seconds without an answer or a byte after which an attempt has failed.
        pauses: seconds to wait before each further attempt after a failure that may pass.
        say: told the licence first, then each file as it comes.

    Returns:
        the folder.

    Raises:
        ValueError: no such data set, or ``base_url`` is not http(s).
        DownloadError: the source cannot be reached, lacks a file, or its text has another sum.
        StorageError: a file cannot be written.
    """
    if name not in PUBLIC_SETS:
        known = sorted(PUBLIC_SETS)
        raise ValueError(f'no public data set "{name}"{nearest(name, known)}; there is {", ".join(known)}.')
    public = PUBLIC_SETS[name]
    base = (public.base_url if base_url is None else base_url).rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"base_url is {base!r}; it must start with http:// or https://.")
    say(public.licence)
    folder = destination / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({error}); choose another folder.") from error
    for index, (file_name, digest) in enumerate(public.files.items(), start=1):
        progress = f"[{index}/{len(public.files)}] {file_name}"
        path = folder / file_name
        if file_kind(path) == "file" and _digest_of(path) == digest:
            say(f"{progress}: already there")
            continue
        url = f"{base}/{file_name}"
        packed = _download(url, timeout, pauses)
        text = _tidy_checked(packed, digest, url)
        _write_whole(path, gzip.compress(text, mtime=0))  # mtime 0: the same bytes at every download
        say(f"{progress}: {len(packed):,} bytes")
    return folder


def _download(url: str, timeout: float, pauses: Sequence[float]) -> bytes:
    """The body of ``url``, whole; failures that may pass are tried again."""
    for pause in (*pauses, None):
        try:
            return _get(url, timeout)
        except HTTPError as error:
            if pause is None or not (error.code >= 500 or error.code in (408, 429)):
                raise DownloadError(
                    f"{url}: the server answered {error.code} {error.reason}; check the address, or try later."
                ) from error
        except (OSError, http.client.HTTPException) as error:
            if pause is None:
                raise DownloadError(
                    f"{url}: not fetched in {len(pauses) + 1} attempts ({error}); check the network, or try later."
                ) from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _get(url: str, timeout: float) -> bytes:
    with urlopen(url, timeout=timeout) as response:
        expected = response.headers.get("Content-Length")
        body = bytearray()
        while block := response.read(_BLOCK):
            body += block
            if len(body) > MAX_FILE_BYTES:
                raise DownloadError(f"{url}: more than {MAX_FILE_BYTES:,} bytes; this is not the file. Check base_url.")
    if expected is not None and len(body) != int(expected):
        raise ConnectionError(f"cut off after {len(body):,} of {expected} bytes")
    return bytes(body)


def _tidy_checked(packed: bytes, digest: str, url: str) -> bytes:
    """The text in a downloaded file, tidied, if it is the one expected."""
    try:
        text = tidy(_unpack(packed).decode()).encode()
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DownloadError(f"{url}: not a whole gzip file of UTF-8 text ({error}); try again, or later.") from error
    found = hashlib.sha256(text).hexdigest()
    if found != digest:
        raise DownloadError(
            f"{url}: the text has SHA-256 {found}, not {digest}; it was changed on the way or at the source. Nothing "
            "was written: try again, and if it stays so, do not use it."
        )
    return text


def _unpack(packed: bytes) -> bytes:
    """Decompress, but not a bomb."""
    unpacker = zlib.decompressobj(wbits=31)  # 31: with a gzip header
    text = unpacker.decompress(packed, MAX_FILE_BYTES)
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise EOFError(f"it ends early, or holds more than {MAX_FILE_BYTES:,} bytes")
    return text


def _digest_of(path: Path) -> str | None:
    """The sum of the text of a file that is here; None when it cannot be read as gzip."""
    try:
        return hashlib.sha256(_unpack(path.read_bytes())).hexdigest()
    except (OSError, EOFError, zlib.error):
        return None


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside the file, then rename: nobody ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: {len(data):,} bytes not written ({error}); free space or choose a folder."
        ) from error
    except BaseException:  # Ctrl-C
        partial.unlink(missing_ok=True)
        raise
