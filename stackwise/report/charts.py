"""Line charts as inline SVG, on round scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stackwise.report.html import Html, colour, join, tag

Points = list[tuple[float, float]]


def smooth(points: Points, span: float) -> Points:
    """An exponential mean over about `span` points, without the pull of its first value."""
    keep = 1 - 2 / (max(span, 1.0) + 1)
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))  # without the weight the first values would pull it to 0
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
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, or so near that no label tells them apart
        return [low]
    rough = (high - low) / max(count, 1)
    exponent = math.floor(math.log10(rough))
    power = 10.0**exponent
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    places = []
    while (value := first * step) <= high + step * 1e-9:
        places.append(round(value, max(10, 2 - exponent)))
        first += 1
    return places or ticks(low, high, 2 * count)  # no multiple of so large a step lies between them


def label(value: float, step: float) -> str:
    """A tick's number, as exact as the distance to the next asks for."""
    if step >= 1:
        return f"{value:,.0f}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near those wanted, at least `gap` apart and, if they fit, within low … high; order is kept."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)  # down first
    if placed and placed[-1] > high:  # then back up from the lower end
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(placed)
    for rank, i in enumerate(order):
        result[i] = max(placed[rank], low) if rank == 0 else placed[rank]
    return result


LEFT, RIGHT, TOP, BOTTOM = 54, 92, 12, 40
"""Room around the lines, for ticks, names and labels."""
LABELLED = 10
"""Lines of which each has its name at its end; of more, the first and the last have."""
SETTLED = 0.15
"""Share of a stage's steps after which its loss has come into the picture."""
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


def padded_range(lines: Sequence[Line]) -> tuple[float, float]:
    """The range of an axis, with some room above and below its values."""
    values = [y for line in lines for _, y in line.points]
    room = 0.08 * (max(values) - min(values)) or 0.1 * abs(max(values)) or 1.0
    return max(0.0, min(values) - room), max(values) + room


