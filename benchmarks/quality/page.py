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
from benchmarks.quality.rows import BUDGETS, PLAIN, WSD, Size
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
    plain, falling = ([row for row in found if row["name"] == name] for name in (PLAIN, WSD))
    parts = []
    for budget, title in BUDGETS.items():
        shown = _shown(found, budget)
        if not shown:
            continue
        header = [
            "mode", "at 15%", "at 50%", "at 90%", "mean", "against plain", "against wsd", "bits per byte", "rate",
            "block updates", "rows", "FLOPs", "whole rack held", "peak memory", "written", "read",
        ]  # fmt: skip
        lines = (_cells(row, plain, falling) for row in shown)
        pictures = "\n".join(
            f"![{what}]({plot_name(name, what, budget)})" for what, of, _, _ in PLOTS if _known(shown, of) > 1
        )
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n{table(header, lines)}\n\n{pictures}")
    return "\n\n".join(parts)


def _shown(found: list[Result], budget: str) -> list[Result]:
    """The rows of a budget with plain training under `wsd`, best first; empty: none of the budget is measured."""
    rows = [row for row in found if row["budget"] == budget]
    if not rows:
        return []
    falling = [row for row in found if row["name"] == WSD and row not in rows]
    return _ordered([*rows, *falling], [row for row in found if row["name"] == PLAIN])


def write_plots(docs: Path, name: str, found: list[Result]) -> None:
    """Loss against compute and against peak memory, as SVG files beside the page."""
    plain = [row for row in found if row["name"] == PLAIN]
    for budget in BUDGETS:
        rows = _shown(found, budget)
        for what, of, axis, form in PLOTS:
            if _known(rows, of) > 1:
                _plot(docs / plot_name(name, what, budget), rows, plain, of, axis, form)


@dataclass(frozen=True)
class Gap:
    """How far a row is from plain training, after so many updates of each block.

    Args:
        rack: The width of the rack and, where it is not the demo's, the text.
        flops: Operations of its training.
        apart: Its mean loss less that of plain training, the median over the seeds.
    """

    name: str
    rack: str
    steps: int
    flops: float
    apart: float


def gaps(files: list[Path]) -> list[Gap]:
    """Gaps to plain training of rows that are measured at two lengths or more, from files of results.

    Plain training is, seed by seed, the better one of those schedules of rates that are measured there; seeds that
    lack one of them are left out, as are files of racks that differ by more than their width and their text.
    """
    runs: dict[tuple[str, int], dict[str, dict[int, Result]]] = {}  # by rack and length, row, seed: the best rate's
    for file in files:
        known = json.loads(file.read_text(encoding="utf-8"))
        base, steps = dict(known["setting"]["base"]), known["setting"]["steps"]
        width, text = base["model.d_model"], base.pop("data.paths", None)
        if base != Size(width, steps).base():
            continue
        rows = runs.setdefault((f"{width}" + (f"-{Path(text[0]).name}" if text else ""), steps), {})
        for key, run in known["runs"].items():
            name, budget, _, seed = key.split(" | ")
            by_seed = rows.setdefault(name if budget == "rows" else f"{name} ({budget})", {})
            by_seed[int(seed)] = min(run, by_seed.get(int(seed), run), key=mean_loss)
    found = []
    for (rack, steps), rows in sorted(runs.items()):
        plain = [rows[name] for name in (PLAIN, WSD) if name in rows]
        seeds = set.intersection(*map(set, plain)) if plain else set()
        best = {seed: min(mean_loss(row[seed]) for row in plain) for seed in seeds}
        for name, by_seed in sorted(rows.items()):
            if apart := [mean_loss(run) - best[seed] for seed, run in by_seed.items() if seed in best]:
                flops = next(iter(by_seed.values())).get("flops", 0.0)
                found.append(Gap(name, rack, steps, flops, Spread.of(apart).median))
    lengths = Counter((gap.name, gap.rack) for gap in found)
    return [gap for gap in found if lengths[gap.name, gap.rack] > 1]


def write_gaps(docs: Path, found: list[Gap]) -> None:
    """For each rack the gap to plain training against updates of each block, and against compute, as SVG files."""
    for rack in sorted({gap.rack for gap in found}):
        of_rack = [gap for gap in found if gap.rack == rack]
        updates = [(gap, float(gap.steps)) for gap in of_rack]
        compute = [(gap, gap.flops) for gap in of_rack if gap.flops]
        _gap_plot(docs / f"quality-gap-{rack}.svg", updates, "updates of each block", lambda x: f"{x:,.0f}")
        _gap_plot(docs / f"quality-gap-compute-{rack}.svg", compute, "floating-point operations", words_flops)


def _gap_plot(path: Path, points: list[tuple[Gap, float]], axis: str, form: Callable[[float], str]) -> None:
    """A line for each row through its lengths."""
    if not points:
        return
    across = _scale([math.log(x) for _, x in points], LEFT, WIDTH - RIGHT)
    up = _scale([gap.apart for gap, _ in points], HEIGHT - BOTTOM, TOP)
    lines: dict[str, list[tuple[float, float]]] = {}
    for gap, x in points:
        lines.setdefault(gap.name, []).append((across(math.log(x)), up(gap.apart)))
    parts = _frame(up)
    plain = [x for gap, x in points if gap.name in (PLAIN, WSD)]  # marks stand at the lengths of plain training
    for mark in sorted(set(plain)):
        x = across(math.log(mark))
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#555">{form(mark)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle" fill="#333">{axis}</text>'
    )
    names = WIDTH - RIGHT + 24
    for (name, line), place in zip(lines.items(), _labels([line[-1][1] for line in lines.values()]), strict=True):
        colour = "#c33" if name in (PLAIN, WSD) else "#283" if name.startswith("grown") else "#357"
        path_of = "L".join(f"{x:.1f} {y:.1f}" for x, y in line)
        x, y = line[-1]
        parts += [
            f'<path d="M{path_of}" fill="none" stroke="{colour}" stroke-opacity="0.7"/>',
            *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in line),
            f'<path d="M{x + 5:.1f} {y:.1f}L{names - 4} {place:.1f}" stroke="{colour}" stroke-opacity="0.25"/>',
            f'<text x="{names}" y="{place + 4:.1f}" fill="{colour}">{html.escape(name)}</text>',
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
        f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end" fill="#555">{y:+.3f}</text>'
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


def _cells(row: Result, plain: list[Result], falling: list[Result]) -> list[str]:
    runs = row["runs"]
    first = runs[0]
    losses = [_spread([run["loss"][key] for run in runs]) for key in first["loss"]]
    return [
        row["name"],
        *losses,
        _spread([mean_loss(run) for run in runs]),
        *(_against(row, other) for other in (plain, falling)),
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


def _against(row: Result, other: list[Result]) -> str:
    """How far a row is from another one, over the seeds that both have."""
    count = min(len(row["runs"]), len(other[0]["runs"])) if other else 0
    return _said(_apart(row, other), count, "+.3f") if count else "–"


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
