"""What every benchmark shares: spreads, tables, the machine in a line, and how a command begins and ends."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.document import Section, machine, write
from stackwise.errors import StackWiseError, UsageError

Result = dict[str, Any]

INTERRUPTED = 130
"""The exit code after Ctrl-C."""


@dataclass(frozen=True)
class Spread:
    """The median, the smallest and the largest of some measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of values, at least one."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def plain(self) -> dict[str, float]:
        """As JSON-ready data."""
        return asdict(self)


def shown(spread: dict[str, float], form: Callable[[float], str]) -> str:
    """A spread as a table has it: the median, then smallest to largest in brackets."""
    return f"{form(spread['median'])} ({form(spread['min'])} to {form(spread['max'])})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned, so that it reads well in a terminal too."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """A command line with what all benchmarks have: `-o`, `--json`, `--write`."""
    summary = (about or "").strip().splitlines()[0]
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=summary)
    made.add_argument("-o", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help="set a key")
    made.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")
    made.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md too")
    return made


def overrides(given: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` strings as dotted keys and values."""
    from stackwise.config.loading import parse_overrides

    return parse_overrides(given)


def numbers(text: str) -> list[int]:
    """A whole number, or several with commas between, for an option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on, nor several with commas between")
    return found


def positive(text: str) -> int:
    """A whole number from 1 on, for an option."""
    found = numbers(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than one number")
    return found[0]


@contextlib.contextmanager
def place(directory: str | None) -> Iterator[Path]:
    """Where runs go: a directory that stays, made where it is missing; None: a temporary one."""
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="stackwise-bench-") as name:
            yield Path(name)
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    yield Path(directory)


def say(text: str) -> None:
    """A line about how it goes, on standard error."""
    print(text, file=sys.stderr, flush=True)


def run_command(
    module: str,
    arguments: Sequence[str] | None,
    measure: Callable[[Sequence[str]], Section],
    page: Path | None = None,
) -> int:
    """Carry out a benchmark's command: measure, print, and write where it is asked for.

    Args:
        module: Its name after `benchmarks.`.
        arguments: The command line; None: the program's.
        measure: From the command line to what it has to say; takes `--json` and `--write` too.
        page: The page that `--write` writes; None: docs/benchmarks.md.

    Returns:
        The exit code: 0, that of the error that a user caused, 1 for a lack of memory or what the system refuses.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        section = measure(given)
        if "--write" in given:
            write(section, _command(module, given), page)
    except (StackWiseError, MemoryError, OSError) as error:
        return _failed(module, error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _failed(module, error)
    except KeyboardInterrupt:
        say(f"benchmarks.{module}: interrupted; what it made is removed")
        return INTERRUPTED
    text = f"{section.title}\n{machine(section.device)}\n\n{section.body}\n\n{section.text}"
    try:
        print(json.dumps(section.result) if "--json" in given else text, flush=True)
    except BrokenPipeError:  # whoever read this is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _failed(module: str, error: BaseException) -> int:
    text = str(error).strip().splitlines()
    if isinstance(error, StackWiseError):
        say(f"benchmarks.{module}: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
        return error.exit_code
    if isinstance(error, OSError):
        say(f"benchmarks.{module}: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        return 1
    say(f"benchmarks.{module}: out of memory: {text[0] if text else type(error).__name__}")
    return 1


def _command(module: str, given: Sequence[str]) -> str:
    """The command that gives this again."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *(word for word in given if word != "--json")])


def refuse(text: str, hint: str) -> UsageError:
    """An error that ends a benchmark in a line or two."""
    return UsageError(text, hint=hint)
