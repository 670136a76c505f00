"""Configuration dataclasses from nested values and back: every key and type is checked, whatever the classes."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

NOT_DUMPED = ("resume", "overwrite", "accept_changes")
"""Whoever uses a run's configuration again must ask for these again."""


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        ValueError: no such file, or no valid TOML, with the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"{path}: {reason}. Give a TOML file; configs/ has commented examples.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}.") from error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts, the second one winning."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def build(
    cls: type[Config],
    values: Mapping[str, Any],
    origin: str,
    folder: Path | None = None,
    where: str = "",
    missing: Any = None,
) -> Config:
    """Make a config dataclass from nested values, checking every key and type.

    Args:
        origin: what to name in errors, the file.
        folder: relative paths are resolved against it.
        missing: what stands for a required key that is absent; None makes that an error.

    Raises:
        ValueError: an unknown key (with the nearest one), a missing key, a wrong type or a value out of bounds.
    """
    hints = get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f" Did you mean {where}{near[0]}?" if near else f" There are: {', '.join(known)}."
            raise ValueError(f"{origin}: unknown key {name}.{hint}")
        if isinstance(value, Mapping):
            value = {**_own_defaults(known[key]), **value}
        # where there is a root, the other paths start from it
        start = None if "root" in known and key != "root" else folder
        arguments[key] = _convert(value, hints[key], origin, start, name)
    for key, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and key not in arguments and missing is not None:
            arguments[key] = _blank(hints[key]) if dataclasses.is_dataclass(hints[key]) else missing
        elif required and key not in arguments:
            raise ValueError(f"{origin}: {where}{key} is missing. {_doc_hint(key)}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{origin}: {where.rstrip('.') + ': ' if where else ''}{error}") from error


def _own_defaults(entry: dataclasses.Field[Any]) -> dict[str, Any]:
    """What a section's default says beyond its class, such as the epochs of ``training``: a file that sets something
    else in that section does not take it back."""
    if entry.default_factory is dataclasses.MISSING:
        return {}
    section = entry.default_factory()
    if not dataclasses.is_dataclass(section):
        return {}
    return {
        inner.name: getattr(section, inner.name)
        for inner in dataclasses.fields(section)
        if getattr(section, inner.name) != _default(inner)
    }


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _blank(cls: Any) -> Any:
    """The defaults without the checks, which flags may still satisfy."""
    instance = object.__new__(cls)
    for entry in dataclasses.fields(cls):
        object.__setattr__(instance, entry.name, entry.default)
    return instance


def _doc_hint(key: str) -> str:
    hints = {
        "model": 'Set it to a model folder: model = "runs/mle/model".',
        "output_dir": 'Set the run\'s folder: output_dir = "runs/NAME".',
        "data": "Add a [data] table that says where the examples are.",
    }
    return hints.get(key, "Set it.")


def _convert(value: Any, hint: Any, origin: str, folder: Path | None, name: str) -> Any:  # noqa: C901
    """One value to its declared type, or an error that says both."""
    kind = get_origin(hint)
    if kind in (typing.Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        if value is False and bool not in options and len(options) < len(get_args(hint)):
            return None  # TOML has no null: `false` unsets what may be unset
        return _convert(value, options[0] if len(options) == 1 else _pick(value, options), origin, folder, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{origin}: {name} is {value!r}; it must be a table, [{name}].")
        return build(hint, value, origin, folder, f"{name}.")
    if kind is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{origin}: {name} is {value!r}; choose one of {choices}.")
        return value
    if kind is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{origin}: {name} is {value!r}; it must be a list.")
        return tuple(_convert(item, get_args(hint)[0], origin, folder, name) for item in value)
    if hint is Path and isinstance(value, str | Path):
        path = Path(value).expanduser()
        return path if folder is None or path.is_absolute() else Path(os.path.normpath(folder / path))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{origin}: {name} is {value!r}; it must be {_article(hint)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{origin}: {name} is {value}; it must be finite.")
    return value


def _pick(value: Any, options: Sequence[Any]) -> Any:
    return next((option for option in options if isinstance(option, type) and isinstance(value, option)), options[0])


def _article(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a path"}
    return names.get(hint, str(hint))


def to_toml(config: Any) -> dict[str, Any]:
    """Nested values that ``build`` makes the same configuration of, but for those in ``NOT_DUMPED``."""
    result: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.name in NOT_DUMPED or (value is None and entry.default is None):
            continue
        if dataclasses.is_dataclass(value):
            unset = dict.fromkeys(_own_defaults(entry), False)  # what is None here, `build` would set otherwise
            result[entry.name] = unset | to_toml(value)
        elif isinstance(value, tuple):
            result[entry.name] = list(value)
        elif value is None:
            result[entry.name] = False
        else:
            result[entry.name] = str(value) if isinstance(value, Path) else value
    return result
