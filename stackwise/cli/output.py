"""What commands print with, and the gate that all of it passes: lines, tables, JSON, progress, `--watch`.

Text from a manifest, a path, a data set or an error is shown, not obeyed: its control characters are written out
(`stackwise.text.printable`). rich is imported only where something is redrawn in place, on a terminal.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, cast

import click

from stackwise import words
from stackwise.errors import NoSpaceError, StackWiseError
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
    "failed": "red",
    "damaged": "red",
    "pending": "dim",
    "submitted": "dim",
    "dropped": "dim",
}

_ASCII = {"–": "-", "—": "-", "─": "-", "…": "...", "×": "x", "→": "->", "≤": "<=", "±": "+-", "“": '"', "”": '"'}
"""What stands for characters that an output lacks, where taking them apart does not say it."""


def _substitute(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler of standard output: a character that its encoding lacks is shown by others."""
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    shown = "".join(
        _ASCII.get(c) or unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() or "?" for c in missing
    )
    return shown, error.end


codecs.register_error("stackwise", _substitute)


class Standard:
    """Standard output as commands write to it.

    A write that fails ends a command that only prints, in one line, as with other Unix tools. It does not end work that
    can do without (`keep_going_without_output`). A closed pipe stays a BrokenPipeError: its reader has seen enough.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.forgiving = False
        self.failure: StackWiseError | None = None

    def write(self, text: str) -> int:
        """Write a text."""
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        with self._failing():
            self._stream.flush()

    def discard(self) -> None:
        """Write to nowhere from now on, what is buffered included."""
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(os.devnull, os.O_WRONLY)
            os.dup2(fd, self._stream.fileno())
            os.close(fd)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            self.discard()
            message = f"standard output: {error.strerror or error}"
            if not self.forgiving:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                # Kept as well: click tries a stream out before it prints, and swallows what that raises.
                self.failure = (NoSpaceError if full else StackWiseError)(message)
                raise self.failure from None
            note(f"{message}; the work goes on without it")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # encoding, isatty, fileno


def open_streams() -> Standard:
    """Make the program's standard streams fit for use: present, and able to show any text.

    A descriptor that was closed is taken by /dev/null, or the next file that is opened, an index, would take it and
    have printed text written into it.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number; not to be written where it is standard output
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream put there by a test
            stream.reconfigure(errors="stackwise")  # type: ignore[union-attr]
    made = Standard(sys.stdout)
    sys.stdout = cast("TextIO", made)
    return made


def keep_going_without_output() -> None:
    """Let work go on where standard output is closed or full; it is said once."""
    if isinstance(sys.stdout, Standard):
        sys.stdout.forgiving = True


class Styled(NamedTuple):
    """A piece of text and how it looks on a terminal: words such as `bold cyan`, `dim`, `underline yellow`."""

    text: str
    style: str = ""


Line = Sequence[Styled | str]
"""Pieces of text that stand side by side."""


def say(*pieces: object) -> None:
    """A line of pieces on standard output, coloured on a terminal unless NO_COLOR is set; a piece may have several."""
    coloured = is_live(sys.stdout) and not os.environ.get("NO_COLOR")
    sys.stdout.write("".join(_shown(piece, coloured) for piece in pieces) + "\n")


def say_all(lines: Iterable[Line]) -> None:
    """Lines on standard output."""
    for line in lines:
        say(*line)


def _shown(piece: object, coloured: bool) -> str:
    text, style = piece if isinstance(piece, Styled) else (str(piece), "")
    text = printable(text, lines=True)
    if not coloured or not style:
        return text
    *effects, last = style.split()
    effects += [last] if last in EFFECTS else []
    colour = None if last in EFFECTS else last
    return click.style(text, fg=colour, **dict.fromkeys(effects, True))


EFFECTS = ("bold", "dim", "underline")


def note(text: object) -> None:
    """A line on standard error; where nobody can read it, it is lost."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(printable(str(text), lines=True) + "\n")
        sys.stderr.flush()


def print_json(value: Any) -> None:
    """One JSON document."""
    sys.stdout.write(_json(value, indent=2) + "\n")


def print_event(event: dict[str, Any]) -> None:
    """An event as a line of JSON."""
    sys.stdout.write(_json(event) + "\n")
    sys.stdout.flush()


def _json(value: Any, indent: int | None = None) -> str:
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    text = json.dumps(value, indent=indent, ensure_ascii=not encoding.startswith("utf"))
    # What json leaves as it is, a terminal would obey; within a string any character may be written by its number.
    return re.sub("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def is_live(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose cursor can be moved."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except ValueError:
        return False


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
        below = beside < min(last, FOLDED)
        while below and sum(widths) + 2 * len(widths) > room and max(widths) > NARROWEST:
            widths[widths.index(max(widths))] -= 1
        indent = sum(widths) + 2 * len(widths)
        lines: list[Line] = []
        for *cells, end in self._rows:
            line = [piece for number, cell in enumerate(cells) for piece in self._cell(number, cell, widths[number])]
            if below:
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
        return (
            [blanks, Styled(text, cell.style), "  "]
            if number in self._right
            else [Styled(text, cell.style), blanks + "  "]
        )


def _stripped(line: list[Styled | str]) -> Line:
    """A line without the blanks at its end, with which a table is filled up."""
    while line and not (line[-1].text if isinstance(line[-1], Styled) else line[-1]).strip():
        line.pop()
    return line


def columns_of(text: str) -> int:
    """Columns that a text takes on a terminal: East Asian characters two, combining ones none."""
    if text.isascii():
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
            lines[-1] = _cut(word, room) or word[0]
            word = word[len(lines[-1]) :]
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines if line] or [""]


def drawn(lines: Iterable[Line]) -> Text:
    """Lines as rich draws them in place."""
    from rich.text import Text

    text = Text()
    for line in lines:
        for piece in line:
            content, style = piece if isinstance(piece, Styled) else (piece, "")
            text.append(printable(content, lines=True), style=style)
        text.append("\n")
    text.rstrip()
    return text


@contextlib.contextmanager
def progress(what: str, *, unit: Callable[[float], str] = words.count) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on standard error, where that is a terminal; yields what to call with (done, total)."""
    with phases(unit=lambda _, value: unit(value)) as update:
        yield lambda done, total: update(what, done, total)


@contextlib.contextmanager
def phases(
    *, unit: Callable[[str, float], str] = lambda _, value: words.count(value)
) -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar on standard error for work in phases; yields what to call with (phase, done, total)."""
    if not is_live(sys.stderr):
        yield lambda phase, done, total: None
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

        def update(phase: str, done: int, total: int | None) -> None:
            phase = printable(phase)
            shown = unit(phase, done) + (f" of {unit(phase, total)}" if total is not None else "")
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
            if value != before:
                print_event(value) if as_json else say_all(lines(value))
                sys.stdout.flush()
                before = value


def _looks(look: Callable[[], dict[str, Any]], still_changing: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The value from time to time, and once more after it has stopped to change."""
    while still_changing():
        yield look()
        time.sleep(WATCH_SECONDS)
    yield look()
