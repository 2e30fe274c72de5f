"""The command `stackwise`: which commands there are, found without importing any of them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any

import click

from stackwise.cli import failure
from stackwise.version import __version__

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Train": {
        "init": ("init:init", "Write a commented stackwise.yaml."),
        "run": ("run:run", "Train every stage, evaluate, report; resumes by itself."),
        "stage": ("stage:stage", "One stage alone; the schedule."),
        "status": ("status:status", "How a run stands."),
        "sweep": ("sweep:sweep", "A run for each combination of values; common stages once."),
        "compare": ("sweep:compare", "Runs beside each other: what differs, what they came to."),
    },
    "Use what was trained": {
        "eval": ("use:evaluate", "Held-out bits per byte, loss and accuracy by depth."),
        "generate": ("use:generate", "Go on from a text, or fill in its holes."),
        "export": ("use:export", "One fused safetensors with its configuration and tokenizer."),
        "report": ("report:report", "Write a run's report.html again."),
    },
    "Data, store, machine": {
        "data": ("data:data", "Prepare text for training."),
        "cache": ("cache:cache", "The activation store: look, check, mend, clean."),
        "doctor": ("doctor:doctor", "What this machine has, and what is missing."),
    },
}
"""Every command under its heading: where it is, and what `stackwise --help` says of it."""

COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}


class Lazy(click.Group):
    """A group whose commands are imported when they are run, whose near misses are answered with what was meant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"stackwise.cli.commands.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or say which one was meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            raise no_such_command(ctx, name, list(COMMANDS))
        return super().resolve_command(ctx, args)

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
        if not standalone_mode:
            return super().main(args, name, complete_var, standalone_mode=False, **extra)
        extra.pop("windows_expand_args", None)
        self._main_shell_completion(extra, name, complete_var)
        return failure.run_program(self, args, name, extra)


class Subcommands(click.Group):
    """A command with commands of its own, whose near misses are answered too."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or say which one was meant."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            raise no_such_command(ctx, name, list(self.commands))
        return super().resolve_command(ctx, args)


def no_such_command(ctx: click.Context, name: str, names: list[str]) -> click.UsageError:
    """The answer to a command that does not exist."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    meant = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
    return click.UsageError(f"there is no command {name!r}{meant}", ctx=ctx)


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="stackwise %(version)s")
@click.option("--debug", is_flag=True, envvar=failure.DEBUG, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Train a transformer far larger than your GPU, one stage at a time, from a disk-backed activation store.

    \b
    stackwise run                      a small model on this machine's Python library, in minutes
    stackwise init && stackwise run stackwise.yaml

    Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 damage found in the store, 4 busy,
    5 no space left, 75 interrupted after saving: run again to go on.
    """
