"""The figures: calm inline SVG with real text, the same bytes for the same data.

Text inside a figure is small and short; title and explanation belong to the page. Every figure is one panel of the same
width, so that two stand side by side on a screen and one fills a phone.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import style, ticker
from matplotlib.figure import Figure
from numpy.typing import NDArray

from esrl.report.markup import Html, escape, number, visible

Array = NDArray[np.float64]

# Okabe and Ito's palette, told apart by colour-blind readers; the pale yellow is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_INK, _GRID = "#4a4f57", "#e6e8eb"
_WIDTH, _HEIGHT = 4.9, 2.55  # inches; the page scales figures to their column
_MAX_POINTS = 240
_MAX_COLUMNS = 48  # of the heat map
_MAX_ROWS = 32
_LABEL_GAP = 9.5  # points between the labels of two lines
_LABEL_DISTANCE = 6  # points between a line and its label
_LETTER = 5.6  # points, of a bold one on average
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a run's name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#b9bec5",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "axes.xmargin": 0.01,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.0,
    "axes.titlecolor": _INK,
    "axes.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart. ``spread`` is half the width of the band around it; ``best`` marks one point, and ``alarms``
    are steps that are marked at the bottom."""

    label: str
    colour: str
    x: Array
    y: Array
    spread: Array | None = None
    best: tuple[float, float] | None = None
    alarms: tuple[float, ...] = ()
    dashed: bool = False


def thin(x: Array, values: Array, limit: int = _MAX_POINTS) -> tuple[Array, Array]:
    """At most ``limit`` points: means over neighbouring points. ``values`` is (N,) or (N, M)."""
    if len(x) <= limit:
        return x, values
    starts = bucket_starts(len(x), limit)
    counts = np.diff(np.append(starts, len(x)))
    shape = (-1,) + (1,) * (values.ndim - 1)
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(values, starts) / counts.reshape(shape)


def bucket_starts(length: int, limit: int) -> NDArray[np.int64]:
    """The first indices of ``limit`` stretches of neighbours, all but equally long."""
    return np.linspace(0, length, limit, endpoint=False).astype(np.int64)


def smooth(values: Array) -> Array:
    """Running mean over about a twentieth of the points; at the ends over what there is."""
    window = max(1, len(values) // 20) | 1
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    smoothed: bool = True,
    points: bool = False,
    x_label: str = "step",
) -> Html:
    """Curves over steps. One curve carries its last value, several carry their labels at the right end.

    Args:
        unit: what the vertical axis shows; "share" formats it in percent.
        smoothed: draw the running mean in full and, of a single curve, the points themselves faintly.
        points: mark each point, for curves of few points.
    """

    def draw(axes: Any) -> None:
        if _wants_log([one.y for one in series]):
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        ends = []
        for one in series:
            x, y = thin(one.x, one.y)
            shown = smooth(y) if smoothed else y
            if one.spread is not None:
                spread = smooth(thin(one.x, one.spread)[1])
                axes.fill_between(x, shown - spread, shown + spread, color=one.colour, alpha=0.13, linewidth=0)
            if smoothed and len(series) == 1 and len(y) > 20:
                _draw_logged(axes, one)
            dashes = "--" if one.dashed else "-"
            marker = "o" if points or len(x) == 1 else ""
            axes.plot(x, shown, dashes, color=one.colour, linewidth=1.6, marker=marker, markersize=2.6)
            ends.append((x[-1], shown[-1], one.label if len(series) > 1 else _value(shown[-1], unit), one.colour))
            if one.best is not None:
                axes.plot(
                    *one.best,
                    "o",
                    color="white",
                    markeredgecolor=one.colour,
                    markeredgewidth=1.6,
                    ms=6.5,
                    clip_on=False,
                )
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _value(value, unit, digits=6)))
        _flat_data_gets_room(axes)
        _label_ends(axes, ends)
        _mark_alarms(axes, series)
        single = series[0].best if len(series) == 1 else None
        if single is not None and single[0] < series[0].x[-1]:
            _label_best(axes, single, _value(single[1], unit), series[0].colour)

    suffix = ", log scale" if _wants_log([one.y for one in series]) else ""
    return _figure(title, f"{unit}{suffix}", draw, x_label=x_label)


def _mark_alarms(axes: Any, series: Sequence[Series]) -> None:
    axes.autoscale(False)
    bottom = axes.get_xaxis_transform()  # steps across, shares of the height upwards
    for one in series:
        if one.alarms:
            axes.plot(one.alarms, [0.03] * len(one.alarms), "^", color=one.colour, markersize=5, transform=bottom)


