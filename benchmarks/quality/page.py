"""Tables and plots of the quality benchmark."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Result, Spread, table
from benchmarks.quality.results import mean_loss
from benchmarks.quality.rows import BASE, BUDGETS, PLAIN
from stackwise import words

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 500, 64, 300, 20, 56
"""Of a plot in pixels, and its margins; names stand in the right one."""

NAMES_APART = 15


def body(name: str, found: list[Result]) -> str:
    """The tables of results, one a budget, best against plain training first, the plain row in each.

    Args:
        name: Of the results.
        found: The rows.
    """
    plain = [row for row in found if row["name"] == PLAIN]
    parts = []
    for budget, title in BUDGETS.items():
        rows = [row for row in found if row["budget"] == budget]
        if not rows:
            continue
        shown = _ordered(rows, plain)
        header = [
            "mode", "at 15%", "at 50%", "at 90%", "mean", "against plain", "bits per byte", "rate",
            "block updates", "rows", "FLOPs", "whole rack held", "peak memory", "written", "read",
        ]  # fmt: skip
        lines = (_cells(row, plain) for row in shown)
        pictures = "\n".join(
            f"![{what}]({plot_name(name, what, budget)})" for what, of, _, _ in PLOTS if _known(shown, of) > 1
        )
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n{table(header, lines)}\n\n{pictures}")
    return "\n\n".join(parts)


def write_plots(docs: Path, name: str, found: list[Result]) -> None:
    """Loss against compute and against peak memory, as SVG files beside the page."""
    plain = [row for row in found if row["name"] == PLAIN]
    for budget in BUDGETS:
        rows = _ordered([row for row in found if row["budget"] == budget], plain)
        for what, of, axis, form in PLOTS:
            if _known(rows, of) > 1:
                _plot(docs / plot_name(name, what, budget), rows, plain, of, axis, form)


Gap = tuple[str, int, int, float]
"""A row, the width of its rack, updates of each block, and its mean loss less that of plain training."""


def gaps(files: list[Path]) -> list[Gap]:
    """Gaps to plain training of rows that are measured at two lengths or more, from files of results.

    Files of other text, or of racks that differ by more than their width, are left out.
    """
    runs: dict[tuple[str, int, int], dict[int, float]] = {}  # by seed the lowest mean loss of any rate
    for file in files:
        known = json.loads(file.read_text(encoding="utf-8"))
        base, steps = known["setting"]["base"], known["setting"]["steps"]
        width = base["model.d_model"]
        if base != BASE | {"model.d_model": width}:
            continue
        for key, run in known["runs"].items():
            name, budget, _, seed = key.split(" | ")
            by_seed = runs.setdefault((name if budget == "rows" else f"{name} ({budget})", width, steps), {})
            by_seed[int(seed)] = min(mean_loss(run), by_seed.get(int(seed), math.inf))
    found = []
    for (name, width, steps), by_seed in sorted(runs.items()):
        plain = runs.get((PLAIN, width, steps), {})
        apart = [loss - plain[seed] for seed, loss in by_seed.items() if seed in plain]
        if apart:
            found.append((name, width, steps, Spread.of(apart).median))
    lengths = Counter((name, width) for name, width, _, _ in found)
    return [gap for gap in found if lengths[gap[:2]] > 1]


def write_gaps(path: Path, found: list[Gap]) -> None:
    """The gap to plain training against updates of each block, a line for each row and width, as an SVG file."""
    if not found:
        return
    across = _scale([math.log(steps) for _, _, steps, _ in found], LEFT, WIDTH - RIGHT)
    up = _scale([gap for *_, gap in found], HEIGHT - BOTTOM, TOP)
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for name, width, steps, gap in found:
        lines.setdefault((name, width), []).append((steps, gap))
    parts = _frame(up)
    for steps in sorted({steps for _, _, steps, _ in found}):
        x = across(math.log(steps))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#555">{steps:,}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle" fill="#333">updates of each '
        "block</text>"
    )
    ends = [up(points[-1][1]) for points in lines.values()]
    for ((name, width), points), place in zip(lines.items(), _labels(ends), strict=True):
        colour = "#c33" if name == PLAIN else "#357"
        path_of = "L".join(f"{across(math.log(steps)):.1f} {up(gap):.1f}" for steps, gap in points)
        label = html.escape(f"{name}, width {width}")
        parts += [
            f'<path d="M{path_of}" fill="none" stroke="{colour}" stroke-opacity="0.6"/>',
            f'<text x="{WIDTH - RIGHT + 24}" y="{place + 4:.1f}" fill="{colour}">{label}</text>',
        ]
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def _frame(up: _Scale) -> list[str]:
    """A plot's page and axes, and the names of its vertical one."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#888"/>',
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" fill="#333" transform="rotate(-90 14 {HEIGHT / 2})">'
        "held-out loss against plain training, nats a masked token</text>",
    ]
    return parts + [
        f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end" fill="#555">{y:+.2f}</text>'
        for y in (up.at(share / 5) for share in range(6))
    ]


