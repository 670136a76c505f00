"""Checkpoints: a folder of files with a manifest of their hashes, written whole or not at all.

    checkpoints/
      step-00000120/
        model.safetensors, state.json, ...   what the loop gave
        manifest.json                        format version, step, sha256 and size of every file, its own checksum

No pickle. What ``latest`` returns are the very bytes that were verified, read once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from esrl.errors import StorageError
from esrl.training.storage import (
    DELETED,
    OLD,
    TEMPORARY,
    dump_json,
    is_plain_name,
    make_folder,
    recover_folder,
    remove_tree,
    swap_folder,
)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_ALIASES = "esrl.aliases"
_STEP_FOLDER = re.compile(rf"({re.escape(OLD)})?(step-(\d{{8,}}))")
_SEAL = ', "checksum": "{}"}}\n'

# What reading a damaged checkpoint fails with; anything else (no permission, no memory) is no damage.
_DAMAGE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENXIO,
    errno.EIO,
    errno.EBADMSG,
    getattr(errno, "EUCLEAN", errno.EIO),
}


class _DamagedError(Exception):
    """Why a checkpoint is passed over."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every byte was verified."""

    step: int
    path: Path
    files: dict[str, bytes]
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, each with the reason; to be shown to the user as warnings."""


class CheckpointStore:
    """The checkpoints of one run. One process writes at a time (``lock.RunLock``)."""

    def __init__(self, folder: Path, save_total_limit: int | None = None) -> None:
        """
        Args:
            folder: where they lie; created by the first save.
            save_total_limit: how many to keep, 1 or more; None keeps all.
        """
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(f"save_total_limit is {save_total_limit}; keep 1 checkpoint or more, or None for all.")
        self.folder = folder
        self.save_total_limit = save_total_limit

    def save(self, step: int, files: Mapping[str, bytes]) -> Path:
        """Write a checkpoint and wait until the disk has it; then remove those that are no longer wanted.

        A checkpoint of this step that is intact and identical stays untouched; any other is replaced, and until the
        new one stands the old one is what ``latest`` finds. Removed are the oldest beyond the limit, and those of
        later steps: they are damaged, or the run was taken up before them and no longer leads there.

        Raises:
            StorageError: the disk refused; the earlier checkpoints, or the new one already, are there whole.
            ValueError: a negative step, or a file name that is not plain or is the manifest's.
        """
        if step < 0:
            raise ValueError(f"step is {step}; a checkpoint's step is 0 or more.")
        if MANIFEST in files:
            raise ValueError(f"{MANIFEST} is written by the store itself; choose another file name.")
        path = self.folder / f"step-{step:08d}"
        if not _holds(path, step, files):
            make_folder(self.folder)
            swap_folder(path, {**files, MANIFEST: _manifest(step, files)})
        self._prune(step)
        return path

    @property
    def is_empty(self) -> bool:
        """Whether no checkpoint, intact or not, is there."""
        return not self._folders()

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint; None when none was ever saved. Changes nothing on the disk.

        Raises:
            StorageError: there are checkpoints but none is intact, or one was written in another format.
        """
        skipped: list[str] = []
        for step, path in reversed(self._folders()):
            try:
                files = _load(path, step)
            except _DamagedError as reason:
                skipped.append(f"{path.name}: {reason}")
            else:
                return Checkpoint(step, path, files, tuple(skipped))
        if skipped:
            raise StorageError(
                f"{self.folder} holds no intact checkpoint ({'; '.join(skipped)}). "
                "Restore one from a copy, or start anew with --overwrite."
            )
        return None

    def clean(self) -> None:
        """Remove what a killed save left. To be called at the start of a run, under its lock."""
        for name in self._names():
            if name.startswith(OLD):
                recover_folder(self.folder / name.removeprefix(OLD))
        for name in self._names():
            if name.startswith((TEMPORARY, DELETED)):
                remove_tree(self.folder / name)

    def _prune(self, saved: int) -> None:
        others = [(step, path) for step, path in self._folders() if step != saved]
        earlier = [path for step, path in others if step < saved]
        later = [path for step, path in others if step > saved]
        surplus = 0 if self.save_total_limit is None else max(0, len(earlier) + 1 - self.save_total_limit)
        for path in later + earlier[:surplus]:
            remove_tree(path)

    def _folders(self) -> list[tuple[int, Path]]:
        """Oldest first. ``.old-step-…`` counts too, before its successor: a killed swap leaves nothing else."""
        found = []
        for name in self._names():
            match = _STEP_FOLDER.fullmatch(name)
            if match and match[2] == f"step-{int(match[3]):08d}":
                found.append((int(match[3]), match[1] is None, self.folder / name))
        return [(step, path) for step, _, path in sorted(found)]

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []


