"""HTML from elements: whatever is no HTML already is escaped, so text of a run is never markup. Tables and bars."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

ROWS = 20
"""Rows of a table above which it scrolls within the page."""
_EMPTY = ("line", "rect", "circle", "polyline")
"""Elements of SVG that have no content."""


class Html(str):
    """Text that is HTML."""

    __slots__ = ()


def tag(name: str, *children: Any, cls: str = "", **attributes: Any) -> Html:
    """An element.

    Args:
        name: Its name.
        children: HTML, or text, which is escaped; or several of them in an iterable.
        cls: Its class.
        attributes: Others, with `_` for `-`; those that are None or empty are left out.
    """
    present = {"class": cls, **attributes}
    shown = "".join(
        f' {key.replace("_", "-")}="{escape(str(value))}"' for key, value in present.items() if value not in (None, "")
    )
    return Html(f"<{name}{shown}/>" if name in _EMPTY else f"<{name}{shown}>{join(children)}</{name}>")


def join(pieces: Any) -> Html:
    """Pieces side by side."""
    if isinstance(pieces, Html):  # already escaped where it was made
        return pieces
    if isinstance(pieces, str) or not isinstance(pieces, Iterable):
        return Html(escape(str(pieces)))
    return Html("".join(map(join, pieces)))


def soft(*children: Any) -> Html:
    """A paragraph beside what matters."""
    return tag("p", *children, cls="soft")


def scroll(table: Html, rows: int) -> Html:
    """A table that scrolls by itself: sideways on a narrow page, and down where it has many rows."""
    return tag("div", table, cls="scroll tall" if rows > ROWS else "scroll")


def data_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]], text: Container[int] = (0,)) -> Html:
    """A table of figures.

    Args:
        columns: The names of the columns; the first names the rows.
        rows: The class of each row, and its cells.
        text: The numbers of the columns that hold words.
    """

    def cell(number: int, content: Any, head: str, **attributes: str) -> Html:
        return tag(head, content, cls="text" if number in text else "", **attributes)

    head = tag("tr", (cell(number, name, "th") for number, name in enumerate(columns)))
    body = [
        tag("tr", cell(0, first, "th", scope="row"), (cell(n, c, "td") for n, c in enumerate(others, 1)), cls=kind)
        for kind, (first, *others) in rows
    ]
    return scroll(tag("table", tag("thead", head), tag("tbody", body), cls="data"), len(body))


@dataclass(frozen=True)
class Bar:
    """One bar: a name, a length, its figure in words, more words beside it, a place among hues (None: grey)."""

    name: str
    value: float
    shown: str
    more: str = ""
    hue: float | None = None
    hint: str = ""


def bars(items: Sequence[Bar], *, name: str, figure: str) -> Html:
    """Horizontal bars as a table: readable without its lengths, and by those who cannot see them.

    Args:
        items: The bars.
        name: What the names are.
        figure: What the lengths are.
    """
    most = max((bar.value for bar in items), default=0.0) or 1.0  # nothing but zeros: bars of no length
    rows = [
        tag(
            "tr",
            tag("th", bar.name, scope="row"),
            tag("td", length(bar.value / most, bar.hue), cls="length"),
            tag("td", bar.shown, cls="figure"),
            # A column in all rows or in none.
            tag("td", bar.more, cls="more") if any(item.more for item in items) else (),
            data_tip=bar.hint,
        )
        for bar in items
    ]
    head = tag("tr", tag("th", name), tag("th"), tag("th", figure), cls="unseen")
    return scroll(tag("table", head, rows, cls="bars"), len(items))


def length(share: float, hue: float | None) -> Html:
    """A bar's length, of the longest one's; one of nothing can still be seen."""
    return tag("span", cls="bar", style=f"{colour(hue)};width:{max(100 * share, 0.3):.1f}%")


def colour(hue: float | None) -> str:
    """The inline style that gives something its colour: a way from blue through violet to orange, by depth."""
    return "--c:var(--quiet)" if hue is None else f"--c:oklch(var(--series-l) 0.14 {(255 + 165 * hue) % 360:.0f})"


def hue_of(index: int, count: int) -> float:
    """The place of one of several, from 0 to 1."""
    return index / (count - 1) if count > 1 else 0.0
