"""Interleaved rounds, ratios inside a round, and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleave(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round; a round runs every action once, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        names = list(actions)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            actions[name]()
            taken[name].append(time.perf_counter() - began)
    return taken


def interleave_batches(
    actions: dict[str, Callable[[int], object]], batches: int, rounds: int
) -> dict[str, list[float]]:
    """As `interleave`, taking turns at every batch: what else the machine does then meets all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for _ in range(rounds):
        total = dict.fromkeys(names, 0.0)
        for batch in range(batches):
            for name in names[batch % len(names) :] + names[: batch % len(names)]:
                began = time.perf_counter()
                actions[name](batch)
                total[name] += time.perf_counter() - began
        for name in names:
            taken[name].append(total[name])
    return taken


def ratio(of: list[float], to: list[float]) -> str:
    """How many times as fast `of` is as `to`, round by round: the median, and the least and most."""
    each = sorted(b / a for a, b in zip(of, to, strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