def heat_map(title: str, steps: Array, histograms: Sequence[dict[int, float]]) -> Html:
    """Share of prompts by their number of samples, over time; shares of one column sum to 1."""
    edges = np.linspace(0, len(steps), min(_MAX_COLUMNS, len(steps)) + 1).astype(int)
    largest = max(max(row) for row in histograms)
    group = math.ceil((largest + 1) / _MAX_ROWS)  # neighbouring numbers of samples share a row when there are many
    shares = np.zeros((largest // group + 1, len(edges) - 1))
    for column, (start, stop) in enumerate(itertools.pairwise(edges)):
        for row in histograms[start:stop]:
            for num_samples, count in row.items():
                shares[num_samples // group, column] += count
    shares /= np.maximum(shares.sum(0), 1e-12)
    bounds = np.append(steps[edges[:-1]], steps[-1] + max(1.0, (steps[-1] - steps[0]) / len(steps)))

    def draw(axes: Any) -> None:
        axes.grid(False)
        cells = np.ma.masked_less(shares, 0.002)
        rows = (np.arange(len(shares) + 1) - 0.5) * group if group == 1 else np.arange(len(shares) + 1) * group
        ceiling = max(0.1, float(np.quantile(shares[shares > 0], 0.98)))
        mesh = axes.pcolormesh(
            bounds, rows, cells, cmap="YlGnBu", vmin=0, vmax=ceiling, edgecolors="face", linewidth=0.2
        )
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        if group == 1 and not shares[0].any():
            axes.set_ylim(0.5, None)
        bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=22, format=ticker.PercentFormatter(1, decimals=0))
        bar.solids.set(edgecolor="face", linewidth=0.2)
        bar.solids.set_rasterized(False)  # a bitmap would be an image to load
        bar.outline.set_visible(False)
        bar.ax.set_title("prompts", fontsize=7)
        bar.locator = ticker.MaxNLocator(4)
        bar.update_ticks()

    return _figure(title, "samples of a prompt (k)", draw)


def stack_chart(title: str, x: Array, layers: dict[str, Array], *, unit: str) -> Html:
    """Layers over steps, labelled at the right end; the first lies at the bottom."""
    x, stacked = thin(x, np.stack(list(layers.values()), axis=1), limit=_MAX_POINTS // 2)
    stacked = np.stack([smooth(column) for column in stacked.T])

    def draw(axes: Any) -> None:
        axes.stackplot(x, stacked, colors=COLOURS[: len(layers)], alpha=0.82, linewidth=0)
        top = stacked.sum(0)
        axes.set_ylim(0, float(np.quantile(top, 0.99)) * 1.15)  # one slow first step must not flatten the rest
        middles = np.cumsum(stacked[:, -1]) - stacked[:, -1] / 2
        _label_ends(
            axes, [(x[-1], y, name, COLOURS[i]) for i, (name, y) in enumerate(zip(layers, middles, strict=True))]
        )

    return _figure(title, unit, draw)


def bar_chart(title: str, bars: Sequence[tuple[str, dict[str, float]]], *, unit: str) -> Html:
    """One horizontal bar for each (label, parts); parts of one name have one colour, named above the bars."""
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))

    def draw(axes: Any) -> None:
        axes.grid(axis="x")
        axes.grid(False, axis="y")
        for row, (_, parts) in enumerate(bars):
            left = 0.0
            for name, value in parts.items():
                axes.barh(row, value, left=left, height=0.6, color=COLOURS[names.index(name)], alpha=0.82)
                left += value
            axes.annotate(number(left), (left, row), (4, 0), textcoords="offset points", va="center", color=_INK)
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.set_ylim(max(len(bars), 4) - 0.4, -1.1)  # room for the names of the parts; few bars stay slim
        axes.set_xlim(0, 1.12 * max(sum(parts.values()) for _, parts in bars))
        position = 0.0
        for i, name in enumerate(names):
            axes.text(position, 0.985, name, color=COLOURS[i], weight="bold", transform=axes.transAxes, va="top")
            position += (len(name) + 3) * 0.019

    height = max(_HEIGHT, 0.8 + 0.32 * len(bars))
    longest = max(len(label) for label, _ in bars)
    return _figure(title, "", draw, x_label=unit, height=height, left=min(0.4, max(0.115, 0.0155 * longest + 0.02)))


def _figure(
    title: str,
    y_label: str,
    draw: Callable[[Any], None],
    *,
    x_label: str = "step",
    height: float = _HEIGHT,
    left: float = 0.115,
) -> Html:
    """Draw one panel, whose axes begin at the share ``left`` of its width, and return it as an ``<svg>`` element."""
    with style.context(["default", _STYLE | {"svg.hashsalt": visible(title)}]), warnings.catch_warnings():
        # The reader's browser has the glyphs that the font used for measuring lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(_WIDTH, height))
        figure.subplots_adjust(left=left, right=0.86, bottom=0.41 / height, top=1 - 0.255 / height)
        axes = figure.add_subplot()
        axes.set_title(visible(y_label))
        axes.set_xlabel(x_label, loc="right", labelpad=1)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=x_label in ("step", "epoch")))
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), title)


