"""The check of `json_schema`. A schema can take hours over a text, so it runs in a process that can be killed
(``rewards.timed``).
"""

from __future__ import annotations

import functools
import json
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from referencing import Registry


def match_schema(completions: list[str], settings: dict[str, Any]) -> list[float]:
    """1 where the completion is JSON that satisfies the schema, else 0.

    Args:
        settings: schema, the text of a JSON schema.

    Raises:
        Exception: the schema refers to a place outside itself; nothing is fetched.
    """
    validator = schema_validator(settings["schema"])
    return [float(_satisfies(validator, text)) for text in completions]


@functools.lru_cache(maxsize=4)
def schema_validator(schema: str) -> Any:
    """The validator of a schema's text, of the draft its ``$schema`` names; 2020-12 where it names none.

    Raises:
        json.JSONDecodeError: it is not JSON.
        jsonschema.SchemaError: it is no schema.
    """
    content = json.loads(schema)
    cls = validator_for(content, default=Draft202012Validator)
    cls.check_schema(content)
    return cls(content, registry=Registry())  # an own registry: the default one fetches what a $ref names


def _satisfies(validator: Any, text: str) -> bool:
    try:
        content = json.loads(text, parse_constant=_refuse)
        return bool(validator.is_valid(content))
    except (ValueError, OverflowError, RecursionError):  # not JSON, a number beyond Python's limits, too deeply nested
        return False


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
