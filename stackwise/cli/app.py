"""The command `stackwise`: which commands there are, found without importing any of them; and how the program ends."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from stackwise.cli.output import Standard, note, open_streams
from stackwise.errors import InterruptedRun, StackWiseError
from stackwise.text import printable
from stackwise.version import __version__

DEBUG = "STACKWISE_DEBUG"
INTERRUPTED = 130
"""Ctrl-C where nothing was begun; work that was saved ends with 75 instead."""
NO_READER = 141
"""What a shell gives a program that wrote into a closed pipe."""

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Train": {
        "init": ("prepare:init", "Write a commented stackwise.yaml."),
        "run": ("run:run", "Train every stage, evaluate, report; resumes by itself."),
        "stage": ("run:stage", "Train one stage alone; show the schedule."),
        "plan": ("plan:plan", "What a run will take, before it runs: memory, disk, time."),
        "status": ("use:status", "Show run status."),
        "sweep": ("sweep:sweep", "Run every combination of values; common stages train once."),
        "tune": ("tune:tune", "Search settings; common stages train once."),
        "compare": ("use:compare", "Compare runs: settings that differ, and results."),
    },
    "Use what was trained": {
        "eval": ("use:evaluate", "Held-out bits per byte, loss and accuracy by depth."),
        "generate": ("use:generate", "Continue a text, or fill in its holes."),
        "export": ("use:export", "The fused rack as safetensors, for transformers or for StackWise."),
        "capture": ("capture:capture", "Hidden states of a pretrained model, into a store."),
        "report": ("use:report", "Write a run's report.html again."),
    },
    "Data, store, machine": {
        "data": ("prepare:data", "Prepare text for training."),
        "cache": ("cache:cache", "Inspect, verify, repair and clean the activation store."),
        "doctor": ("doctor:doctor", "Check this machine: packages, devices, memory, disk."),
    },
}
"""Every command under its heading: where it is, and what `stackwise --help` says of it."""

COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}


class Subcommands(click.Group):
    """A command with subcommands, which suggests the nearest one for a wrong name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or say which one was meant."""
        name, names = args[0], self.list_commands(ctx)
        if name not in names and not name.startswith("-"):  # an option before a command is click's to refuse
            import difflib  # it is needed for this answer alone

            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise click.UsageError(f"there is no command {name!r}; {meant}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each command with its whole first sentence, which click would cut."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, of.get_short_help_str(200)) for name, of in sorted(self.commands.items())])


class Program(Subcommands):
    """The commands of the table, each imported when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        place, about = COMMANDS[cmd_name]
        module, _, attribute = place.partition(":")
        command: click.Command = getattr(importlib.import_module(f"stackwise.cli.commands.{module}"), attribute)
        command.short_help = about
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands under their headings, from the table alone."""
        for heading, commands in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, about) for name, (_, about) in commands.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; as a program it ends with the exit code of the contract."""
        name = prog_name or "stackwise"
        if not standalone_mode:  # a test or another program catches errors by itself
            return super().main(args, name, complete_var, standalone_mode=False, **extra)
        extra.pop("windows_expand_args", None)
        self._main_shell_completion(extra, name, complete_var)
        arguments = list(sys.argv[1:] if args is None else args)
        output = open_streams()
        try:
            with self.make_context(name, arguments, **extra) as ctx:
                self.invoke(ctx)
            output.flush()  # what is buffered may still fail, and decides the code
            code = 0
        except BaseException as error:
            code = explain(error, debug="--debug" in arguments[:1] or os.environ.get(DEBUG, "") not in ("", "0"))
        sys.exit(_final_code(output, code))


