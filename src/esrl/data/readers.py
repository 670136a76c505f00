"""The one way in: what data to use, and the examples it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from esrl.data.conversations import FORMATS, Format, columns_of, convert
from esrl.data.examples import MESSAGES, REFERENCE, REJECTED, SOURCE, Example, fixed_subset, number_examples
from esrl.data.files import file_kind, read_lines
from esrl.data.tables import Row, as_text, is_table_name, read_dataset_folder, read_hub, read_table, require_columns
from esrl.data.templates import TEMPLATES, fill, placeholders


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the examples are: either parallel text (``source``, ``reference``) or a table (``path``)."""

    source: Path | None = None
    """Parallel text, the inputs: UTF-8, a line each, plain or gzip."""
    reference: Path | None = None
    """Parallel text, the references: line n belongs to line n of `source`. None: there are no references."""
    path: str | None = None
    """A table: a .tsv, .jsonl (either .gz too) or .parquet file, a Hugging Face dataset folder, or a data set's name
    on the Hub."""
    split: str = "train"
    """The split to take from a dataset folder or from the Hub."""
    subset: str | None = None
    """The configuration to take from a data set on the Hub, such as "de-en"."""
    source_column: str = SOURCE
    """The table's column of inputs; dots go into nested columns ("translation.de"). A number, from "0", counts the
    columns of a TSV that has no header line."""
    reference_column: str | None = REFERENCE
    """The table's column of references, likewise. None: there are no references."""
    format: Format = "columns"
    """What a table's records are: `columns` (the two named above), or sets with columns of their own: `instruction`
    (instruction, input, output), `messages` (a chat), `preferences` (prompt, chosen, rejected) or `gsm8k`."""
    template: str | None = None
    """The prompt's text with {column} for a column's text, or a template's name: alpaca, plain (instruction, blank
    line, input). Unset: alpaca for `instruction`, the source as it is for all others. Not for chats."""
    template_without_input: str | None = None
    """Likewise, for records whose input is blank. Unset: the named template's own such form, or `template`."""
    limit: int | None = None
    """Use so many examples (1 or more): those with the smallest ids, whatever the order of the file. None: all."""
    root: Path | None = None
    """The folder that relative paths start from. None: the current folder."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.path is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(f"data: {given} of `source` and `path` given; name parallel text or a table, one of them.")
        if self.source is None and self.reference is not None:
            raise ValueError(
                f"data: `reference` ({self.reference}) goes with `source`; a table has `reference_column`."
            )
        if self.path is not None and not self.path.strip():
            raise ValueError("data: `path` is empty; name a file, a folder or a data set on the Hub.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data: limit is {self.limit}; it must be 1 or more, or left out for all examples.")
        if not self.source_column or self.reference_column == "":
            raise ValueError("data: a column name is empty; leave `reference_column` out (None) for no references.")
        if self.source_column == self.reference_column:
            raise ValueError(f'data: source and reference are the same column, "{self.source_column}".')
        self._check_format()
        if len({name.isdecimal() for name in self.wanted_columns}) > 1:
            raise ValueError(f"data: columns {self.wanted_columns} mix a number and a name; use two of a kind.")

    def _check_format(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"data: format is {self.format!r}; choose one of {', '.join(FORMATS)}.")
        if self.format != "columns":
            if self.source is not None:
                raise ValueError(f"data: format {self.format!r} is a table's; name it by `path`, not by `source`.")
            if self.source_column != SOURCE or self.reference_column not in (REFERENCE, None):
                raise ValueError(
                    f"data: format {self.format!r} has columns of fixed names; leave source_column and "
                    'reference_column out, or take format = "columns".'
                )
        if self.format == "preferences" and self.reference_column is None:
            raise ValueError("data: preferences need both answers; leave reference_column out.")
        given = [text for text in (self.template, self.template_without_input) if text is not None]
        if self.format == "messages" and given:
            raise ValueError("data: messages take the model's chat template; leave template out.")
        if self.template is None and self.template_without_input is not None and self.format != "instruction":
            raise ValueError("data: template_without_input goes with template; set both.")
        for text in given:
            if text not in TEMPLATES and not placeholders(text):
                raise ValueError(
                    f"data: template {text!r} names no column, so all prompts would be the same; write "
                    f"{{instruction}}, say, or one of {', '.join(TEMPLATES)}."
                )

    @property
    def templates(self) -> tuple[str, str] | None:
        """The template, and the one for records without input; None: the source is taken as it is."""
        name = self.template or ("alpaca" if self.format == "instruction" else None)
        if name is None:
            return None
        full, short = TEMPLATES.get(name, (name, name))
        own = self.template_without_input
        return full, short if own is None else TEMPLATES.get(own, (own, own))[1]

    @property
    def wanted_columns(self) -> list[str]:
        if self.format != "columns":
            return columns_of(self.format, self.reference_column is not None)
        return [name for name in (self.source_column, self.reference_column) if name is not None]

    def resolve(self, path: Path | str) -> Path:
        """The path, a relative one from `root`; "~" is the home folder."""
        path = os.path.expanduser(path)
        return Path(path) if self.root is None else self.root / path


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What was read, and what became of it."""

    origin: str
    read: int
    """Lines or rows, without a header."""
    kept: int
    skipped_empty: int
    """Left out because the source or the reference (where there are references) is empty or blank."""
    repeated: int
    """Examples equal to an earlier one; they are kept, with ids of their own."""
    beyond_limit: int
    """Left out by ``limit``."""
    skipped_equal: int = 0
    """Preferences left out because the chosen and the rejected answer are the same."""

    def __str__(self) -> str:
        parts = [f"{self.read:,} read"]
        if self.skipped_empty:
            parts.append(f"{self.skipped_empty:,} skipped (empty source or reference)")
        if self.skipped_equal:
            parts.append(f"{self.skipped_equal:,} skipped (chosen equals rejected)")
        if self.beyond_limit:
            parts.append(f"{self.beyond_limit:,} left out (limit)")
        parts.append(f"{self.kept:,} kept")
        if self.repeated:
            parts.append(f"{self.repeated:,} of all repeat an earlier one")
        return f"{self.origin}: {', '.join(parts)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedData:
    """Examples in the order of the file, and the report."""

    examples: tuple[Example, ...]
    report: DataReport


