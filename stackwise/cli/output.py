"""What commands print with, and the gate that all of it passes: lines, JSON, tables, progress, `--watch`.

Nothing here imports rich before it is called. Text from a manifest, a path, a data set or an error is shown, not
obeyed: its control characters are written out (`stackwise.text.printable`).
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

import click

from stackwise import words
from stackwise.errors import NoSpaceError, StackWiseError
from stackwise.text import has_control, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.table import Table

PLAIN_WIDTH = 1000
"""Columns where there is no terminal: nothing is cut off or wrapped."""
WATCH_SECONDS = 1.0
"""Between two looks of `--watch`."""

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


def say(text: object = "") -> None:
    """A line, or several, on standard output."""
    sys.stdout.write(printable(str(text), lines=True) + "\n")


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
    from rich.segment import Segment

    class Gated(Console):
        """Every piece of text that is drawn passes the gate; the console's own movements of the cursor do not."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for piece in super().render(renderable, options):
                obeyed = not piece.control and has_control(piece.text)
                yield Segment(printable(piece.text, lines=True), piece.style) if obeyed else piece

    stream = stream or sys.stdout
    if is_live(stream):
        return Gated(file=stream, force_terminal=True, highlight=False)
    plain_stream = cast("IO[str]", _Unpadded(stream))
    return Gated(file=plain_stream, force_terminal=False, color_system=None, width=PLAIN_WIDTH, highlight=False)


def table(*columns: str, right: Sequence[int] = ()) -> Table:
    """A table without lines; the columns numbered in `right` hold figures."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, name in enumerate(columns):
        last = number == len(columns) - 1
        made.add_column(
            plain(name),
            justify="right" if number in right else "left",
            no_wrap=not last,
            overflow="fold" if last else "ellipsis",
        )
    return made


def state(name: str) -> str:
    """A state, in its colour."""
    style = STATES.get(name)
    return f"[{style}]{name}[/]" if style else plain(name)


def plain(text: object) -> str:
    """Text as it stands, whatever brackets and control characters it has, for a table or a console."""
    from rich.markup import escape

    return escape(printable(str(text), lines=True))


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
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[shown]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def update(phase: str, done: int, total: int | None) -> None:
            shown = unit(phase, done) + (f" of {unit(phase, total)}" if total is not None else "")
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, shown=shown)
            bar.update(tasks[phase], completed=done, total=total, shown=shown)

        yield update


watch_option = click.option("--watch", is_flag=True, help="Look again every second, until the run has ended.")


def show(
    look: Callable[[], dict[str, Any]],
    rendered: Callable[[dict[str, Any]], RenderableType],
    still_changing: Callable[[], bool] | None,
    *,
    as_json: bool,
) -> None:
    """Show a value once, or whenever it has changed: drawn in place on a terminal, else one after another.

    Args:
        look: The value now, JSON-ready.
        rendered: How people read it.
        still_changing: Whether it may still change; None: show it once.
        as_json: JSON instead: one document, or while watching one a line.
    """
    if still_changing is None:
        if as_json:
            print_json(look())
        else:
            console().print(rendered(look()))
    elif not as_json and is_live(sys.stdout):
        from rich.live import Live

        with Live(rendered(look()), console=console(), auto_refresh=False) as live:
            for value in _looks(look, still_changing):
                live.update(rendered(value), refresh=True)
    else:
        before: dict[str, Any] | None = None
        for value in _looks(look, still_changing):
            if value != before:
                if as_json:
                    print_event(value)
                else:
                    console().print(rendered(value))
                before = value


def _looks(look: Callable[[], dict[str, Any]], still_changing: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The value from time to time, and once more after it has stopped to change."""
    while still_changing():
        yield look()
        time.sleep(WATCH_SECONDS)
    yield look()
