"""What commands print with, and the gate that all of it passes: the standard streams, lines, JSON.

Text from a manifest, a path, a data set or an error is shown, not obeyed: its control characters are written out
(`stackwise.text.printable`).
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, cast

import click

from stackwise.errors import NoSpaceError, StackWiseError
from stackwise.text import printable

if TYPE_CHECKING:
    pass


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
    standard = Standard(sys.stdout)
    sys.stdout = cast("TextIO", standard)
    return standard


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
    texts = (_ansi(text, style) if coloured and style else text for text, style in gated(pieces))
    sys.stdout.write("".join(texts) + "\n")


def say_all(lines: Iterable[Line]) -> None:
    """Lines on standard output."""
    for line in lines:
        say(*line)


def gated(pieces: Iterable[object]) -> Iterator[tuple[str, str]]:
    """Pieces as they may be shown, each with its style."""
    for piece in pieces:
        text, style = piece if isinstance(piece, Styled) else (str(piece), "")
        yield printable(text, lines=True), style


def _ansi(text: str, style: str) -> str:
    effects = [word for word in style.split() if word in ("bold", "dim", "underline")]
    colours = [word for word in style.split() if word not in effects]
    return click.style(text, fg=colours[0] if colours else None, **dict.fromkeys(effects, True))


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
    import json  # here: `--help` does without

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
