"""Charts made by hand: lines as inline SVG on round scales, bars as HTML that wraps with the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]


def smooth(points: Points, span: float) -> Points:
    """An exponential mean over about `span` points, without the pull of its first value."""
    keep = 1 - 2 / (max(span, 1.0) + 1)
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def thin(points: Points, most: int) -> Points:
    """At most about `most` points: runs of neighbours become their means, the first and the last point stay."""
    if len(points) <= most:
        return points
    size = len(points) / most
    groups = [points[round(i * size) : round((i + 1) * size)] for i in range(most)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means[1:-1], points[-1]]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    places = []
    while (value := first * step) <= high + step * 1e-9:
        places.append(round(value, 10))
        first += 1
    return places


def label(value: float, step: float) -> str:
    """A tick's number, as exact as the distance to the next asks for."""
    if step >= 1:
        return f"{value:,.0f}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near those wanted, at least `gap` apart and, if they fit, within low … high; order is kept."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [wanted[i] for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(placed)
    for rank, i in enumerate(order):
        result[i] = max(placed[rank], low) if rank == 0 else placed[rank]
    return result


LEFT, RIGHT, TOP, BOTTOM = 46, 92, 12, 40
LABELLED = 10
"""Lines of which each has its name at its end; of more, the first and the last have."""
SETTLED = 0.15
"""Share of a stage's steps after which its loss has come into the picture."""
ROWS = 20
"""Rows of a table above which it scrolls within the page."""
STOPS = 72
"""Places along the x axis where a line chart says its figures."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        name: What it is called, at its end and in hints.
        points: (x, y), x ascending.
        hue: Its place between shallow (0) and deep (1); None: a quiet grey.
        faint: Points drawn thinly behind it.
        marked: Whether its points are marked, each with a hint.
        dashed: Whether it is a line to compare with.
    """

    name: str
    points: Points
    hue: float | None = None
    faint: Points | None = None
    marked: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar: a name, a length, its figure in words, more words beside it, a place among hues (None: grey)."""

    name: str
    value: float
    shown: str
    more: str = ""
    hue: float | None = None
    hint: str = ""


def colour(hue: float | None) -> str:
    """The inline style that gives something its colour: a way from blue through violet to orange, by depth."""
    return "--c:var(--quiet)" if hue is None else f"--c:oklch(var(--series-l) 0.14 {(255 + 165 * hue) % 360:.0f})"


def hue_of(index: int, count: int) -> float:
    """The place of one of several, from 0 to 1."""
    return index / (count - 1) if count > 1 else 0.0


def padded_range(low: float, high: float) -> tuple[float, float]:
    """The range of an axis, with some room above and below its values."""
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - room), high + room


def settled_range(lines: list[Line]) -> tuple[float, float]:
    """Where the settled parts of the curves lie, with room for most of their noise."""
    settled: Points = []
    for line in lines:
        settled += line.points[int(SETTLED * len(line.points)) :]
    noise = sorted(y for line in lines for _, y in (line.faint or [])[int(0.2 * len(line.faint or [])) :])
    low, high = min(y for _, y in settled), max(y for _, y in settled)
    low = min(low, noise[len(noise) // 20]) if noise else low
    room = 0.06 * (high - low) or 0.1
    return max(0.0, low - room), high + room


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float],
    x_ticks: Sequence[float] | None = None,
    half: bool = False,
) -> str:
    """A chart of half the page's width; or one drawn for a wide and for a narrow page, of which the style shows one."""
    height = 270 if half else 300
    sizes = [("", 420)] if half else [("wide", 860), ("narrow", 400)]
    drawn = [
        f'<div class="{kind}">{_Drawing(lines, width, height, y_range, x_ticks).svg(title, x_label, y_label)}</div>'
        for kind, width in sizes
    ]
    return "".join(drawn)


class _Drawing:
    """One drawing of a line chart at one width."""

    def __init__(
        self,
        lines: Sequence[Line],
        width: int,
        height: int,
        y_range: tuple[float, float],
        x_ticks: Sequence[float] | None,
    ) -> None:
        self.lines, self.width, self.height, self.y_range = lines, width, height, y_range
        xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
        self.low, self.high = min(xs), max(xs)
        self.x_ticks = x_ticks
        self.right = RIGHT if any(line.name for line in lines) else 16

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return LEFT + share * (self.width - LEFT - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = (value - low) / (high - low) if high > low else 0.5
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def svg(self, title: str, x_label: str, y_label: str) -> str:
        clip = f"clip-{''.join(filter(str.isalnum, title)).lower()}-{self.width}"
        inner = self.width - LEFT - self.right
        frame = f'<clipPath id="{clip}"><rect x="{LEFT}" y="0" width="{inner + 1}" height="{self.height - BOTTOM}"/>'
        return "".join(
            [
                f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}">',
                f"<defs>{frame}</clipPath></defs>",
                *self._axes(x_label, y_label),
                f'<g clip-path="url(#{clip})">',
                *(self._path(line.faint, "faint", line) for line in self.lines if line.faint),
                *(self._path(line.points, "dashed" if line.dashed else "line", line) for line in self.lines),
                "</g>",
                *self._stops(x_label),
                *(mark for line in self.lines if line.marked for mark in self._marks(line, x_label)),
                *self._names(),
                "</svg>",
            ]
        )

    def _axes(self, x_label: str, y_label: str) -> list[str]:
        low, high = self.y_range
        rows = ticks(low, high, 5)
        step = rows[1] - rows[0] if len(rows) > 1 else 1.0
        right = self.width - self.right
        parts = []
        for value in rows:
            at = f"{self.y(value):.1f}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{at}" dy=".32em" text-anchor="end">{label(value, step)}</text>'
            )
        columns = self.x_ticks if self.x_ticks is not None else ticks(self.low, self.high, self.width // 110)
        room = max(1, (self.width - LEFT - self.right) // 26)
        columns = columns[:: -(-len(columns) // room)]
        step = columns[1] - columns[0] if len(columns) > 1 else 1.0
        base = self.height - BOTTOM
        for value in columns:
            text = label(value, step)
            parts.append(
                f'<text class="tick" x="{self.x(value):.1f}" y="{base + 17}" text-anchor="middle">{text}</text>'
            )
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{base}" y2="{base}"/>')
        middle = (LEFT + right) / 2
        parts.append(
            f'<text class="label" x="{middle:.0f}" y="{self.height - 5}" text-anchor="middle">{escape(x_label)}</text>'
        )
        parts.append(
            f'<text class="label" transform="translate(11 {(TOP + base) / 2:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
        return parts

    def _path(self, points: Points, kind: str, line: Line) -> str:
        steps = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{kind}" style="{colour(line.hue)}" points="{steps}"/>'

    def _marks(self, line: Line, x_label: str) -> list[str]:
        return [
            f'<circle class="mark" style="{colour(line.hue)}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.5" '
            f'data-tip="{escape(f"{line.name}, {x_label} {x:g}: {y:.3f}")}"/>'
            for x, y in line.points
        ]

    def _stops(self, x_label: str) -> list[str]:
        """Invisible columns that say every line's figure where the pointer is."""
        lines = [line for line in self.lines if line.faint is not None and line.points]
        if not lines or self.high <= self.low:
            return []
        parts, width = [], (self.width - LEFT - self.right) / STOPS
        for stop in range(STOPS):
            at = self.low + (stop + 0.5) / STOPS * (self.high - self.low)
            said = [f"{x_label} {at:,.0f}"]
            near = [(line.name, min(line.points, key=lambda p: abs(p[0] - at))) for line in lines]
            reach = (self.high - self.low) / STOPS
            said += [f"{name}: {y:.3f}" for name, (x, y) in near if abs(x - at) <= reach][:12]
            left = LEFT + stop * width
            parts.append(
                f'<g class="stop"><line class="rule" x1="{left + width / 2:.1f}" x2="{left + width / 2:.1f}" '
                f'y1="{TOP}" y2="{self.height - BOTTOM}"/><rect x="{left:.1f}" y="{TOP}" width="{width:.1f}" '
                f'height="{self.height - BOTTOM - TOP}" data-tip="{escape(chr(10).join(said))}"/></g>'
            )
        return parts

    def _names(self) -> list[str]:
        named = [line for line in self.lines if line.points and line.name]
        if len(named) > LABELLED:
            named = [named[0], named[-1]]
        low, high = self.y_range
        ends = [self.y(min(max(line.points[-1][1], low), high)) for line in named]
        places = spread(ends, 14, TOP + 4, self.height - BOTTOM)
        return [
            f'<text class="name" style="{colour(line.hue)}" x="{self.x(line.points[-1][0]) + 8:.1f}" y="{at:.1f}" '
            f'dy=".32em">{escape(line.name)}</text>'
            for line, at in zip(named, places, strict=True)
        ]


def scroll(table: str, rows: int) -> str:
    """A table that scrolls by itself: sideways on a narrow page, and down where it has many rows."""
    return f'<div class="scroll{" tall" if rows > ROWS else ""}">{table}</div>'


def bars(items: Sequence[Bar], *, name: str, figure: str) -> str:
    """Horizontal bars as a table: readable without its lengths, and by those who cannot see them.

    Args:
        items: The bars.
        name: What the names are.
        figure: What the lengths are.
    """
    most = max((bar.value for bar in items), default=0.0) or 1.0
    rows = []
    for bar in items:
        hint = f' data-tip="{escape(bar.hint)}"' if bar.hint else ""
        more = f'<td class="more">{escape(bar.more)}</td>' if any(item.more for item in items) else ""
        rows.append(
            f'<tr{hint}><th scope="row">{escape(bar.name)}</th><td class="length">'
            f'<span class="bar" style="{colour(bar.hue)};width:{max(100 * bar.value / most, 0.3):.1f}%"></span></td>'
            f'<td class="figure">{escape(bar.shown)}</td>{more}</tr>'
        )
    head = f'<tr class="unseen"><th>{escape(name)}</th><th></th><th>{escape(figure)}</th></tr>'
    return f'<table class="bars">{head}{"".join(rows)}</table>'
