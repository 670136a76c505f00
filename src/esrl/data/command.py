"""The settings of `esrl data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig:
    """`esrl data`: fetch a public data set from its source, verified by checksum."""

    name: Annotated[str, tyro.conf.Positional]
    """multi30k: 29,000 German-English image captions."""
    root: Path = Path("data")
    """The folder to make it in: files go to ROOT/NAME."""
    base_url: str | None = None
    """A mirror; unset: the original source."""
