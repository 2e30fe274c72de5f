"""Errors that a user can cause. Each carries the exit code that the command line ends with.

A message says what is wrong and where; `hint` says what to do next. The command line prints both without a
traceback; a library user catches them by class (each also inherits the builtin that fits).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence


class StackWiseError(Exception):
    """The base of every error raised on purpose.

    Args:
        message: What is wrong, and where (one line).
        hint: What to do next, such as a command (one line).
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(StackWiseError, ValueError):
    """Wrong usage, configuration or input data; nothing was written."""

    exit_code = 2


class ConfigError(UsageError):
    """Every fault of one configuration, reported together.

    Args:
        faults: One line for each fault: the key, what is wrong, what is allowed.
        source: Where the configuration came from, such as a file's path.
    """

    def __init__(self, faults: Sequence[str], *, source: str = "configuration") -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        lines = "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(f"{source}: {count} fault{'s' if count != 1 else ''}\n{lines}")


class NotFound(UsageError, LookupError):
    """Something that was named does not exist: a run, a depth, a boundary."""


class DamageError(StackWiseError):
    """Stored data is missing, truncated or changed. It was not delivered."""

    exit_code = 3


class BusyError(StackWiseError):
    """A live process holds what was asked for."""

    exit_code = 4


class NoSpaceError(StackWiseError, OSError):
    """The disk is full, or too small for what was planned."""

    exit_code = 5


class InterruptedRun(StackWiseError):
    """Work was stopped after its state was saved; the same command goes on."""

    exit_code = 75


@contextlib.contextmanager
def under(key: str) -> Iterator[None]:
    """Let what is raised here begin with the setting that it follows from; its class and exit code stay."""
    try:
        yield
    except StackWiseError as error:
        error.message = f"{key}: {error.message}"
        raise


def line_of(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of what an error of another package says: its text may be a page.

    Args:
        error: The error.
        otherwise: What stands for a text that is empty; None: the name of its class.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__ if otherwise is None else otherwise
