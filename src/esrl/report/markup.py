"""HTML that is safe by construction: elements escape their children, and hidden characters become visible."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence

# Joiners carry meaning in Persian, Indic scripts and emoji, and cannot reorder text.
_KEPT = frozenset("\n\t\u200c\u200d")
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_NON_CHARACTERS = frozenset({0xFFFE, 0xFFFF})


class Html(str):
    """Markup that is already safe; any other string is data and is escaped where it enters the page."""

    __slots__ = ()


def visible(text: str) -> str:
    """``text`` with control characters, bidirectional overrides and lone surrogates written as ``⟨U+202E⟩``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"⟨U+{ord(char):04X}⟩" if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    if char in _KEPT:
        return False
    return unicodedata.category(char) in _HIDDEN or (ord(char) & 0xFFFF) in _NON_CHARACTERS


def escape(value: object) -> Html:
    """``value`` as text of the page; ``Html`` passes unchanged."""
    return value if isinstance(value, Html) else Html(html.escape(visible(str(value)), quote=True))


def element(tag: str, *children: object, **attributes: str) -> Html:
    """``<tag>``; children and attribute values that are not ``Html`` are escaped. ``class_`` stands for ``class``."""
    listed = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{listed}>{join(children)}</{tag}>")


def join(parts: Iterable[object], separator: str = "") -> Html:
    """The escaped parts, one after another."""
    return Html(separator.join(escape(part) for part in parts))


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """A table; columns with numbers are set to the right. It scrolls by itself where the screen is narrow."""
    numeric = [any(_is_number(row[c]) for row in rows) for c in range(len(rows[0]))] if rows else []
    classes = ["number" if is_numeric else "words" for is_numeric in numeric]
    head = Html()
    if header:
        cells = zip(header, classes or ["words"] * len(header), strict=True)
        head = element("tr", *(element("th", cell, scope="col", class_=name) for cell, name in cells))
    body = join(
        element("tr", *(element("td", _content(cell), class_=name) for cell, name in zip(row, classes, strict=True)))
        for row in rows
    )
    return element("div", element("table", element("thead", head), element("tbody", body)), class_="scroll")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _content(value: object) -> Html:
    return value if isinstance(value, Html) else escape(plain(value))


def details(summary: object, *children: object) -> Html:
    """A part that opens on demand, without a script."""
    return element("details", element("summary", summary), *children)


def plain(value: object, depth: int = 4) -> str:
    """A value of a JSON file as text; beyond ``depth`` levels lists and objects are an ellipsis."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, (dict, list)) and depth == 0:
        return "…"
    if isinstance(value, dict):
        return clip(", ".join(f"{key}: {plain(item, depth - 1)}" for key, item in value.items()), 2000)
    if isinstance(value, list):
        return clip(", ".join(plain(item, depth - 1) for item in value), 2000)
    return clip(str(value), 2000)


def number(value: float) -> str:
    """Whole numbers with thousands separated, others to four significant digits; ``–`` for what is not finite."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else "–"
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """``3 h 12 min``, ``4 min 10 s`` or ``12.3 s``."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def clip(text: str, limit: int) -> str:
    """The first ``limit`` characters, and how many are left out."""
    return text if len(text) <= limit else f"{text[:limit]}… (+{len(text) - limit:,} characters)"