def _inline(svg: str, title: str) -> Html:
    """matplotlib's file as an element of a page: no prologue, no fixed size, no style sheet, no idle ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    view = re.search(r'viewBox="[-0-9. ]+"', svg)
    assert view is not None, "matplotlib wrote no viewBox"
    # An inline SVG needs no namespaces: HTML's parser knows them, and SVG 2 has a plain href.
    body = svg[svg.index(">") + 1 :].replace("xlink:href=", "href=")
    return Html(f'<svg {view[0]} role="img" aria-label="{escape(title)}">{body.strip()}')


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write labels right of the last points, moved apart where they would overlap; long ones get more room."""
    longest = max(len(visible(label)) for _, _, label, _ in ends)
    room = (longest * _LETTER + _LABEL_DISTANCE) / (axes.figure.get_figwidth() * 72)
    axes.figure.subplots_adjust(right=min(axes.figure.subplotpars.right, 1 - room))
    height = axes.get_position().height * axes.figure.get_figheight() * 72  # points
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(np.clip(to_axes.transform((x, y))[1], 0, 1)) * height for x, y, _, _ in ends]
    for (x, _, label, colour), y in zip(ends, _spread_out(wanted, _LABEL_GAP), strict=True):
        right = float(to_axes.transform((x, 1))[0])
        axes.annotate(
            visible(label), (right, y / height), (_LABEL_DISTANCE, 0), xycoords="axes fraction",
            textcoords="offset points", color=colour, va="center", weight="bold", annotation_clip=False,
        )  # fmt: skip


def _spread_out(positions: Sequence[float], gap: float) -> list[float]:
    """Positions at least ``gap`` apart, in the same order, moved as little as a single sweep and centring allow."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    shift = (sum(placed) - sum(positions)) / max(1, len(positions))
    return [position - shift for position in placed]


def _label_best(axes: Any, point: tuple[float, float], text: str, colour: str) -> None:
    offset = (0, 7) if axes.transAxes.inverted().transform(axes.transData.transform(point))[1] < 0.85 else (0, -13)
    axes.annotate(f"best {text}", point, offset, textcoords="offset points", ha="center", color=colour, weight="bold")


def _draw_logged(axes: Any, one: Series) -> None:
    """The logged values, faintly; where there are too many, the range of neighbours, so that no spike is lost."""
    if len(one.x) <= _MAX_POINTS:
        axes.plot(one.x, one.y, color=one.colour, alpha=0.3, linewidth=0.7)
        return
    starts = bucket_starts(len(one.x), _MAX_POINTS)
    low, high = np.minimum.reduceat(one.y, starts), np.maximum.reduceat(one.y, starts)
    axes.fill_between(thin(one.x, one.y)[0], low, high, color=one.colour, alpha=0.25, linewidth=0)


def _flat_data_gets_room(axes: Any) -> None:
    """A constant curve keeps an axis around it instead of one that magnifies rounding."""
    low, high = axes.get_ylim()
    middle = abs(low + high) / 2
    if axes.get_yscale() == "linear" and high - low < 0.02 * middle:
        axes.set_ylim(min(low, 0.97 * (low + high) / 2), max(high, 1.03 * (low + high) / 2))


def _wants_log(columns: Sequence[Array]) -> bool:
    """Whether positive values span so much that a linear axis would show only the largest."""
    values = np.concatenate(list(columns))
    return bool(len(values) and values.min() > 0 and np.quantile(values, 0.999) > 40 * np.median(values))


def _value(value: float, unit: str, digits: int = 3) -> str:
    return f"{100 * value:.{digits}g} %" if unit == "share" else number(float(f"{value:.{digits}g}"))
