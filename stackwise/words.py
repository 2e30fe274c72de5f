"""Figures as people read them, the same in messages, in the terminal and in the report."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 54.1 MB."""
    return _scaled(count, ("kB", "MB", "GB", "TB")) if count >= 1000 else f"{count:.0f} B"


def count(number: float) -> str:
    """A quantity, three digits: 3.21 M; below ten thousand exactly: 8,420."""
    return _scaled(number, ("k", "M", "G", "T")) if number >= 10_000 else f"{number:,.0f}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    # From 999.5 on, three digits would be 1000: the next unit.
    power = next((n for n in range(1, len(units)) if value / 1000**n < 999.5), len(units))
    return f"{_three(value / 1000**power)} {units[power - 1]}"


def duration(seconds: float) -> str:
    """A time: 0.42 s, 25.1 s, 3:05, 2:10:00, 4 d 03:10."""
    if seconds < 59.95:
        return f"{_three(seconds)} s" if seconds >= 0.995 else f"{seconds:.2f} s"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def clock(seconds: float) -> str:
    """Time left, always as a clock: 0:07, 3:05, 2:10:00."""
    minutes, second = divmod(math.ceil(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def percent(share: float) -> str:
    """A share: 0.4%, 12%."""
    return f"{100 * share:.1f}%" if 0.0005 <= share < 0.0995 else f"{100 * share:.0f}%"


def rate(value: float) -> str:
    """A learning rate: 3e-3, 2.1e-4."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def span(first: int, last: int) -> str:
    """A range of blocks: 3, or 0–1."""
    return str(first) if first == last else f"{first}–{last}"


def plural(number: int, word: str) -> str:
    """`1 stage`, `4 stages`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def fraction(key: str) -> str:
    """A masked fraction as evaluation names it (`0.15`), as a percentage (`15%`)."""
    try:
        return f"{100 * float(key):g}%"
    except ValueError:
        return key


def _three(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
