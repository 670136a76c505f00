"""Tables into records: TSV, JSONL, parquet and Hugging Face datasets, each row with the place it came from."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from esrl.data.files import file_kind, json_type, nearest, read_json_lines, read_lines, require_file

Row = tuple[str, dict[str, object] | None]
"""Where the row stands (``path:line``) and its values by column; None for a row that is blank."""

_FILE_SUFFIXES = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")
_PROBE_SECONDS = 4.0


def read_table(path: Path, wanted: list[str]) -> Iterator[Row]:
    """Rows of one file, by its suffix.

    Args:
        wanted: the columns that a TSV's header must name. Numbers mean a TSV without a header, whose columns are
            called ``"0"``, ``"1"``, ...; it has no quoting, so a tab is always the end of a cell.

    Raises:
        ValueError: naming ``path:line``, for whatever is wrong with the file (see `files`).
    """
    require_file(path)
    if path.name.endswith((".tsv", ".tsv.gz")):
        return _tsv_rows(path, wanted)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return (
            (f"{path}:{number}", value if value is None else flatten(value)) for number, value in read_json_lines(path)
        )
    if path.name.endswith(".parquet"):
        return _parquet_rows(path)
    raise ValueError(
        f"{path}: a table of an unknown kind; it must end in {', '.join(_FILE_SUFFIXES)}. "
        "Parallel text goes in `source` and `reference` instead of `path`."
    )


def is_table_name(path: str) -> bool:
    return path.endswith(_FILE_SUFFIXES)


def read_dataset_folder(folder: Path, split: str, wanted: list[str]) -> Iterator[Row]:
    """Rows of a split of a dataset folder: one written by ``save_to_disk``, or one of data files.

    Data files belong to a split by name: ``train.jsonl``, ``train-00000-of-00002.parquet``, ``data/train.tsv`` or
    ``train/anything.parquet``; they are read in the order of their names. A folder with a single data file needs no
    such name.

    Raises:
        ValueError: no data file, no such split (with the splits there are), or a damaged file.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, split)
    files = sorted(p for p in folder.rglob("*") if is_table_name(p.name) and file_kind(p) == "file")
    if not files:
        raise ValueError(f"{folder}: no dataset in this folder; it needs files ending in {', '.join(_FILE_SUFFIXES)}.")
    names = {p: _split_of(p.relative_to(folder)) for p in files}
    chosen = [p for p in files if split in names[p]] or (files if len(files) == 1 else [])
    if not chosen:
        known = sorted({name for parts in names.values() for name in parts if name})
        raise ValueError(f"{folder}: no split {split!r}{nearest(split, known)}; its files are for {', '.join(known)}.")
    return (row for path in chosen for row in read_table(path, wanted))


def read_hub(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """Rows of a data set on the Hugging Face Hub, or of its copy in the cache under ``HF_HUB_OFFLINE=1``.

    Raises:
        ValueError: the package ``datasets`` is missing, the Hub cannot be reached, or it has no such data.
    """
    datasets = _import_datasets(name)
    try:
        _require_hub()
        data = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name}: neither a file or folder here, nor a data set the Hub gave us (split {split!r}, subset "
            f"{subset!r}: {_one_line(error)}). Check the path or name; without network use files, or a data set in "
            "the cache with HF_HUB_OFFLINE=1."
        ) from error
    return _dataset_rows(data, name)


def flatten(record: Mapping[str, object]) -> dict[str, object]:
    """Nested objects to dotted names: ``{"translation": {"de": "ja"}}`` gives ``{"translation.de": "ja"}``."""
    flat: dict[str, object] = {}
    pending: list[tuple[str, object]] = list(record.items())[::-1]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending.extend((f"{name}.{key}", inner) for key, inner in list(value.items())[::-1])
        else:
            flat[name] = value
    return flat


def require_columns(wanted: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a table without the wanted columns, with the ones there are and the nearest name."""
    names = list(known)
    for name in wanted:
        if name not in names:
            shown = ", ".join(f'"{known_name}"' for known_name in names[:20]) or "none"
            raise ValueError(f'{where}: no column "{name}"{nearest(name, names)}; the columns are {shown}.')


def as_text(value: object, name: str, where: str, *, exact: bool) -> str:
    """A value as text: a missing one is empty; another than a string is written as JSON, or refused when ``exact``."""
    if isinstance(value, str):
        text = value
    elif value is None:
        text = ""
    elif exact:
        raise ValueError(
            f'{where}: column "{name}" holds a {json_type(value)} ({_shorten(value)}); it must be a string.'
        )
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
        except RecursionError as error:
            raise ValueError(f'{where}: column "{name}" is nested too deeply; flatten it.') from error
    if "\0" in text:
        raise ValueError(f'{where}: column "{name}" holds a NUL character at {text.index(chr(0))}; remove it.')
    if not text.isascii() and (lone := re.search("[\ud800-\udfff]", text)):
        raise ValueError(
            f'{where}: column "{name}" holds an unpaired surrogate (U+{ord(lone[0]):04X}), which no UTF-8 text can; '
            "repair the escape."
        )
    return text


def _tsv_rows(path: Path, wanted: list[str]) -> Iterator[Row]:
    names: list[str] = []
    for number, line in read_lines(path):
        cells = line.split("\t")
        where = f"{path}:{number}"
        if not names:
            numbered = all(name.isdecimal() for name in wanted)
            names = [str(index) for index in range(len(cells))] if numbered else cells
            require_columns(wanted, names, where)
            if len(set(names)) != len(names):
                raise ValueError(f"{where}: the header names a column twice; give each its own name: {names}.")
            if not numbered:
                continue
        if not line.strip():
            yield where, None
        elif len(cells) != len(names):
            raise ValueError(f"{where}: {len(cells)} cells, but {len(names)} columns; put one tab between two cells.")
        else:
            yield where, dict(zip(names, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs the package pyarrow: pip install 'esrl[hub]'.") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", flatten(record)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}:{number + 1}: damaged parquet data ({_one_line(error)}); fetch it again.") from error


def _saved_rows(folder: Path, split: str) -> Iterator[Row]:
    datasets = _import_datasets(str(folder))
    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid and JSONDecodeError are ValueErrors
        raise ValueError(f"{folder}: damaged data set ({_one_line(error)}); save or fetch it again.") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            known = list(data)
            raise ValueError(f"{folder}: no split {split!r}{nearest(split, known)}; it has {', '.join(known)}.")
        data = data[split]
    return _dataset_rows(data, str(folder))


def _dataset_rows(data: Iterable[Mapping[str, object]], origin: str) -> Iterator[Row]:
    number = 0
    try:
        for number, record in enumerate(data, start=1):
            yield f"{origin}:{number}", flatten(record)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{origin}:{number + 1}: damaged data ({_one_line(error)}); save or fetch it again."
        ) from error


def _import_datasets(wanted_for: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{wanted_for}: needs the package datasets: pip install 'esrl[hub]'.") from error
    return datasets


def _require_hub() -> None:
    """Fail in seconds when the Hub is out of reach; the loader itself goes on trying for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    with contextlib.suppress(HTTPError):  # an answer, whatever its status
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PROBE_SECONDS).close()


def _split_of(path: Path) -> set[str]:
    """The names a data file answers to: its folders, and its own name up to the first ``-`` or ``.``."""
    return {*path.parts[:-1], re.split(r"[-.]", path.name)[0]}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
