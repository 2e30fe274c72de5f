"""What is drawn: tables, progress bars, what `--watch` looks at again. rich draws in place, and only on a terminal."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from stackwise import words
from stackwise.cli.output import Line, Styled, gated, is_live, print_event, print_json, say_all
from stackwise.text import printable

if TYPE_CHECKING:
    from rich.text import Text

PLAIN_WIDTH = 1000
"""Columns where there is no terminal: nothing is cut off or wrapped."""
FOLDED, NARROWEST = 16, 8
"""Columns that the last column of a table needs beside the others, and to which others are cut on a narrow terminal."""
WATCH_SECONDS = 1.0
"""Between two looks of `--watch`."""

STATES = {
    "done": "green",
    "complete": "green",
    "ok": "green",
    "running": "cyan",
    "writing": "cyan",
    "interrupted": "yellow",
    "not run": "yellow",
    "pruned": "yellow",
    "failed": "red",
    "damaged": "red",
    "pending": "dim",
    "submitted": "dim",
    "dropped": "dim",
}


def width() -> int:
    """Columns that a line on standard output has."""
    return shutil.get_terminal_size().columns if is_live(sys.stdout) else PLAIN_WIDTH


def state(name: str) -> Styled:
    """A state, in its colour."""
    return Styled(name, STATES.get(name, ""))


class Table:
    """Rows of text under the names of columns, without lines.

    Args:
        columns: Their names.
        right: The numbers of those that hold figures.
    """

    def __init__(self, *columns: str, right: Iterable[int] = ()) -> None:
        self._right = set(right)
        self._rows = [[Styled(name, "dim") for name in columns]]

    def add_row(self, *cells: Styled | str, style: str = "") -> None:
        """Add a row; a cell without a style of its own takes the row's."""
        row = [cell if isinstance(cell, Styled) else Styled(cell) for cell in cells]
        # A cell is one line: a line break in a reason or a name would tear the table.
        self._rows.append([Styled(printable(" ".join(cell.text.splitlines())), cell.style or style) for cell in row])

    def lines(self, room: int | None = None) -> list[Line]:
        """The table as lines of `room` columns, by default as many as the output has.

        The last column is folded, beside the others or, where there is little room, below them.
        """
        room = width() if room is None else room
        *widths, last = (max(columns_of(cell.text) for cell in column) for column in zip(*self._rows, strict=True))
        beside = room - sum(widths) - 2 * len(widths)
        below = beside < min(last, FOLDED)  # so few columns would break every word
        while below and sum(widths) + 2 * len(widths) > room and max(widths) > NARROWEST:
            widths[widths.index(max(widths))] -= 1  # a long name loses its end before a figure does
        indent = sum(widths) + 2 * len(widths)
        lines: list[Line] = []
        for *cells, end in self._rows:
            line = [piece for number, cell in enumerate(cells) for piece in self._cell(number, cell, widths[number])]
            if below:
                # Nothing is lost: what is folded goes on below.
                texts = _folded(end.text, max(FOLDED, room - 4)) if end.text else []
                lines.append(_stripped(line))
                lines.extend(["    ", Styled(text, end.style)] for text in texts)
                continue
            for text in _folded(end.text, min(last, beside)):
                blanks = " " * (min(last, beside) - columns_of(text)) if len(cells) in self._right else ""
                lines.append(_stripped([*line, blanks, Styled(text, end.style)]))
                line = [" " * indent]
        return lines

    def _cell(self, number: int, cell: Styled, room: int) -> Line:
        text = cell.text if columns_of(cell.text) <= room else _cut(cell.text, room - 1) + "…"
        blanks = " " * (room - columns_of(text))
        shown = Styled(text, cell.style)
        return [blanks, shown, "  "] if number in self._right else [shown, blanks + "  "]


def _stripped(line: list[Styled | str]) -> Line:
    """A line without the blanks at its end, with which a table is filled up."""
    while line and not (line[-1].text if isinstance(line[-1], Styled) else line[-1]).strip():
        line.pop()
    return line


def columns_of(text: str) -> int:
    """Columns that a text takes on a terminal: East Asian characters two, combining ones none."""
    if text.isascii():  # nearly always, and much faster
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)


def _cut(text: str, room: int) -> str:
    """The beginning of a text, as much as fits."""
    while columns_of(text) > room:
        text = text[: max(0, min(room, len(text) - 1))]
    return text


def _folded(text: str, room: int) -> list[str]:
    """A text in lines that fit, broken between words where that can be."""
    lines = [""]
    for word in re.findall(r"\S+\s*|\s+", text):
        if columns_of(lines[-1] + word.rstrip()) > room and lines[-1]:
            lines.append("")
        while columns_of(word.rstrip()) > room:  # longer than a line: a path, or a language without blanks
            lines[-1] = _cut(word, room) or word[0]  # at least one character, or this would not end
            word = word[len(lines[-1]) :]
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines if line] or [""]


def drawn(lines: Iterable[Line]) -> Text:
    """Lines as rich draws them in place."""
    from rich.text import Text

    text = Text()
    for line in lines:
        for content, style in gated(line):
            text.append(content, style=style)
        text.append("\n")
    text.rstrip()
    return text


@contextlib.contextmanager
def progress(what: str, *, unit: Callable[[float], str] = words.count) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on standard error, where that is a terminal; yields what to call with (done, total)."""
    with phases(unit=lambda _, value: unit(value)) as update:
        yield lambda done, total: update(what, done, total)


@contextlib.contextmanager
def phases(*, unit: Callable[[str, float], str] = lambda _, value: words.count(value)) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error for work in phases; yields what to call with (phase, done, total).

    A fourth argument stands beside the bar instead of both figures.
    """
    if not is_live(sys.stderr):  # a log has no use for a bar
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def update(phase: str, done: int, total: int | None, text: str | None = None) -> None:
            phase = printable(phase)
            figures = unit(phase, done) + (f" of {unit(phase, total)}" if total is not None else "")
            shown = figures if text is None else text
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, shown=shown)
            bar.update(tasks[phase], completed=done, total=total, shown=shown)

        yield update


def show(
    look: Callable[[], dict[str, Any]],
    lines: Callable[[dict[str, Any]], Iterable[Line]],
    still_changing: Callable[[], bool] | None,
    *,
    as_json: bool,
) -> None:
    """Show a value once, or whenever it has changed: drawn in place on a terminal, else one after another.

    Args:
        look: The value now, JSON-ready.
        lines: How people read it.
        still_changing: Whether it may still change; None: show it once.
        as_json: JSON instead: one document, or while watching one a line.
    """
    if still_changing is None:
        print_json(look()) if as_json else say_all(lines(look()))
    elif not as_json and is_live(sys.stdout):
        from rich.live import Live

        with Live(drawn(lines(look())), auto_refresh=False) as live:
            for value in _looks(look, still_changing):
                live.update(drawn(lines(value)), refresh=True)
    else:
        before: dict[str, Any] | None = None
        for value in _looks(look, still_changing):
            if value != before:  # a log of the same again and again says nothing
                print_event(value) if as_json else say_all(lines(value))
                sys.stdout.flush()
                before = value


def _looks(look: Callable[[], dict[str, Any]], still_changing: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The value from time to time, and once more after it has stopped to change."""
    while still_changing():
        yield look()
        time.sleep(WATCH_SECONDS)
    yield look()
