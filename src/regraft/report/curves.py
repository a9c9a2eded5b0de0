"""The measurement's two charts: bars of every way's figure, and the figure against strength."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_WIDTH = 760
_LABEL, _RIGHT, _TOP, _FOOT = 150, 90, 8, 26
_ROW, _BAR = 30, 16
_HEIGHT = 260
#: How many ways are told apart by colour and dashes before they repeat.
STYLES = 6


@dataclass(frozen=True)
class FigureBar:
    """One bar: from the zero line to the figure, with whiskers for its error."""

    label: str
    kind: str
    y: float
    x: float
    width: float
    whisker: tuple[float, float] | None
    words: str
    text_x: float


@dataclass(frozen=True)
class BarPlot:
    """Geometry of the bars for the template's SVG, in its own units."""

    width: float
    height: float
    zero: float
    bars: tuple[FigureBar, ...]
    ticks: tuple[tuple[float, str], ...]
    bar: float = _BAR
    label: float = _LABEL
    top: float = _TOP


@dataclass(frozen=True)
class Line:
    """One way's figure at every strength; ``label_y`` keeps names at the right end apart."""

    label: str
    style: int
    path: str
    points: tuple[tuple[float, float, str], ...]
    label_y: float


@dataclass(frozen=True)
class LinePlot:
    """Geometry of the strength curves."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    one: float
    zero: float | None
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def bar_plot(found: Mapping[str, Any]) -> BarPlot:
    """Bars of a measurement (as JSON): the retrained adapter, every way, the random control."""
    rows: list[tuple[str, str, float, tuple[float, float] | None]] = []
    if found["figure"] == "R":
        rows.append(("retrained", "goal", 1.0, None))
    elif found["figure"] == "relative gain":
        rows.append(("on its source", "goal", 1.0, None))
    for way in sorted(found["ways"], key=lambda w: -w["figure"]):
        error = way["figure_error"]
        ends = None if error is None else (way["figure"] - error, way["figure"] + error)
        rows.append((way["name"], "best" if way["name"] == found["best"] else "way",
                     way["figure"], ends))  # fmt: skip
    draws = found["random"]["figures"]
    rows.append(("random", "random", found["random"]["mean"], (min(draws), max(draws))))
    reach = [0.0, *(v for _, _, value, ends in rows for v in (value, *(ends or ())))]
    low, high, ticks = _axis(min(reach), max(reach))
    span = _WIDTH - _LABEL - _RIGHT

    def x(value: float) -> float:
        return round(_LABEL + (value - low) / (high - low) * span, 2)

    bars = []
    for i, (label, kind, value, ends) in enumerate(rows):
        start, end = sorted((x(0.0), x(value)))
        whisker = None if ends is None else (x(ends[0]), x(ends[1]))
        bars.append(
            FigureBar(
                label=label,
                kind=kind,
                y=_TOP + i * _ROW + (_ROW - _BAR) / 2,
                x=start,
                width=round(max(end - start, 1.0), 2),
                whisker=whisker,
                words=figure(found["figure"], value),
                text_x=max(end, *(whisker or (0.0,)), x(0.0)) + 8,
            )
        )
    return BarPlot(
        width=_WIDTH,
        height=_TOP + len(rows) * _ROW + _FOOT,
        zero=x(0.0),
        bars=tuple(bars),
        ticks=tuple((x(t), figure(found["figure"], t)) for t in ticks),
    )


def line_plot(found: Mapping[str, Any]) -> LinePlot | None:
    """The strength curves, or None when only strength 1.0 was measured."""
    ways = found["ways"]
    strengths: list[float] = ways[0]["curve"]["strengths"]
    if len(strengths) < 2:
        return None
    values = [v for way in ways for v in way["curve"]["values"]]
    low, high, ticks = _axis(min(0.0, *values), max(values))
    left, right = 54.0, _WIDTH - _RIGHT - 60.0
    bottom = _TOP + _HEIGHT
    span = max(strengths) - min(strengths)

    def x(strength: float) -> float:
        return round(left + (strength - min(strengths)) / span * (right - left), 2)

    def y(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * _HEIGHT, 2)

    ends = _apart([y(way["curve"]["values"][-1]) for way in ways], 14.0)
    lines = []
    for i, (way, label_y) in enumerate(zip(ways, ends, strict=True)):
        curve = list(zip(way["curve"]["strengths"], way["curve"]["values"], strict=True))
        points = tuple(
            (x(s), y(v), f"{way['name']} at {s:g}: {figure(found['figure'], v)}") for s, v in curve
        )
        path = "M" + " L".join(f"{px} {py}" for px, py, _ in points)
        lines.append(Line(way["name"], i % STYLES, path, points, label_y))
    return LinePlot(
        width=_WIDTH,
        height=bottom + _FOOT + 16,
        left=left,
        right=right,
        top=_TOP,
        bottom=bottom,
        one=x(1.0),
        zero=y(0.0) if low < 0 else None,
        lines=tuple(lines),
        x_ticks=tuple((x(s), f"{s:g}") for s in strengths),
        y_ticks=tuple((y(t), figure(found["figure"], t)) for t in ticks),
    )


def figure(name: str, value: float | None, digits: int = 2) -> str:
    """A figure as the page prints it: R with two decimals, a share of loss as a percentage."""
    if value is None or not math.isfinite(value):
        return "–"
    if name == "loss removed":
        return f"{round(100 * value, 1) + 0.0:.1f}%".replace("-", "−")
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Ends and round ticks that hold [low, high]."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if span / (step * m) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, max(last, first + 1) + 1)]
    return ticks[0], ticks[-1], ticks


def _apart(positions: Sequence[float], room: float) -> list[float]:
    """The positions moved down as far as needed to be ``room`` apart, order kept."""
    moved = list(positions)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + room)
    return moved
