"""What commands print with: JSON, tables, progress. Everything that imports rich does so when it is called."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

import click

from stackwise.report import words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_WIDTH = 1000
"""Columns where there is no terminal: nothing is cut off or wrapped."""

STATES = {
    "done": "green",
    "complete": "green",
    "ok": "green",
    "running": "cyan",
    "writing": "cyan",
    "interrupted": "yellow",
    "failed": "red",
    "damaged": "red",
    "pending": "dim",
    "submitted": "dim",
    "not run": "yellow",
    "dropped": "dim",
}


def print_json(value: Any) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def is_live(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose cursor can be moved."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except ValueError:
        return False


class _Unpadded:
    """A stream whose lines lose the blanks at their ends, with which a table is filled up."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r"[ \t]+(?=\n)", "", text))

    def flush(self) -> None:
        self._stream.flush()


def console(stream: TextIO | None = None) -> Console:
    """Where tables go. Colour and styles for a terminal alone, and by NO_COLOR not even there."""
    from rich.console import Console

    stream = stream or sys.stdout
    if is_live(stream):
        return Console(file=stream, force_terminal=True, highlight=False)
    plain = cast("IO[str]", _Unpadded(stream))
    return Console(file=plain, force_terminal=False, color_system=None, width=PLAIN_WIDTH, highlight=False)


def table(*columns: str, right: Sequence[int] = ()) -> Table:
    """A table without lines; the columns numbered in `right` hold figures."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, name in enumerate(columns):
        last = number == len(columns) - 1
        made.add_column(
            name,
            justify="right" if number in right else "left",
            no_wrap=not last,
            overflow="fold" if last else "ellipsis",
        )
    return made


def state(name: str) -> str:
    """A state, in its colour."""
    style = STATES.get(name)
    return f"[{style}]{name}[/]" if style else name


def plain(text: object) -> str:
    """Text as it stands, whatever brackets it has."""
    from rich.markup import escape

    return escape(str(text))


def note(text: str) -> None:
    """A line on standard error."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress(what: str, *, unit: Callable[[float], str] = words.count) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on standard error, where that is a terminal; yields what to call with (done, total)."""
    with phases(unit=lambda _, value: unit(value)) as tell:
        yield lambda done, total: tell(what, done, total)


@contextlib.contextmanager
def phases(
    *, unit: Callable[[str, float], str] = lambda _, value: words.count(value)
) -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar on standard error for work in phases; yields what to call with (phase, done, total)."""
    if not is_live(sys.stderr):
        yield lambda phase, done, total: None
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(phase: str, done: int, total: int | None) -> None:
            shown = unit(phase, done) + (f" of {unit(phase, total)}" if total is not None else "")
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, shown=shown)
            bar.update(tasks[phase], completed=done, total=total, shown=shown)

        yield tell
