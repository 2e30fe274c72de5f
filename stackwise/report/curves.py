"""Noisy curves made readable: smoothed, thinned, on scales with round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    found = []
    while (value := first * step) <= high + step * 1e-9:
        found.append(round(value, 10))
        first += 1
    return found


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