@click.command(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="stackwise %(version)s")
@click.option("--debug", is_flag=True, envvar=DEBUG, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Train a transformer far larger than your GPU, one stage at a time, from a disk-backed activation store.

    \b
    stackwise run                      a small model on this machine's Python library, in minutes
    stackwise init && stackwise run stackwise.yaml

    Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 damage found in the store, 4 busy,
    5 no space left, 75 interrupted after saving: run again to go on.
    """


def explain(error: BaseException, *, debug: bool = False) -> int:
    """Say on standard error what happened; returns the exit code.

    Args:
        error: What was raised.
        debug: Print the traceback of any error but a wrong usage.
    """
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case click.exceptions.NoArgsIsHelpError():
            note(error.format_message())
            return 2
        case click.UsageError():
            message = error.format_message()
            path = error.ctx.command_path if error.ctx is not None else "stackwise"
            _refuse(message[:1].lower() + message[1:].rstrip("."), f"`{path} --help` says what there is")
            return 2
        case click.ClickException():
            _refuse(error.format_message())
            return 2 if isinstance(error, click.FileError) else error.exit_code  # a file that was named is wrong usage
        case BrokenPipeError():
            return NO_READER  # whoever read this has seen enough: no message
        case KeyboardInterrupt() | click.Abort():
            _refuse("interrupted")
            return INTERRUPTED
    if debug:
        import traceback

        note("".join(traceback.format_exception(error)).rstrip())
    from stackwise.durable import disk_fault, is_full_disk

    if not isinstance(error, StackWiseError):
        error = disk_fault(error) or error
    if is_full_disk(error):
        import threading

        # Writers in the background fail as well, now and at exit: one line about a full disk is enough.
        threading.excepthook = lambda _: None
        sys.unraisablehook = lambda _: None
    match error:
        case StackWiseError():
            _refuse(error.message, error.hint)
            return error.exit_code
        case ModuleNotFoundError() if (error.name or "stackwise").partition(".")[0] != "stackwise":
            _refuse(f"{error.name} is not installed", "`stackwise doctor` says what is missing, and how to install it")
            return 1
        case OSError() if error.filename is not None:
            _refuse(f"{os.fsdecode(error.filename)}: {error.strerror or error}")
            return 1
        case RecursionError():
            _refuse("something is nested too deeply", "flatten the configuration, the text or the layers")
            return 2
        case MemoryError():
            _refuse("there is not enough memory", "a smaller training.batch_size, or fewer blocks a stage, need less")
            return 1
        case UnicodeEncodeError() if any("\ud800" <= character <= "\udfff" for character in str(error.object)):
            _refuse(f"{str(error.object)[:200]!r} is not UTF-8", "give names and values in UTF-8")
            return 2
    lines = str(error).strip().splitlines()  # nobody foresaw it: one line here, the traceback in a file
    hint = f"unset {DEBUG} to keep the traceback in a file" if debug else _kept(error)
    _refuse(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, hint)
    return 1


def _refuse(message: str, hint: str | None = None) -> None:
    """One line on standard error, and another with what to do next; only our own message may have several."""
    note(f"stackwise: {message}" + (f"\n  {hint}" if hint else ""))


def _kept(error: BaseException) -> str:
    """Keep the traceback of an error that nobody foresaw; says where."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    try:
        fd, path = tempfile.mkstemp(prefix="stackwise-traceback-", suffix=".txt")
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(printable(text, lines=True))
    except OSError:
        return f"set {DEBUG}=1 to see the traceback"
    return f"the traceback is in {path}; it is worth a bug report"


def _final_code(output: Standard, code: int) -> int:
    """The exit code, once what is still buffered was written or could not be."""
    try:
        output.flush()
    except BrokenPipeError:
        output.discard()
        code = code or NO_READER
    except (StackWiseError, ValueError):  # it is kept in `failure`; or it was closed within the program
        pass
    if output.failure is not None and code == 0:  # any other code has had its line
        _refuse(output.failure.message)
        code = output.failure.exit_code
    return code


def stopped_after_saving(resume_command: str) -> InterruptedRun:
    """The end of work that was interrupted after its state was saved."""
    return InterruptedRun("interrupted; what was done is saved", hint=f"go on with: {resume_command}")
