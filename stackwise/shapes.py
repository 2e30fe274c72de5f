"""The shape that JSON from elsewhere must have: checked once, where it is read, so that nothing behind it needs to.

A shape is a function from a value to what is wrong with it (None: nothing), such as `.stages.2.step: is no integer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from stackwise.errors import UsageError
from stackwise.identity import is_hex_id
from stackwise.text import printable

Shape = Callable[[Any], str | None]


def integer(value: Any) -> str | None:
    """A whole number that fits into 63 bits."""
    return None if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63 else "is no integer"


def count(value: Any) -> str | None:
    """A whole number that is not negative."""
    return integer(value) or (None if value >= 0 else "is negative")


def number(value: Any) -> str | None:
    """A finite number, far enough from the largest that sums of it are finite too."""
    if isinstance(value, float):
        return None if abs(value) < 1e200 else "is no number of a size that can be"
    return integer(value) and "is no number"


def finite(value: Any) -> Any:
    """Plain data as it may be written: numbers that JSON has not (NaN, infinity) become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def text(value: Any) -> str | None:
    """A string of any characters but NUL, which no path and no argument may have."""
    return None if isinstance(value, str) and "\0" not in value else "is no text"


def string(value: Any) -> str | None:
    """A string of any characters: what a model writes may hold NUL."""
    return None if isinstance(value, str) else "is no text"


def hex_id(value: Any) -> str | None:
    """An id, as `identity` makes them."""
    return None if is_hex_id(value) else "is no id"


def anything(value: Any) -> str | None:
    """Whatever JSON can hold."""
    return None


def optional(shape: Shape) -> Shape:
    """The shape, or null."""
    return lambda value: None if value is None else shape(value)


def either(first: Shape, second: Shape) -> Shape:
    """One of two shapes; what is wrong with a value of neither is said of the first."""
    return lambda value: None if second(value) is None else first(value)


def one_of(*values: str) -> Shape:
    """One of some strings."""
    return lambda value: None if isinstance(value, str) and value in values else f"is not one of {', '.join(values)}"


def array(*shapes: Shape) -> Shape:
    """An array with these items, in their order."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) != len(shapes):
            return f"is no array of {len(shapes)}"
        return _first(zip(range(len(value)), value, shapes, strict=True))

    return check


def array_of(shape: Shape) -> Shape:
    """An array of any length, of this shape each."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list):
            return "is no array"
        return _first((at, item, shape) for at, item in enumerate(value))

    return check


def mapping(shape: Shape, key: Shape = text) -> Shape:
    """An object with any keys of the shape `key`, and values of this shape."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return "is no object"
        return _first([(name, name, key) for name in value]) or _first((k, item, shape) for k, item in value.items())

    return check


def record(required: Mapping[str, Shape], others: Mapping[str, Shape] | None = None) -> Shape:
    """An object with these keys; `others` may be missing, and more are let be."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return "is no object"
        for name in required:
            if name not in value:
                return f".{name}: is missing"
        shapes = {**required, **(others or {})}
        return _first((name, value[name], shape) for name, shape in shapes.items() if name in value)

    return check


def _first(items: Any) -> str | None:
    """The first fault among (place, value, shape)."""
    for place, value, shape in items:
        if (fault := shape(value)) is not None:
            return f".{place}{fault if fault.startswith('.') else f': {fault}'}"
    return None


def check_shape(value: Any, shape: Shape, what: object, hint: str) -> None:
    """Refuse a value of another shape.

    Args:
        value: What was read.
        shape: What it must be like.
        what: What it is, such as its path.
        hint: What to do about it.

    Raises:
        UsageError: It is not.
    """
    if (fault := shape(value)) is not None:
        where, _, why = fault.rpartition(": ")
        place = f" at {printable(where.lstrip('.'))}" if where else ""
        raise UsageError(f"{what} is broken{place}: {why or fault}", hint=hint)