def load_examples(config: DataConfig, *, keep_blank: bool = False) -> LoadedData:
    """Read everything and check it.

    The source column becomes ``"source"`` and the reference column ``"reference"``; every further column is kept by
    its name (under ``"original_source"``, say, when it is called like one of these two), as text: what is not a
    string is written as JSON, and a missing value is empty. Texts are not changed in any other way. A record whose
    source or reference is empty or blank is skipped and counted, or kept (``keep_blank``), so that example n is line n.
    Other formats than ``columns`` and templates: see `conversations` and `templates`; with preferences the reference is
    the chosen answer and ``"rejected"`` the other one, which may be empty; a pair of equal answers is skipped.

    Raises:
        ValueError: ``path:line``, what is wrong there and what to do; nothing usable at all.
    """
    origin, rows = _open_rows(config)
    read = equal = 0
    records: list[dict[str, str]] = []
    for where, row in rows:
        read += 1
        columns = _blank(config) if row is None else _columns(row, config, where)
        if config.format == "preferences" and row is not None and columns[REFERENCE] == columns[REJECTED]:
            equal += 1
        elif keep_blank or all(columns[name].strip() for name in (SOURCE, REFERENCE) if name in columns):
            records.append(columns)
    if not records:
        raise ValueError(
            f"{origin}: no usable example among {read:,} read; each needs text in its source, and in its reference "
            "where there are references."
        )
    _fill_missing(records)
    examples = tuple(number_examples(records))
    repeated = sum(not example.id.endswith("-0") for example in examples)
    chosen = examples if config.limit is None else fixed_subset(examples, config.limit)
    report = DataReport(
        origin=origin,
        read=read,
        kept=len(chosen),
        skipped_empty=read - len(examples) - equal,
        skipped_equal=equal,
        repeated=repeated,
        beyond_limit=len(examples) - len(chosen),
    )
    return LoadedData(examples=chosen, report=report)