def plot_name(name: str, what: str, budget: str) -> str:
    """The file of a plot."""
    return f"{name}-{what}-{budget}.svg"


def words_flops(count: float) -> str:
    """1.2e13 as 12 T."""
    return f"{count / 1e12:.3g} T"


def _ordered(rows: list[Result], plain: list[Result]) -> list[Result]:
    """These rows and the plain one, best against it first."""
    return sorted([*rows, *(row for row in plain if row not in rows)], key=lambda row: _apart(row, plain).median)


def _apart(row: Result, plain: list[Result]) -> Spread:
    """Mean loss less that of plain training, seed by seed: each has its own held-out rows and its own start.

    Without plain training, the loss itself.
    """
    others = map(mean_loss, plain[0]["runs"]) if plain else itertools.repeat(0.0)
    return Spread.of(mean_loss(run) - other for run, other in zip(row["runs"], others, strict=False))


def _cells(row: Result, plain: list[Result]) -> list[str]:
    runs = row["runs"]
    first = runs[0]
    losses = [_spread([run["loss"][key] for run in runs]) for key in first["loss"]]
    return [
        row["name"],
        *losses,
        _spread([mean_loss(run) for run in runs]),
        _said(_apart(row, plain), len(runs), "+.3f") if plain else "–",
        _spread([run["bits_per_byte"] for run in runs]),
        words.rate(row["rate"]),
        f"{first['updates']:,}",
        f"{first['rows']:,}",
        words_flops(first["flops"]),
        f"{row['whole']:.0%}",
        ", then ".join(map(words.size, row["memory"] or [])) or "–",
        words.size(first["written"]),
        words.size(first["read"]),
    ]


def _spread(values: list[float], form: str = ".3f") -> str:
    return _said(Spread.of(values), len(values), form)


def _said(found: Spread, count: int, form: str) -> str:
    return f"{found.median:{form}}" + (f" ({found.min:{form}} to {found.max:{form}})" if count > 1 else "")


def _flops(row: Result) -> float:
    return float(row["runs"][0]["flops"])


def _memory(row: Result) -> float | None:
    return max(row["memory"], default=None) if row["memory"] else None


def _known(rows: list[Result], of: Callable[[Result], float | None]) -> int:
    return sum(of(row) is not None for row in rows)


PLOTS: tuple[tuple[str, Callable[[Result], float | None], str, Callable[[float], str]], ...] = (
    ("compute", _flops, "floating-point operations", words_flops),
    ("memory", _memory, "peak memory", words.size),
)


def _plot(
    path: Path,
    rows: list[Result],
    plain: list[Result],
    of: Callable[[Result], float | None],
    name: str,
    form: Callable[[float], str],
) -> None:
    points = [(x, _apart(row, plain), row["name"]) for row in rows if (x := of(row)) is not None]
    across = _scale([math.log(x) for x, _, _ in points], LEFT, WIDTH - RIGHT)
    up = _scale([y for _, spread, _ in points for y in (spread.min, spread.max)], HEIGHT - BOTTOM, TOP)
    names = WIDTH - RIGHT + 24
    parts = _frame(up)
    for share in range(6):
        x = math.exp(across.at(share / 5))
        parts += [
            f'<text x="{across(math.log(x)):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#555">'
            f"{form(x)}</text>",
        ]
    parts += [
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle" fill="#333">{name}</text>',
    ]
    heights = [up(spread.median) for _, spread, _ in points]
    for (x, spread, label), height, place in zip(points, heights, _labels(heights), strict=True):
        colour, at = "#c33" if label == PLAIN else "#357", across(math.log(x))
        parts += [
            f'<path d="M{at + 5:.1f} {height:.1f}L{names - 4} {place:.1f}" stroke="{colour}" stroke-opacity="0.25"/>',
            f'<path d="M{at:.1f} {up(spread.min):.1f}V{up(spread.max):.1f}" stroke="{colour}" stroke-opacity="0.5"/>',
            f'<circle cx="{at:.1f}" cy="{height:.1f}" r="3.5" fill="{colour}"/>',
            f'<text x="{names}" y="{place + 4:.1f}" fill="{colour}">{html.escape(label)}</text>',
        ]
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


@dataclass(frozen=True)
class _Scale:
    """Values along an axis, with some room at both ends."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        """Where a value is, in pixels."""
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def at(self, share: float) -> float:
        """The value at a share of the axis."""
        return self.low + share * (self.high - self.low)


def _scale(values: list[float], first: float, last: float) -> _Scale:
    low, high = min(values), max(values)
    room = 0.06 * (high - low or 1)
    return _Scale(low - room, high + room, first, last)


def _labels(heights: list[float]) -> list[float]:
    """Heights of names in the order of their points, clear of each other, none below the plot."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed, lowest = list(heights), float(HEIGHT - BOTTOM)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + NAMES_APART)
    for index in reversed(order):
        placed[index] = min(placed[index], lowest)
        lowest = placed[index] - NAMES_APART
    return placed