def settled_range(lines: Sequence[Line]) -> tuple[float, float]:
    """Where the settled parts of the curves lie, with room for most of their noise."""
    settled = [y for line in lines for _, y in line.points[int(SETTLED * len(line.points)) :]]
    noise = sorted(y for line in lines for _, y in (line.faint or [])[int(0.2 * len(line.faint or [])) :])
    low, high = min(settled), max(settled)
    low = min(low, noise[len(noise) // 20]) if noise else low
    room = 0.06 * (high - low) or 0.1
    return max(0.0, low - room), high + room


@dataclass(frozen=True)
class Axes:
    """What a chart is called, what its axes are, and which part of them it shows."""

    title: str
    x_label: str
    y_label: str
    y_range: tuple[float, float]
    x_ticks: Sequence[float] | None = None


def line_chart(lines: Sequence[Line], axes: Axes, *, half: bool = False) -> Html:
    """A chart of half the page's width; or one drawn for a wide and for a narrow page, of which the style shows one."""
    sizes = [("", 420, 270)] if half else [("wide", 860, 300), ("narrow", 400, 300)]
    return join([tag("div", _Drawing(lines, axes, width, height).svg(), cls=kind) for kind, width, height in sizes])


class _Drawing:
    """One drawing of a line chart at one width."""

    def __init__(self, lines: Sequence[Line], axes: Axes, width: int, height: int) -> None:
        self.lines, self.axes, self.width, self.height = lines, axes, width, height
        xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
        self.low, self.high = min(xs), max(xs)
        self.right = width - (RIGHT if any(line.name for line in lines) else 16)
        self.base = height - BOTTOM

    def x(self, value: float) -> float:
        # A single point stands in the middle.
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(LEFT + share * (self.right - LEFT), 1)

    def y(self, value: float) -> float:
        low, high = self.axes.y_range
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.base - share * (self.base - TOP), 1)

    def svg(self) -> Html:
        title = self.axes.title
        # An id of its own for each drawing of the page.
        clip = f"clip-{''.join(filter(str.isalnum, title)).lower()}-{self.width}"
        frame = tag("rect", x=LEFT, y=0, width=self.right - LEFT + 1, height=self.base)
        return tag(
            "svg",
            tag("defs", tag("clipPath", frame, id=clip)),
            self._axes(),
            tag(
                "g",
                [self._path(line.faint, "faint", line) for line in self.lines if line.faint],
                [self._path(line.points, "dashed" if line.dashed else "line", line) for line in self.lines],
                clip_path=f"url(#{clip})",
            ),
            self._stops(),
            [self._marks(line) for line in self.lines if line.marked],
            self._names(),
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=title,
        )

    def _axes(self) -> list[Html]:
        rows = ticks(*self.axes.y_range, 5)
        step = rows[1] - rows[0] if len(rows) > 1 else 1.0
        parts = []
        for value in rows:
            at = self.y(value)
            parts.append(tag("line", cls="grid", x1=LEFT, x2=self.right, y1=at, y2=at))
            parts.append(_text("tick", label(value, step), LEFT - 8, at, dy=".32em", text_anchor="end"))
        columns = self.axes.x_ticks
        columns = ticks(self.low, self.high, self.width // 110) if columns is None else columns
        columns = columns[:: -(-len(columns) // max(1, (self.right - LEFT) // 26))]  # as many as have room
        step = columns[1] - columns[0] if len(columns) > 1 else 1.0
        parts += [_text("tick", label(value, step), self.x(value), self.base + 17) for value in columns]
        parts.append(tag("line", cls="axis", x1=LEFT, x2=self.right, y1=self.base, y2=self.base))
        parts.append(_text("label", self.axes.x_label, (LEFT + self.right) // 2, self.height - 5))
        turned = f"translate(11 {(TOP + self.base) / 2:.0f}) rotate(-90)"
        parts.append(_text("label", self.axes.y_label, None, None, transform=turned))
        return parts

    def _path(self, points: Points, kind: str, line: Line) -> Html:
        steps = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        return tag("polyline", cls=kind, style=colour(line.hue), points=steps)

    def _marks(self, line: Line) -> list[Html]:
        hint = f"{line.name or self.axes.y_label}, {self.axes.x_label}"
        return [
            tag(
                "circle",
                cls="mark",
                style=colour(line.hue),
                cx=self.x(x),
                cy=self.y(y),
                r=3.5,
                data_tip=f"{hint} {x:g}: {y:.3f}",
            )
            for x, y in line.points
        ]

    def _stops(self) -> list[Html]:
        """Invisible columns that say every line's figure where the pointer is."""
        lines = [line for line in self.lines if line.faint is not None and line.points]
        if not lines or self.high <= self.low:
            return []
        parts, width, reach = [], (self.right - LEFT) / STOPS, (self.high - self.low) / STOPS
        for stop in range(STOPS):
            at, left = self.low + (stop + 0.5) * reach, LEFT + stop * width
            # Every line's point that is nearest to this place.
            near = [(line.name, min(line.points, key=lambda point: abs(point[0] - at))) for line in lines]
            values = [f"{name}: {y:.3f}" for name, (x, y) in near if abs(x - at) <= reach][:12]
            middle = round(left + width / 2, 1)
            rule = tag("line", cls="rule", x1=middle, x2=middle, y1=TOP, y2=self.base)
            hint = "\n".join([f"{self.axes.x_label} {at:,.0f}", *values])
            area = tag("rect", x=round(left, 1), y=TOP, width=round(width, 1), height=self.base - TOP, data_tip=hint)
            parts.append(tag("g", rule, area, cls="stop"))
        return parts

    def _names(self) -> list[Html]:
        named = [line for line in self.lines if line.points and line.name]
        if len(named) > LABELLED:
            named = [named[0], named[-1]]  # more names would cover each other
        low, high = self.axes.y_range
        ends = [self.y(min(max(line.points[-1][1], low), high)) for line in named]
        return [
            _text(
                "name",
                line.name,
                self.x(line.points[-1][0]) + 8,
                round(at, 1),
                style=colour(line.hue),
                dy=".32em",
                text_anchor="start",
            )
            for line, at in zip(named, spread(ends, 14, TOP + 4, self.base), strict=True)
        ]


def _text(kind: str, text: str, x: float | None, y: float | None, **attributes: str) -> Html:
    """A text, in the middle of its place unless another anchor is given."""
    return tag("text", text, cls=kind, x=x, y=y, **({"text_anchor": "middle"} | attributes))