def _manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    """The manifest's bytes: one JSON object that ends in the checksum of everything before it."""
    hashes = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    text = dump_json({"format_version": FORMAT_VERSION, "step": step, "files": hashes}, MANIFEST)
    head = text.removesuffix("}")
    return (head + _SEAL.format(hashlib.sha256(head.encode()).hexdigest())).encode()


def _read_manifest(path: Path, step: int) -> dict[str, tuple[str, int]]:
    """sha256 and size of every file. The checksum comes first: a flipped bit is damage, not another format."""
    data = _read(path / MANIFEST)
    head = data[: -len(_SEAL.format("0" * 64))]
    if data != head + _SEAL.format(hashlib.sha256(head).hexdigest()).encode():
        raise _DamagedError(f"{MANIFEST} does not match its own checksum")
    try:
        manifest = json.loads(data)
        version, named_step = manifest["format_version"], manifest["step"]
        entries = {} if version != FORMAT_VERSION else dict(manifest["files"])
        hashes = {name: (entry["sha256"], entry["size"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _DamagedError(f"{MANIFEST} is no manifest") from error
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{path} has checkpoint format {version!r}; this version of esrl expects format {FORMAT_VERSION}. "
            "Resume with the version that wrote it, or start anew in another output_dir."
        )
    if named_step != step:
        raise _DamagedError(f"{MANIFEST} is that of step {named_step!r}")
    for name in hashes:
        if not is_plain_name(name):
            raise _DamagedError(f"{MANIFEST} names {name!r}, which is not a file of this folder")
    return hashes


def _load(path: Path, step: int) -> dict[str, bytes]:
    if path.is_symlink():
        raise _DamagedError("is a link, not a folder")
    files = {}
    for name, (sha256, size) in _read_manifest(path, step).items():
        files[name] = data = _read(path / name, size)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _DamagedError(f"{name} does not match its sha256")
    return files


def _read(path: Path, size: int | None = None) -> bytes:
    """A regular file's bytes. No link is followed, and opening a pipe does not wait for a writer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _DamagedError(f"{path.name} is not a regular file")
            if size is not None and status.st_size != size:
                raise _DamagedError(f"{path.name} has {status.st_size} bytes instead of {size}")
            with open(fd, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(fd)
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else error.strerror
        if error.errno in _DAMAGE:
            raise _DamagedError(f"{path.name}: {reason}") from error
        raise StorageError(f"{path}: {reason}. Make it readable and start the same command again.") from error


def _holds(path: Path, step: int, files: Mapping[str, bytes]) -> bool:
    try:
        return _load(path, step) == dict(files)
    except _DamagedError:
        return False


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file; the same tensors and metadata give the same bytes.

    Tied tensors (the same memory, shape and strides under several names) are stored once, and ``unpack_tensors`` ties
    them again; other views into one memory are stored each on its own. Any device; they come back on the CPU.
    """
    stored: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    memories: set[object] = set()
    aliases: dict[str, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        memory = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        # safetensors refuses tensors that share memory, even where they do not overlap
        stored[name] = tensor.cpu().clone() if memory in memories else tensor.cpu()
        stored[name] = stored[name].contiguous()
        memories.add(memory)
    notes = dict(metadata or {})
    if aliases:
        notes[_ALIASES] = dump_json(aliases, _ALIASES, sort_keys=True)
    return _sorted_header(safetensors.torch.save(stored, notes or None))


def _sorted_header(data: bytes) -> bytes:
    """The same file with its header in order: safetensors writes the metadata in a random one."""
    header, start = _header(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[start:]


def _header(data: bytes) -> tuple[dict, int]:
    """The header and the offset behind it; the offsets in it count from there."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), end


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    """What ``pack_tensors`` packed, on the CPU.

    Raises:
        StorageError: not a safetensors file.
    """
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise StorageError(
            f"{len(data)} bytes of tensors are no safetensors file ({error}). Save them anew."
        ) from error
    notes = _header(data)[0].get("__metadata__", {})
    for name, original in json.loads(notes.get(_ALIASES, "{}")).items():
        tensors[name] = tensors[original]
    return tensors


def pack_json(value: object) -> bytes:
    """JSON bytes with sorted keys; equal values give equal bytes, floats come back to the last bit.

    Raises:
        NumericsError: a number is not finite.
        ValueError: a value or key JSON has no form for.
    """
    return (dump_json(value, "state", sort_keys=True) + "\n").encode()


def unpack_json(data: bytes) -> object:
    """What ``pack_json`` packed; tuples come back as lists.

    Raises:
        StorageError: not JSON.
    """
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{len(data)} bytes of state are no JSON ({error}). Save them anew.") from error
