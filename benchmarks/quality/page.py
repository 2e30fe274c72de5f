"""Tables and plots of the quality benchmark."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Result, Spread, table
from benchmarks.quality.results import mean_loss
from benchmarks.quality.rows import BUDGETS, PLAIN
from stackwise.report import words

WIDTH, HEIGHT, LEFT, BOTTOM = 760, 460, 64, 56


def body(found: list[Result]) -> str:
    """The tables, one a budget, best first, the plain row in both."""
    plain = [row for row in found if row["name"] == PLAIN]
    parts = []
    for budget, title in BUDGETS.items():
        rows = [row for row in found if row["budget"] == budget]
        if not rows:
            continue
        shown = sorted([*rows, *(row for row in plain if row not in rows)], key=_middle)
        header = [
            "mode", "at 15%", "at 50%", "at 90%", "mean", "against plain", "bits per byte", "rate",
            "block updates", "rows", "FLOPs", "peak memory", "written", "read",
        ]  # fmt: skip
        lines = (_cells(row, plain[0]["runs"] if plain else []) for row in shown)
        pictures = "\n".join(f"![{what}]({plot_name(what, budget)})" for what, of in PLOTS if _known(shown, of) > 1)
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n{table(header, lines)}\n\n{pictures}")
    return "\n\n".join(parts)


def write_plots(docs: Path, found: list[Result]) -> None:
    """Loss against compute and against peak memory, as SVG files beside the page."""
    for budget in BUDGETS:
        rows = [row for row in found if row["budget"] == budget or row["name"] == PLAIN]
        if _known(rows, _flops) > 1:
            _plot(docs / plot_name("compute", budget), rows, _flops, "floating-point operations", words_flops)
        if _known(rows, _memory) > 1:
            _plot(docs / plot_name("memory", budget), rows, _memory, "peak memory", words.size)


def plot_name(what: str, budget: str) -> str:
    """The file of a plot."""
    return f"quality-{what}-{budget}.svg"


def words_flops(count: float) -> str:
    """1.2e13 as 12 T."""
    return f"{count / 1e12:.3g} T"


def _middle(row: Result) -> float:
    return Spread.of(map(mean_loss, row["runs"])).median


def _cells(row: Result, plain: list[Result]) -> list[str]:
    runs = row["runs"]
    # Seed by seed: each has its own held-out rows and its own start, which all rows share.
    apart = [mean_loss(run) - mean_loss(other) for run, other in zip(runs, plain, strict=False)]
    first = runs[0]
    losses = [_spread([run["loss"][key] for run in runs]) for key in first["loss"]]
    return [
        row["name"],
        *losses,
        _spread([mean_loss(run) for run in runs]),
        _spread(apart, "+.3f") if apart else "–",
        _spread([run["bits_per_byte"] for run in runs]),
        words.rate(row["rate"]),
        f"{first['updates']:,}",
        f"{first['rows']:,}",
        words_flops(first["flops"]),
        "–" if (memory := _memory(row)) is None else words.size(memory),
        words.size(first["written"]),
        words.size(first["read"]),
    ]


def _spread(values: list[float], form: str = ".3f") -> str:
    found = Spread.of(values)
    return f"{found.median:{form}}" + (f" ({found.min:{form}} to {found.max:{form}})" if len(values) > 1 else "")


def _flops(row: Result) -> float:
    return float(row["runs"][0]["flops"])


def _memory(row: Result) -> float | None:
    memory: float | None = row["memory"]
    return memory


def _known(rows: list[Result], of: Callable[[Result], float | None]) -> int:
    return sum(of(row) is not None for row in rows)


PLOTS: tuple[tuple[str, Callable[[Result], float | None]], ...] = (("compute", _flops), ("memory", _memory))


def _plot(
    path: Path, rows: list[Result], of: Callable[[Result], float | None], name: str, form: Callable[[Any], str]
) -> None:
    points = [(x, _middle(row), row["name"]) for row in rows if (x := of(row)) is not None]
    xs, ys = [math.log(x) for x, _, _ in points], [y for _, y, _ in points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(ys), max(ys)
    x0, x1 = x0 - 0.1 * (x1 - x0 or 1), x1 + 0.35 * (x1 - x0 or 1)
    y0, y1 = y0 - 0.06 * (y1 - y0 or 1), y1 + 0.06 * (y1 - y0 or 1)

    def across(x: float) -> float:
        return LEFT + (math.log(x) - x0) / (x1 - x0) * (WIDTH - LEFT - 16)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - 16)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<path d="M{LEFT} 16V{HEIGHT - BOTTOM}H{WIDTH - 16}" fill="none" stroke="#888"/>',
    ]
    for step in range(6):
        y = y0 + (y1 - y0) * step / 5
        parts.append(f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end" fill="#555">{y:.2f}</text>')
        x = math.exp(x0 + (x1 - x0) * step / 5)
        parts.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#555">{form(x)}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle" fill="#333">{name}</text>')
    parts.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" fill="#333" transform="rotate(-90 14 {HEIGHT / 2})">'
        "held-out loss, nats a masked token</text>"
    )
    for (x, y, label), place in zip(points, _labels([up(y) for _, y, _ in points]), strict=True):
        colour = "#c33" if label == PLAIN else "#357"
        parts.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{across(x) + 8:.1f}" y="{place + 4:.1f}" fill="{colour}">{html.escape(label)}</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def _labels(heights: list[float], apart: float = 12.0) -> list[float]:
    """Heights of labels, near their points and clear of each other."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + apart)
    return placed
