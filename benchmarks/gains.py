"""A plot of how far rows are ahead of what they are compared with, seed by seed, as an SVG file."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, LEFT, RIGHT, LINE, TOP, BOTTOM = 760, 260, 24, 24, 16, 48


def write_gains(path: Path, gains: Mapping[str, Sequence[float]], axis: str) -> None:
    """A row for each name with at least one gain: a dot a seed, their mean as a stroke, beside a line at 0.

    Args:
        gains: By row the gain with each seed.
        axis: What is shown, in words.
    """
    rows = {name: values for name, values in gains.items() if values}
    if not rows:
        return
    values = [0.0, *(value for of_row in rows.values() for value in of_row)]
    low, high = min(values), max(values)
    room = 0.06 * (high - low or 1.0)
    low, high = low - room, high + room
    bottom = TOP + LINE * len(rows)

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{bottom + BOTTOM}" fill="#fff"/>',
        f'<path d="M{across(0):.1f} {TOP}V{bottom}" stroke="#c33"/>',
        f'<path d="M{LEFT} {bottom}H{WIDTH - RIGHT}" stroke="#888"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 40}" text-anchor="middle" fill="#333">'
        f"{html.escape(axis)}</text>",
    ]
    for share in range(6):
        value = low + share / 5 * (high - low)
        parts.append(
            f'<text x="{across(value):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{value:+.2f}</text>'
        )
    for place, (name, of_row) in enumerate(rows.items()):
        y = TOP + LINE * (place + 0.5)
        middle = across(statistics.fmean(of_row))
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end" fill="#333">{html.escape(name)}</text>',
            f'<path d="M{middle:.1f} {y - 8:.1f}V{y + 8:.1f}" stroke="#357" stroke-width="2"/>',
            *(f'<circle cx="{across(v):.1f}" cy="{y:.1f}" r="4" fill="#357" fill-opacity="0.5"/>' for v in of_row),
        ]
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