def _open_rows(config: DataConfig) -> tuple[str, Iterator[Row]]:
    if config.source is not None:
        _require_root(config, config.source)
        return str(config.resolve(config.source)), _parallel_rows(config)
    assert config.path is not None
    path = config.resolve(config.path)
    kind = file_kind(path)
    if kind == "directory":
        return str(path), read_dataset_folder(path, config.split, config.wanted_columns)
    looks_local = is_table_name(config.path) or config.path[0] in "./~" or config.path.count("/") > 1
    if kind != "missing" or looks_local:
        _require_root(config, config.path)
        return str(path), read_table(path, config.wanted_columns)
    return config.path, read_hub(config.path, config.subset, config.split)


def _require_root(config: DataConfig, path: Path | str) -> None:
    if config.root is not None and not config.root.exists() and not config.resolve(path).exists():
        raise ValueError(
            f"{config.resolve(path)}: no such file, nor a folder {config.root}. Name the folder where the data are "
            "(--data.root), or fetch them there: `esrl data multi30k` makes data/multi30k."
        )


def _parallel_rows(config: DataConfig) -> Iterator[Row]:
    assert config.source is not None
    source = config.resolve(config.source)
    if config.reference is None:
        for number, text in read_lines(source):
            yield f"{source}:{number}", {SOURCE: text}
        return
    reference = config.resolve(config.reference)
    counts = [0, 0]
    for left, right in zip_longest(read_lines(source), read_lines(reference)):
        counts = [counts[0] + (left is not None), counts[1] + (right is not None)]
        if left is not None and right is not None:
            yield f"{source}:{left[0]}", {SOURCE: left[1], REFERENCE: right[1]}
    if counts[0] != counts[1]:
        shorter = source if counts[0] < counts[1] else reference
        raise ValueError(
            f"{shorter}:{min(counts)}: the file ends here, but line n of one file must translate line n of the other: "
            f"{source} has {counts[0]:,} lines, {reference} has {counts[1]:,}. Find the missing or extra line."
        )


def _blank(config: DataConfig) -> dict[str, str]:
    """The columns of a blank line of a table."""
    return dict.fromkeys((SOURCE,) if config.reference_column is None else (SOURCE, REFERENCE), "")


def _columns(row: dict[str, object], config: DataConfig, where: str) -> dict[str, str]:
    """The row's columns under their names here, as text, with the template filled in."""
    columns = _named_columns(row, config, where)
    templates = config.templates
    if templates is None or not columns[SOURCE].strip():
        return columns
    if MESSAGES in columns:
        raise ValueError(f"{where}: a conversation takes the model's chat template; leave data.template out.")
    source = columns[SOURCE]
    values = {"instruction": source, "input": "", "prompt": source, config.source_column: source, **columns}
    columns[SOURCE] = fill(templates[0 if values["input"].strip() else 1], values, where)
    return columns


def _named_columns(row: dict[str, object], config: DataConfig, where: str) -> dict[str, str]:
    if config.path is None:
        return {name: as_text(value, name, where, exact=True) for name, value in row.items()}
    require_columns(config.wanted_columns, row, where)
    if config.format != "columns":
        converted = convert(row, config.format, config.reference_column is not None, where)
        texts = (SOURCE, REFERENCE, REJECTED, "instruction", "input")
        return {name: as_text(value, name, where, exact=name in texts) for name, value in converted.items()}
    columns = {
        name: as_text(row[wanted], wanted, where, exact=True)
        for name, wanted in zip((SOURCE, REFERENCE), config.wanted_columns, strict=False)
    }
    for name, value in row.items():
        if name not in config.wanted_columns:
            kept_as = f"original_{name}" if name in (SOURCE, REFERENCE, MESSAGES) else name
            columns[kept_as] = as_text(value, name, where, exact=False)
    return columns


def _fill_missing(records: list[dict[str, str]]) -> None:
    """Give every record every column, empty where it had none, so that a column is one string per example."""
    names = list(dict.fromkeys(name for record in records for name in record))
    for record in records:
        if len(record) != len(names):
            for name in names:
                record.setdefault(name, "")
