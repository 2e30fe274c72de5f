"""From an error to a line or two on standard error and an exit code: the one place where the program ends."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from stackwise.durable import is_full_disk
from stackwise.errors import InterruptedRun, NoSpaceError, StackWiseError

DEBUG = "STACKWISE_DEBUG"
INTERRUPTED = 130
"""Ctrl-C where nothing was begun; work that was saved ends with 75 instead."""
NO_READER = 141
"""What a shell gives a program that wrote into a closed pipe."""


def run_program(group: click.Group, args: Sequence[str] | None, name: str, extra: dict[str, Any]) -> NoReturn:
    """Run a command line to its end.

    Args:
        group: The command.
        args: Its arguments; None: the program's.
        name: What it is called.
        extra: Further settings of its context.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        code = _invoke(group, arguments, name, extra)
        sys.stdout.flush()
    except BaseException as error:
        code = explain(error, debug=_wants_traceback(arguments))
    _leave(code)


def _invoke(group: click.Group, args: list[str], name: str, extra: dict[str, Any]) -> int:
    try:
        with group.make_context(name, args, **extra) as ctx:
            group.invoke(ctx)
    except click.exceptions.Exit as error:
        return error.exit_code
    return 0


def explain(error: BaseException, *, debug: bool = False) -> int:
    """Say on standard error what happened; returns the exit code.

    Args:
        error: What was raised.
        debug: Print the traceback of any error but a wrong usage.
    """
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case click.UsageError():
            return _say_usage(error)
        case click.ClickException():
            _say(error.format_message(), None)
            return 2 if isinstance(error, click.FileError) else error.exit_code
        case BrokenPipeError():
            return NO_READER
        case KeyboardInterrupt() | click.Abort():
            _say("interrupted", None)
            return INTERRUPTED
    if debug:
        traceback.print_exception(error)
    if is_full_disk(error):
        # Writers in the background fail as well, now and at exit: one line about a full disk is enough.
        threading.excepthook = lambda _: None
        sys.unraisablehook = lambda _: None
    match error:
        case StackWiseError():
            _say(error.message, error.hint)
            return error.exit_code
        case OSError() if error.filename is not None:
            _say(f"{os.fsdecode(error.filename)}: {error.strerror or error}", None)
            return NoSpaceError.exit_code if is_full_disk(error) else 1
        case _ if is_full_disk(error):
            _say("no space left on the disk", "`stackwise cache du` shows what the store holds")
            return NoSpaceError.exit_code
    text = str(error).strip().splitlines()
    _say(f"{type(error).__name__}: {text[0]}" if text else type(error).__name__, None if debug else _kept(error))
    return 1


def _say_usage(error: click.UsageError) -> int:
    message = error.format_message()
    path = error.ctx.command_path if error.ctx is not None else "stackwise"
    _say(message[:1].lower() + message[1:].rstrip("."), f"`{path} --help` says what there is")
    return 2


def _say(message: str, hint: str | None) -> None:
    with contextlib.suppress(OSError, ValueError):
        text = f"stackwise: {message}\n" + (f"  {hint}\n" if hint else "")
        sys.stderr.write(text)
        sys.stderr.flush()


def _kept(error: BaseException) -> str:
    """Keep the traceback of an error that nobody foresaw; says where."""
    text = "".join(traceback.format_exception(error))
    try:
        fd, path = tempfile.mkstemp(prefix="stackwise-traceback-", suffix=".txt")
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return f"set {DEBUG}=1 to see the traceback"
    return f"the traceback is in {path}; it is worth a bug report"


def _wants_traceback(args: list[str]) -> bool:
    return "--debug" in args[:1] or os.environ.get(DEBUG, "") not in ("", "0")


def _leave(code: int) -> NoReturn:
    """End with a code; output that nobody reads any more is no error."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if code == 0:
            code = NO_READER
    sys.exit(code)


def stopped_after_saving(resume_command: str) -> InterruptedRun:
    """What a run that was told to stop ends with."""
    return InterruptedRun("interrupted; what was done is saved", hint=f"go on with: {resume_command}")
